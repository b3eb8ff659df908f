// kernel_test.cpp: the kernels alone, without torch: append, gather and attention through driver.h,
// on every level of this machine, against a naive computation in double.
//
//   kernel_test [cases per format]     one line per level; exit status 1 if anything is wrong
//
// Memory has the exact size that the interface asks for and starts out as 0xff, which is NaN in
// every format: cells that nobody may read stay so, and so does scratch. Bounds:
// tests/mla_cases.py.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "kernels/arithmetic/numeric.h"
#include "kernels/call/driver.h"
#include "kernels/call/kernel_table.h"
#include "kernels/formats/formats.h"
#include "kernels/levels/dispatch.h"

namespace flashmla {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t next() {  // splitmix64
    uint64_t x = state_ += 0x9e3779b97f4a7c15;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
  }
  int32_t below(int64_t n) { return static_cast<int32_t>(next() % static_cast<uint64_t>(n)); }
  double uniform() { return static_cast<double>((next() >> 11) + 1) * 0x1p-53; }
  float normal() {
    return static_cast<float>(std::sqrt(-2 * std::log(uniform())) *
                              std::cos(6.2831853 * uniform()));
  }
  template <class T>
  T pick(std::initializer_list<T> list) {
    return list.begin()[below(static_cast<int64_t>(list.size()))];
  }
  template <class T>
  void shuffle(std::vector<T>& list) {
    for (size_t i = list.size(); i > 1; --i)
      std::swap(list[i - 1], list[next() % static_cast<uint64_t>(i)]);
  }

 private:
  uint64_t state_;
};

// `offset` + `size` bytes of 0xff. The offset takes the data off its alignment.
class Memory {
 public:
  Memory() = default;
  explicit Memory(int64_t size, int64_t offset = 0)
      : size_(static_cast<size_t>(size + offset)),
        offset_(offset),
        data_(static_cast<std::byte*>(::operator new(size_, kAlignment))) {
    std::memset(data_.get(), 0xff, size_);
  }
  std::byte* data() const { return data_ ? data_.get() + offset_ : nullptr; }
  bool operator==(const Memory& other) const {
    return size_ == other.size_ &&
           (size_ == 0 || std::memcmp(data_.get(), other.data_.get(), size_) == 0);
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Delete {
    void operator()(std::byte* p) const { ::operator delete(p, kAlignment); }
  };
  size_t size_ = 0;
  int64_t offset_ = 0;
  std::unique_ptr<std::byte, Delete> data_;
};

float load(ScalarType type, const std::byte* p, int64_t i) {
  if (type == ScalarType::kF32) {
    float x;
    std::memcpy(&x, p + 4 * i, 4);
    return x;
  }
  uint16_t x;
  std::memcpy(&x, p + 2 * i, 2);
  return type == ScalarType::kBf16 ? bf16_to_float(x) : f16_to_float(x);
}

void store(ScalarType type, std::byte* p, int64_t i, float x) {
  if (type == ScalarType::kF32) {
    std::memcpy(p + 4 * i, &x, 4);
    return;
  }
  const uint16_t code = type == ScalarType::kBf16 ? float_to_bf16(x) : float_to_f16(x);
  std::memcpy(p + 2 * i, &code, 2);
}

float rounded(ScalarType type, float x) {
  std::byte p[4];
  store(type, p, 0, x);
  return load(type, p, 0);
}

ScalarType element(MaskType type) {
  return type == MaskType::kF32    ? ScalarType::kF32
         : type == MaskType::kBf16 ? ScalarType::kBf16
                                   : ScalarType::kF16;
}

// Hides a key as minus infinity does.
float lowest(ScalarType type) {
  return type == ScalarType::kF32    ? std::numeric_limits<float>::lowest()
         : type == ScalarType::kBf16 ? bf16_to_float(0xff7f)
                                     : f16_to_float(0xfbff);
}

// The two executors.

std::byte* scratch(int slot, size_t bytes) {
  thread_local Memory buffers[2];
  buffers[slot] = Memory(static_cast<int64_t>(bytes));
  return buffers[slot].data();
}

void in_order(int64_t count, void (*body)(int64_t, void*), void* context) {
  for (int64_t i = 0; i < count; ++i) body(i, context);
}

constexpr int32_t kThreads = 4;

void on_threads(int64_t count, void (*body)(int64_t, void*), void* context) {
  std::atomic<int64_t> next = 0;
  auto work = [&] {
    for (int64_t i; (i = next++) < count;) body(i, context);
  };
  std::vector<std::thread> threads;
  for (int64_t i = 1; i < std::min<int64_t>(count, kThreads); ++i) threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
}

// The matrix engine of the level onednn, naively. Counts what it is asked for.
std::atomic<int64_t> products = 0;
thread_local bool holds_context = false;

void begin_product() {
  ++products;
  holds_context = true;
}

void multiply_bf16(const ProductShape& s, const std::byte* a, const std::byte* b, float* c) {
  begin_product();
  auto at = [](const std::byte* p, int64_t i) {
    uint16_t x;
    std::memcpy(&x, p + 2 * i, 2);
    return bf16_to_float(x);
  };
  std::vector<float> column(static_cast<size_t>(s.k));
  for (int64_t n = 0; n < s.n; ++n) {
    for (int64_t k = 0; k < s.k; ++k)
      column[static_cast<size_t>(k)] = at(b, (k / 2 * s.ldb + n) * 2 + k % 2);
    for (int64_t m = 0; m < s.m; ++m) {
      float sum = s.add ? c[m * s.ldc + n] : 0;
      for (int64_t k = 0; k < s.k; ++k)
        sum += at(a, m * s.lda + k) * column[static_cast<size_t>(k)];
      c[m * s.ldc + n] = sum;
    }
  }
}

void multiply_u8s8(const ProductShape& s, const std::byte* a, const std::byte* b, int32_t* c) {
  begin_product();
  std::vector<int32_t> column(static_cast<size_t>(s.k));
  for (int64_t n = 0; n < s.n; ++n) {
    for (int64_t k = 0; k < s.k; ++k)
      column[static_cast<size_t>(k)] = static_cast<int8_t>(b[(k / 4 * s.ldb + n) * 4 + k % 4]);
    for (int64_t m = 0; m < s.m; ++m) {
      int32_t sum = s.add ? c[m * s.ldc + n] : 0;
      for (int64_t k = 0; k < s.k; ++k)
        sum += static_cast<uint8_t>(a[m * s.lda + k]) * column[static_cast<size_t>(k)];
      c[m * s.ldc + n] = sum;
    }
  }
}

constexpr MatrixEngine kEngine{multiply_bf16, multiply_u8s8, [] { holds_context = false; },
                               [] { return 1; }};

constexpr Executor kOneWorker{1, in_order, scratch, &kEngine};
constexpr Executor kManyWorkers{kThreads, on_threads, scratch, &kEngine};

// What is varied.
struct Case {
  std::vector<int32_t> lengths;
  int32_t heads, q_len, latent, rope;
  int32_t page;  // 0: no block table
  ScalarType q_type, append_type;
  bool two_tensor, head_major, sink, deterministic, causal, leftpad, listed;
  bool ragged;         // the same queries as one row of tokens
  int32_t own_values;  // values are rows of their own, of this width; 0: they are the latent
  int32_t window;
  MaskType mask;
  int64_t pad, offset;  // bytes after a row, and before the first
  float scale;

  int32_t batch() const { return static_cast<int32_t>(lengths.size()); }
  int32_t width() const { return latent + rope; }
  int32_t value() const { return own_values > 0 ? own_values : latent; }
  int32_t longest() const { return std::max(1, *std::max_element(lengths.begin(), lengths.end())); }
};

// Dims and query types come in turn, in all pairs; the rest is drawn.
Case draw_case(const FormatInfo& format, int32_t index, Random& random) {
  using Lengths = std::vector<int32_t>;
  struct Dims {
    int32_t latent, rope;
  };
  const std::vector<Dims> dims =
      format.packed ? std::vector<Dims>{{512, 64}, {32, 32}, {64, 0}, {96, 32}, {160, 64}}
                    : std::vector<Dims>{{512, 64}, {33, 5}, {64, 0}, {17, 0}, {130, 7}, {96, 16}};
  const auto types = {ScalarType::kF32, ScalarType::kBf16, ScalarType::kF16};
  const auto turns = static_cast<int32_t>(dims.size());
  Case c = {};
  c.lengths = random.pick<Lengths>({{0, 1, 17, 127, 300}, {300, 17}, {300}, {127}});
  c.heads = random.pick({1, 3, 16, 20});
  c.q_len = random.pick({1, 1, 2, 5});
  c.latent = dims[static_cast<size_t>(index % turns)].latent;
  c.rope = dims[static_cast<size_t>(index % turns)].rope;
  c.q_type = types.begin()[(index % turns + index / turns) % 3];
  c.deterministic = random.below(4) == 0;
  if (c.deterministic && c.heads <= 3) {  // two parts or more
    c.lengths = {2300};
    c.latent = std::min(c.latent, 160);
  }
  c.page = random.pick({1, 16, 61, 64, 0});
  c.append_type = random.pick(types);
  c.two_tensor = !format.packed && c.rope > 0 && random.below(2) == 0;
  c.head_major = random.below(2) == 0;
  c.sink = random.below(3) == 0;
  const int32_t keys = random.below(7);  // all, causal, leftpad, window, mask, list, each of them
  c.causal = keys == 1 || (keys != 0 && random.below(2) == 0);
  c.leftpad = keys == 2 || keys == 6;
  c.window = keys == 3 || keys == 6 ? random.pick({1, 7, 64, 200}) : 0;
  if (keys == 4 || keys == 6)
    c.mask = random.pick({MaskType::kBool, MaskType::kF32, MaskType::kBf16, MaskType::kF16});
  c.listed = keys >= 5;
  c.pad = random.pick({0, 8});
  c.offset = random.below(2) == 0 ? 0 : format.packed ? 1 : 4;
  if (!format.packed && random.below(3) == 0) c.own_values = 1 + random.below(c.latent);
  c.ragged = !c.head_major && c.mask == MaskType::kNone && random.below(2) == 0;
  const float scale = 1 / std::sqrt(128.0f + static_cast<float>(c.rope));
  c.scale = random.below(8) == 0 ? -scale : scale;
  return c;
}

struct Expected {
  std::vector<double> out;  // [B, Sq, H, L]
  std::vector<double> lse;  // [B, Sq, H]
};

// One case and its values.
class Problem {
 public:
  Problem(const FormatInfo& format, int32_t index);

  // Runs the case on the level in use; the first call (level scalar) also sets what is expected of
  // all others. Returns what is wrong, or nothing.
  std::string run();

  int64_t merges = 0;  // row blocks of run() that were split among workers
  double worst = 0;    // largest part of a bound that an error of run() has taken

 private:
  bool sees(int32_t b, int32_t s, int32_t t) const;
  void fill_values(Memory pools[3]) const;
  double mask_at(int32_t b, int32_t h, int32_t s, int32_t t) const;
  void draw_visibility(Random& random);
  void draw_pages(Random& random);
  CacheView view(const Memory pools[3]) const;
  AttentionParams arguments(const CacheView& cache) const;
  Expected attend(const std::vector<float>& rows) const;
  std::string append_and_gather(Memory pools[3]);
  std::string attention(const CacheView& cache, const Executor& executor);
  std::string projected(const CacheView& cache);
  std::string expanded();
  std::string within(const char* what, double error, double bound);

  int64_t cell(int32_t b, int32_t t) const { return static_cast<int64_t>(b) * c_.longest() + t; }

  FormatInfo format_;
  int32_t index_;
  Case c_;
  std::vector<float> rows_;        // [B, N, D] before they are stored
  std::vector<bool> seen_;         // [B, N]: some query may read the cell
  std::vector<int64_t> appended_;  // cells in the order of their appending
  Memory appended_rows_;           // [tokens, D], append_type
  std::vector<int64_t> slots_;     // [tokens]
  int32_t blocks_, block_size_, table_width_ = 0;
  std::vector<int32_t> table_;       // [B, table_width]
  Memory q_;                         // [B, Sq, H, D] or [B, H, Sq, D], q_type
  int64_t q_stride_[3];              // elements / D, of B, Sq, H
  std::vector<int32_t> cu_seqlens_;  // [B + 1]
  std::vector<int32_t> leftpad_, list_, list_length_;
  int32_t topk_ = 0;
  std::vector<bool> listed_;     // [B, Sq, N]
  Memory mask_;                  // [B or 1, H or 1, Sq or 1, columns]
  int64_t mask_stride_[3] = {};  // bytes
  std::vector<float> sink_;

  Memory scalar_pools_[2];     // the cache as level scalar writes it
  std::vector<float> stored_;  // rows_ as level scalar reads them back
  Expected of_stored_, of_rows_;
};

Problem::Problem(const FormatInfo& format, int32_t index) : format_(format), index_(index) {
  Random random(static_cast<uint64_t>(index) * 256 + static_cast<uint64_t>(format.format));
  c_ = draw_case(format, index, random);
  const int64_t cells = cell(c_.batch(), 0);
  rows_.resize(static_cast<size_t>(cells * c_.width()));
  for (float& x : rows_) x = rounded(c_.append_type, random.normal());
  draw_visibility(random);
  draw_pages(random);
  const int64_t q_rows = static_cast<int64_t>(c_.batch()) * c_.q_len * c_.heads;
  q_ = Memory(q_rows * c_.width() * size_of(c_.q_type));
  for (int64_t i = 0; i < q_rows * c_.width(); ++i) store(c_.q_type, q_.data(), i, random.normal());
  q_stride_[0] = static_cast<int64_t>(c_.q_len) * c_.heads;
  q_stride_[1] = c_.head_major ? 1 : c_.heads;
  q_stride_[2] = c_.head_major ? c_.q_len : 1;
  for (int32_t h = 0; c_.sink && h < c_.heads; ++h) sink_.push_back(random.normal());
  for (int32_t b = 0; b <= c_.batch(); ++b) cu_seqlens_.push_back(b * c_.q_len);
}

bool Problem::sees(int32_t b, int32_t s, int32_t t) const {
  const int32_t length = c_.lengths[static_cast<size_t>(b)];
  const int32_t limit = c_.causal ? length - c_.q_len + s + 1 : length;
  if (t >= limit || (c_.window > 0 && t < limit - c_.window)) return false;
  if (c_.leftpad && t < leftpad_[static_cast<size_t>(b)]) return false;
  return !c_.listed || listed_[static_cast<size_t>(cell(b * c_.q_len + s, t))];
}

double Problem::mask_at(int32_t b, int32_t h, int32_t s, int32_t t) const {
  if (c_.mask == MaskType::kNone) return 0;
  const std::byte* row =
      mask_.data() + b * mask_stride_[0] + h * mask_stride_[1] + s * mask_stride_[2];
  if (c_.mask == MaskType::kBool) return row[t] != std::byte{0} ? 0 : -kInfinity;
  const float x = load(element(c_.mask), row, t);
  return x <= lowest(element(c_.mask)) ? -kInfinity : x;
}

void Problem::draw_visibility(Random& random) {
  const int32_t batch = c_.batch(), longest = c_.longest();
  if (c_.leftpad)
    for (int32_t length : c_.lengths) leftpad_.push_back(random.below(length + 1));
  if (c_.listed) {
    topk_ = random.pick({1, 40, 200, longest + 20});
    listed_.resize(static_cast<size_t>(cell(batch * c_.q_len, 0)));
    const bool shorter = random.below(2) == 0;
    for (int32_t b = 0; b < batch; ++b) {
      if (shorter) list_length_.push_back(random.below(topk_ + 1));
      for (int32_t s = 0; s < c_.q_len; ++s) {
        // Each position once, among entries that name none.
        std::vector<int32_t> list(static_cast<size_t>(c_.lengths[static_cast<size_t>(b)]));
        for (size_t t = 0; t < list.size(); ++t) list[t] = static_cast<int32_t>(t);
        while (static_cast<int32_t>(list.size()) < topk_ || random.below(4) != 0)
          list.push_back(random.pick({-1, longest, 1 << 30, std::numeric_limits<int32_t>::min()}));
        random.shuffle(list);
        list.resize(static_cast<size_t>(topk_));
        list_.insert(list_.end(), list.begin(), list.end());
        const int32_t count = shorter ? list_length_.back() : topk_;
        for (int32_t i = 0; i < count; ++i) {
          const int32_t t = list[static_cast<size_t>(i)];
          if (t >= 0 && t < longest) listed_[static_cast<size_t>(cell(b * c_.q_len + s, t))] = true;
        }
      }
    }
  }
  if (c_.mask != MaskType::kNone) {
    const int32_t columns = longest + random.below(3);
    const ScalarType type = element(c_.mask);
    const int64_t size = c_.mask == MaskType::kBool ? 1 : size_of(type);
    int64_t mask_rows = 1;
    const int32_t full[3] = {batch, c_.heads, c_.q_len};
    for (int d : {2, 1, 0}) {
      if (random.below(2) == 0) continue;
      mask_stride_[d] = mask_rows * columns * size;
      mask_rows *= full[d];
    }
    mask_ = Memory(mask_rows * columns * size);
    const float hidden = random.pick({-std::numeric_limits<float>::infinity(), lowest(type)});
    for (int64_t i = 0; i < mask_rows * columns; ++i) {
      const int64_t t = i % columns;
      const bool hole = (t >= columns / 4 && t < columns / 4 + 150) || random.below(10) < 3;
      if (c_.mask == MaskType::kBool) {
        mask_.data()[i] = static_cast<std::byte>(hole ? 0 : 1);
      } else {
        store(type, mask_.data(), i, hole ? hidden : random.normal());
      }
    }
  }
  seen_.resize(static_cast<size_t>(cell(batch, 0)));
  for (int32_t b = 0; b < batch; ++b)
    for (int32_t s = 0; s < c_.q_len; ++s)
      for (int32_t t = 0; t < longest; ++t)
        if (sees(b, s, t)) seen_[static_cast<size_t>(cell(b, t))] = true;
}

void Problem::draw_pages(Random& random) {
  if (c_.page == 0) {
    blocks_ = c_.batch();
    block_size_ = c_.longest() + random.below(4);
  } else {
    block_size_ = c_.page;
    blocks_ = 1;
    for (int32_t length : c_.lengths) blocks_ += (length + c_.page - 1) / c_.page;
    std::vector<int32_t> order(static_cast<size_t>(blocks_));
    for (int32_t i = 0; i < blocks_; ++i) order[static_cast<size_t>(i)] = i;
    random.shuffle(order);
    table_width_ = (c_.longest() + c_.page - 1) / c_.page + 1;
    table_.assign(static_cast<size_t>(c_.batch() * table_width_), 1 << 30);
    size_t next = 0;
    for (int32_t b = 0; b < c_.batch(); ++b)
      for (int32_t i = 0; i * c_.page < c_.lengths[static_cast<size_t>(b)]; ++i)
        table_[static_cast<size_t>(b * table_width_ + i)] = order[next++];
  }
  for (size_t i = 0; i < seen_.size(); ++i)
    if (seen_[i]) appended_.push_back(static_cast<int64_t>(i));
  for (int i = 0; i < 3; ++i) appended_.push_back(-1);  // are skipped
  random.shuffle(appended_);
  const auto tokens = static_cast<int64_t>(appended_.size());
  appended_rows_ = Memory(tokens * c_.width() * size_of(c_.append_type));
  for (int64_t i = 0; i < tokens; ++i) {
    const int64_t from = appended_[static_cast<size_t>(i)];
    if (from < 0) {
      slots_.push_back(-1);
      continue;
    }
    const auto b = static_cast<int32_t>(from / c_.longest()),
               t = static_cast<int32_t>(from % c_.longest());
    const int64_t block =
        c_.page == 0 ? b : table_[static_cast<size_t>(b * table_width_ + t / block_size_)];
    slots_.push_back(block * block_size_ + t % block_size_);
    for (int32_t d = 0; d < c_.width(); ++d)
      store(c_.append_type, appended_rows_.data(), i * c_.width() + d,
            rows_[static_cast<size_t>(from * c_.width() + d)]);
  }
}

CacheView Problem::view(const Memory pools[3]) const {
  const int64_t latent_bytes = format_.row_bytes(c_.latent, 0),
                row_bytes = c_.two_tensor ? latent_bytes : format_.row_bytes(c_.latent, c_.rope);
  CacheView v = {};
  v.format = format_.format;
  v.latent = c_.latent;
  v.value = c_.value();
  v.rope = c_.rope;
  v.block_size = block_size_;
  v.kv_c = {pools[0].data(), block_size_ * (row_bytes + c_.pad), row_bytes + c_.pad};
  v.k_pe = v.kv_c;
  if (c_.two_tensor) {
    const int64_t rope_bytes = format_.row_bytes(0, c_.rope);
    v.k_pe = {pools[1].data(), block_size_ * rope_bytes, rope_bytes};
  } else if (!format_.packed && c_.rope > 0) {
    v.k_pe.data += latent_bytes;
  }
  if (c_.own_values > 0) {
    const int64_t value_bytes = format_.row_bytes(c_.own_values, 0);
    v.v = {pools[2].data(), block_size_ * value_bytes, value_bytes};
  }
  if (c_.page != 0) {
    v.block_table = table_.data();
    v.block_table_stride = table_width_;
  }
  return v;
}

// Writes the cache and reads it back.
std::string Problem::append_and_gather(Memory pools[3]) {
  const int64_t slots = static_cast<int64_t>(blocks_) * block_size_;
  const int64_t row_bytes = format_.row_bytes(c_.latent, c_.two_tensor ? 0 : c_.rope);
  pools[0] = Memory((slots - 1) * (row_bytes + c_.pad) + row_bytes, c_.offset);
  if (c_.two_tensor) pools[1] = Memory(slots * format_.row_bytes(0, c_.rope), c_.offset);
  if (c_.own_values > 0) pools[2] = Memory(slots * format_.row_bytes(c_.own_values, 0), c_.offset);
  AppendParams a = {};
  a.tokens = static_cast<int64_t>(slots_.size());
  a.type = c_.append_type;
  a.kv_c = appended_rows_.data();
  a.k_pe = a.kv_c + c_.latent * size_of(a.type);
  a.kv_c_stride = a.k_pe_stride = c_.width() * size_of(a.type);
  a.slot_mapping = slots_.data();
  a.cache = view(pools);
  append(a, kManyWorkers);
  const bool first = stored_.empty();
  if (!first && !(pools[0] == scalar_pools_[0] && pools[1] == scalar_pools_[1]))
    return "append: other bytes than those of level scalar";

  GatherParams g = {};
  g.batch = c_.batch();
  g.max_seqlen = c_.longest() + 2;
  g.cache = a.cache;
  g.cache_seqlens = c_.lengths.data();
  if (first) stored_.resize(rows_.size());
  for (ScalarType type : {ScalarType::kF32, c_.q_type}) {
    const Memory out(g.batch * g.max_seqlen * c_.width() * size_of(type));
    g.out_type = type;
    g.out = out.data();
    gather(g, kManyWorkers);
    for (int32_t b = 0; b < g.batch; ++b) {
      for (int32_t t = 0; t < g.max_seqlen; ++t) {
        const bool in = t < c_.lengths[static_cast<size_t>(b)];
        if (in && !seen_[static_cast<size_t>(cell(b, t))]) continue;
        for (int32_t d = 0; d < c_.width(); ++d) {
          const float x = load(type, g.out, (b * g.max_seqlen + t) * c_.width() + d);
          const auto at = static_cast<size_t>(cell(b, t) * c_.width() + d);
          if (in && first && type == ScalarType::kF32) stored_[at] = x;
          if (x != (in ? rounded(type, stored_[at]) : 0)) return "gather: another value";
        }
      }
    }
  }
  return {};
}

// Value rows of their own hold the first columns of the latent.
void Problem::fill_values(Memory pools[3]) const {
  if (c_.own_values == 0) return;
  const int64_t slots = static_cast<int64_t>(blocks_) * block_size_;
  const int64_t value_bytes = format_.row_bytes(c_.own_values, 0);
  const PagedRows from = view(pools).kv_c;
  for (int64_t i = 0; i < slots; ++i)
    std::memcpy(pools[2].data() + i * value_bytes, from.data + i * from.token_stride,
                static_cast<size_t>(value_bytes));
}

// What attention() is held to.
Expected Problem::attend(const std::vector<float>& rows) const {
  Expected e;
  std::vector<double> q(static_cast<size_t>(c_.width())), p, sum(static_cast<size_t>(c_.latent));
  for (int32_t b = 0; b < c_.batch(); ++b) {
    for (int32_t s = 0; s < c_.q_len; ++s) {
      for (int32_t h = 0; h < c_.heads; ++h) {
        const int64_t row = b * q_stride_[0] + s * q_stride_[1] + h * q_stride_[2];
        for (int32_t d = 0; d < c_.width(); ++d)
          q[static_cast<size_t>(d)] = load(c_.q_type, q_.data(), row * c_.width() + d);
        p.assign(static_cast<size_t>(c_.longest()), -kInfinity);
        double most = -kInfinity;
        for (int32_t t = 0; t < c_.longest(); ++t) {
          if (!sees(b, s, t)) continue;
          const float* key = rows.data() + cell(b, t) * c_.width();
          double dot = 0;
          for (size_t d = 0; d < q.size(); ++d) dot += q[d] * static_cast<double>(key[d]);
          const double logit = dot * static_cast<double>(c_.scale) + mask_at(b, h, s, t);
          p[static_cast<size_t>(t)] = logit;
          most = std::max(most, logit);
        }
        double total = 0;
        std::fill(sum.begin(), sum.end(), 0);
        for (int32_t t = 0; t < c_.longest(); ++t) {
          if (p[static_cast<size_t>(t)] == -kInfinity) continue;
          const double weight = std::exp(p[static_cast<size_t>(t)] - most);
          const float* value = rows.data() + cell(b, t) * c_.width();
          total += weight;
          for (size_t d = 0; d < sum.size(); ++d) sum[d] += weight * static_cast<double>(value[d]);
        }
        e.lse.push_back(total == 0 ? -kInfinity : most + std::log(total));
        if (c_.sink && total != 0)
          total += std::exp(static_cast<double>(sink_[static_cast<size_t>(h)]) - most);
        for (double x : sum) e.out.push_back(total == 0 ? 0 : x / total);
      }
    }
  }
  return e;
}

AttentionParams Problem::arguments(const CacheView& cache) const {
  const int64_t size = size_of(c_.q_type);
  AttentionParams p = {};
  p.batch = c_.batch();
  p.q_len = c_.q_len;
  p.heads = c_.heads;
  p.q_type = p.q_main_type = p.out_type = c_.q_type;
  p.q.data = q_.data();
  p.q_pe.data = q_.data() + c_.latent * size;
  for (int d = 0; d < 3; ++d) p.q.stride[d] = p.q_pe.stride[d] = q_stride_[d] * c_.width() * size;
  p.cache = cache;
  p.cache_seqlens = c_.lengths.data();
  p.softmax_scale = c_.scale;
  p.causal = c_.causal;
  p.window = c_.window;
  if (c_.leftpad) p.cache_leftpad = leftpad_.data();
  p.mask_type = c_.mask;
  p.mask = mask_.data();
  std::copy(mask_stride_, mask_stride_ + 3, p.mask_stride);
  if (c_.listed) {
    p.indices = list_.data();
    p.indices_stride[0] = static_cast<int64_t>(c_.q_len) * topk_;
    p.indices_stride[1] = topk_;
    p.topk = topk_;
    if (!list_length_.empty()) p.topk_length = list_length_.data();
  }
  if (c_.sink) p.attn_sink = sink_.data();
  p.attn_sink_stride[1] = 1;
  p.deterministic = c_.deterministic;
  if (c_.ragged) {
    p.cu_seqlens_q = cu_seqlens_.data();
    p.q.stride[0] = p.q_pe.stride[0] = p.indices_stride[0] = 0;
  }
  return p;
}

std::string Problem::within(const char* what, double error, double bound) {
  if (bound > 0) worst = std::max(worst, error / bound);
  if (error <= bound) return {};
  return std::string(what) + ": error " + std::to_string(error) + ", bound " +
         std::to_string(bound);
}

std::string Problem::attention(const CacheView& cache, const Executor& executor) {
  const int64_t rows = static_cast<int64_t>(c_.batch()) * c_.q_len * c_.heads;
  const int32_t width = c_.value();
  const Memory out(rows * width * size_of(c_.q_type)), lse(rows * 4);
  AttentionParams p = arguments(cache);
  p.out.data = out.data();
  for (int d = 0; d < 3; ++d) p.out.stride[d] = q_stride_[d] * width * size_of(c_.q_type);
  if (c_.ragged) p.out.stride[0] = 0;
  p.lse = reinterpret_cast<float*>(lse.data());
  p.lse_stride[0] = static_cast<int64_t>(c_.heads) * c_.q_len;
  p.lse_stride[1] = c_.q_len;
  p.lse_stride[2] = 1;
  if (c_.ragged) {
    p.lse_stride[0] = 0;
    p.lse_stride[1] = static_cast<int64_t>(c_.batch()) * c_.q_len;
  }
  Plan plan;
  flashmla::attention(p, plan, executor);
  merges += static_cast<int64_t>(plan.merges.size());

  const std::string arithmetic = kernels().arithmetic(format_.format, c_.q_type);
  double lse_bound = 1e-3, ratio = 1.1;
  if (format_.packed && arithmetic == "int16")
    lse_bound = format_.format == CacheFormat::kQ8Kv ? 1e-3 : 5e-3;
  if (format_.packed && arithmetic == "bf16") lse_bound = 3e-2, ratio = 1.5;
  if (format_.packed && arithmetic == "int8") lse_bound = 0.1, ratio = 2.5;
  constexpr double kFloatError[] = {1e-5, 2.5e-3, 5e-4};  // f32, bf16, fp16
  constexpr double kRoundoff[] = {0, 0x1p-8, 0x1p-11};
  const double float_error = kFloatError[static_cast<int>(c_.q_type)],
               roundoff = kRoundoff[static_cast<int>(c_.q_type)];
  size_t row = 0;
  for (int32_t b = 0; b < c_.batch(); ++b) {
    double error = 0, size = 0, packed_error = 0, storage = 0, packed_size = 0;
    for (int32_t s = 0; s < c_.q_len; ++s) {
      for (int32_t h = 0; h < c_.heads; ++h, ++row) {
        const double expected = of_stored_.lse[row];
        const int64_t token = c_.ragged ? b * c_.q_len + s : s;
        const double actual = p.lse[b * p.lse_stride[0] + h * p.lse_stride[1] + token];
        const bool empty = expected == -kInfinity;
        if (empty != (actual == -kInfinity)) return "lse: minus infinity in one of the two";
        if (std::string wrong = within("lse", empty ? 0 : std::fabs(actual - expected), lse_bound);
            !wrong.empty())
          return wrong;
        const int64_t at = b * q_stride_[0] + s * q_stride_[1] + h * q_stride_[2];
        for (int32_t d = 0; d < width; ++d) {
          const double x = load(c_.q_type, out.data(), at * width + d);
          if (!std::isfinite(x)) return "out: not finite";
          if (empty && x != 0) return "out: not 0 without keys";
          const size_t i = row * static_cast<size_t>(c_.latent) + static_cast<size_t>(d);
          const double stored = of_stored_.out[i], original = of_rows_.out[i];
          error += (x - stored) * (x - stored);
          size += stored * stored;
          packed_error += (x - original) * (x - original);
          storage += (stored - original) * (stored - original);
          packed_size += original * original;
        }
      }
    }
    double bound = float_error * std::sqrt(size);
    if (format_.packed) bound = ratio * std::sqrt(storage) + roundoff * std::sqrt(packed_size);
    // Over many keys the error of storing them averages out, that of 8-bit queries does not: values
    // being keys, the mean of (dq . k) v is dq. Of normal queries it is less than 1 %.
    const double values = static_cast<double>(c_.q_len) * c_.heads * width;
    if (arithmetic == "int8" && c_.lengths[static_cast<size_t>(b)] > 1000)
      bound += 0.01 * std::fabs(static_cast<double>(c_.scale)) * std::sqrt(values);
    bound *= 1 + 2 / std::sqrt(values);  // the mean over few values scatters
    const std::string wrong =
        within("out", std::sqrt(format_.packed ? packed_error : error), bound);
    if (!wrong.empty()) return wrong;
  }
  return {};
}

// One half of a weight: [H, rows, L] with strides of some kind, and what lies in it.
struct Weight {
  Memory memory;
  WeightRows rows;
  std::vector<double> values;  // [H, rows, L]

  Weight(ScalarType type, int32_t heads, int32_t count, int32_t latent, Random& random,
         bool any_strides = true) {
    const int64_t item = size_of(type), gap = random.below(3);
    int64_t size = 0;
    if (any_strides && random.below(3) == 0) {  // rows are columns
      rows.stride[1] = item;
      rows.stride[2] = (count + gap) * item;
      rows.stride[0] = size = latent * rows.stride[2];
    } else {
      rows.stride[2] = item;
      rows.stride[1] = (latent + gap) * item;
      rows.stride[0] = size = count * rows.stride[1];
    }
    memory = Memory(size * heads, random.below(2) * item);
    rows.data = memory.data();
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t r = 0; r < count; ++r) {
        for (int64_t i = 0; i < latent; ++i) {
          const float x = random.normal() / std::sqrt(static_cast<float>(latent));
          store(type, memory.data() + at(h, r, i), 0, x);
          values.push_back(load(type, rows.data + at(h, r, i), 0));
        }
      }
    }
  }
  int64_t at(int64_t h, int64_t r, int64_t i) const {
    return h * rows.stride[0] + r * rows.stride[1] + i * rows.stride[2];
  }
};

// A step between projections: each of its parts against what went into it, and the whole on one
// thread against the whole on several.
std::string Problem::projected(const CacheView& cache) {
  Random random(static_cast<uint64_t>(index_) * 7919 + 1);
  const int32_t nope = random.pick({1, 8, 13, 40}), value = random.pick({1, 16, 23, 48}),
                tokens = c_.batch() * c_.q_len, latent = c_.latent;
  const int64_t item = size_of(c_.q_type);
  const Weight uk(c_.q_type, c_.heads, nope, latent, random),
      uv(c_.q_type, c_.heads, value, latent, random);
  const int64_t rows = static_cast<int64_t>(tokens) * c_.heads;
  const Memory q(rows * nope * item);
  for (int64_t i = 0; i < rows * nope; ++i) store(c_.q_type, q.data(), i, random.normal());
  ProjectionParams w = {};
  w.type = c_.q_type;
  w.heads = c_.heads;
  w.tokens = tokens;
  w.q_len = c_.ragged ? tokens : c_.q_len;
  w.nope = nope;
  w.latent = latent;
  w.value = value;
  w.uk = uk.rows;
  w.uv = uv.rows;
  w.latent_row = (latent + 15) / 16 * 16;
  w.q.data = q.data();
  for (int d = 0; d < 3; ++d) {
    const int64_t stride = d == 0 && c_.ragged ? 0 : q_stride_[d];
    w.q.stride[d] = stride * nope * item;
    w.out.stride[d] = stride * value * item;
  }
  AttentionParams p = arguments(cache);
  p.deterministic = true;
  p.lse_stride[0] = c_.ragged ? 0 : static_cast<int64_t>(c_.heads) * c_.q_len;
  p.lse_stride[1] = c_.ragged ? tokens : c_.q_len;
  p.lse_stride[2] = 1;

  struct Results {
    Memory latents, out, lse;
  };
  auto run_on = [&](const Executor& executor) {
    Results r = {Memory(2 * rows * w.latent_row * 4), Memory(rows * value * item),
                 Memory(rows * 4)};
    w.q_latent = reinterpret_cast<float*>(r.latents.data());
    w.out_latent = w.q_latent + rows * w.latent_row;
    w.out.data = r.out.data();
    p.lse = reinterpret_cast<float*>(r.lse.data());
    Plan plan;
    projected_attention(p, w, plan, executor);
    return r;
  };
  const Results one = run_on(kOneWorker), many = run_on(kManyWorkers);
  if (!(one.out == many.out && one.lse == many.lse)) return "step: other bits on several threads";

  const auto* q_latent = reinterpret_cast<const float*>(one.latents.data());
  const float* out_latent = q_latent + rows * w.latent_row;
  double error[2] = {}, size[2] = {};
  auto count = [&](int half, double x, double expected) {
    error[half] += (x - expected) * (x - expected);
    size[half] += expected * expected;
  };
  for (int64_t h = 0; h < c_.heads; ++h) {
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t row =
          t / c_.q_len * q_stride_[0] + t % c_.q_len * q_stride_[1] + h * q_stride_[2];
      const int64_t at = (h * tokens + t) * w.latent_row;
      for (int64_t i = 0; i < latent; ++i) {
        double sum = 0;
        for (int64_t k = 0; k < nope; ++k)
          sum += static_cast<double>(load(c_.q_type, q.data(), row * nope + k)) *
                 uk.values[static_cast<size_t>((h * nope + k) * latent + i)];
        count(0, q_latent[at + i], sum);
      }
      for (int64_t v = 0; v < value; ++v) {
        double sum = 0;
        for (int64_t i = 0; i < latent; ++i)
          sum += static_cast<double>(out_latent[at + i]) *
                 uv.values[static_cast<size_t>((h * value + v) * latent + i)];
        count(1, load(c_.q_type, one.out.data(), row * value + v), sum);
      }
    }
  }
  constexpr double kRounding[] = {1e-6, 2.5e-3, 5e-4};  // of the results: f32, bf16, fp16
  std::string wrong = within("q_latent", std::sqrt(error[0]), 1e-6 * std::sqrt(size[0]));
  if (wrong.empty())
    wrong = within("projected out", std::sqrt(error[1]),
                   kRounding[static_cast<int>(c_.q_type)] * std::sqrt(size[1]));
  if (!wrong.empty()) return wrong;

  // Attention by itself, over the same latent queries.
  const Memory out(rows * w.latent_row * 4), lse(rows * 4);
  auto by_head = [&](const float* data) {
    const int64_t row = w.latent_row * 4;
    return QueryRows{reinterpret_cast<std::byte*>(const_cast<float*>(data)),
                     {c_.ragged ? 0 : c_.q_len * row, row, tokens * row}};
  };
  p.q = by_head(q_latent);
  p.out = by_head(reinterpret_cast<const float*>(out.data()));
  p.q_main_type = p.out_type = ScalarType::kF32;
  p.lse = reinterpret_cast<float*>(lse.data());
  Plan plan;
  flashmla::attention(p, plan, kOneWorker);
  if (!(lse == one.lse)) return "step: another log-sum-exp than that of attention";
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = r * w.latent_row * 4;
    if (std::memcmp(out.data() + at, one.latents.data() + (rows * w.latent_row * 4 + at),
                    static_cast<size_t>(latent) * 4) != 0)
      return "step: another latent result than that of attention";
  }
  return {};
}

// Keys of heads from rows of the latent, two expansions at once.
std::string Problem::expanded() {
  Random random(static_cast<uint64_t>(index_) * 104729 + 1);
  const bool bf16 =
      std::string(kernels().arithmetic(CacheFormat::kBf16, ScalarType::kBf16)) == "bf16";
  const ScalarType type =
      bf16 && c_.latent % 2 == 0 && random.below(2) == 0 ? ScalarType::kBf16 : ScalarType::kF32;
  const int64_t item = size_of(type), latent = c_.latent, row = latent + random.pick({0, 6, 64});
  const int32_t tokens = random.pick({1, 16, 40, 129, 200}),
                memory = (tokens + kExpandedTokens - 1) / kExpandedTokens * kExpandedTokens;
  const Memory rows(memory * row * item);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t i = 0; i < latent; ++i) store(type, rows.data(), t * row + i, random.normal());
  struct Half {
    Weight weight;
    Memory out;
    int64_t row;
  };
  std::vector<Half> halves;
  ExpansionParams params[2] = {};
  for (ExpansionParams& e : params) {
    e.type = type;
    e.heads = std::min(c_.heads, 3);
    e.width = random.pick({1, 16, 40, 128, 133});
    e.latent = c_.latent;
    e.tokens = tokens;
    e.rows = rows.data();
    e.row_stride = row * item;
    Half half = {Weight(type, e.heads, e.width, c_.latent, random, false), {}, e.width + 3};
    e.weight = half.weight.rows;
    half.out = Memory(e.heads * tokens * half.row * item);
    e.out = half.out.data();
    e.out_token_stride = half.row * item;
    e.out_head_stride = tokens * e.out_token_stride;
    halves.push_back(std::move(half));
  }
  expand(params, kManyWorkers);
  for (size_t half = 0; half < 2; ++half) {
    const ExpansionParams& e = params[half];
    double error = 0, size = 0;
    for (int64_t h = 0; h < e.heads; ++h) {
      for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t v = 0; v < halves[half].row; ++v) {
          const float x = load(type, e.out, (h * tokens + t) * halves[half].row + v);
          if (v >= e.width && !std::isnan(x)) return "expansion: wrote behind a row";
          if (v >= e.width) continue;
          double sum = 0;
          for (int64_t i = 0; i < latent; ++i)
            sum += static_cast<double>(load(type, rows.data(), t * row + i)) *
                   halves[half].weight.values[static_cast<size_t>((h * e.width + v) * latent + i)];
          error += (x - sum) * (x - sum);
          size += sum * sum;
        }
      }
    }
    const double bound = type == ScalarType::kF32 ? 1e-6 : 2.5e-3;
    if (std::string wrong = within("expansion", std::sqrt(error), bound * std::sqrt(size));
        !wrong.empty())
      return wrong;
  }
  return {};
}

std::string Problem::run() {
  merges = 0;
  worst = 0;
  Memory pools[3];
  const bool first = stored_.empty();
  std::string wrong = append_and_gather(pools);
  if (wrong.empty() && first) {
    of_stored_ = attend(stored_);
    of_rows_ = attend(rows_);
  }
  fill_values(pools);
  const CacheView cache = view(pools);
  for (const Executor& executor : {kOneWorker, kManyWorkers}) {
    if (wrong.empty()) wrong = attention(cache, executor);
  }
  if (wrong.empty() && c_.own_values == 0) wrong = projected(cache);
  if (wrong.empty()) wrong = expanded();
  if (first) std::move(pools, pools + 2, scalar_pools_);
  if (wrong.empty()) return {};
  const auto number = [](int64_t x) { return " " + std::to_string(x); };
  return wrong + "; B H Sq L R page:" + number(c_.batch()) + number(c_.heads) + number(c_.q_len) +
         number(c_.latent) + number(c_.rope) + number(c_.page) + ", first length" +
         number(c_.lengths[0]) + ", q_type" + number(static_cast<int>(c_.q_type)) + ", causal" +
         number(c_.causal) + ", leftpad" + number(c_.leftpad) + ", window" + number(c_.window) +
         ", mask" + number(static_cast<int>(c_.mask)) + ", list" + number(c_.listed) + ", ragged" +
         number(c_.ragged) + ", value" + number(c_.value());
}

int test(int cases) {
  struct Level {
    const char* name;
    int64_t cases = 0, merges = 0, wrong = 0, products = 0;
    double worst = 0;
  };
  offer_matrix_engine([] { return true; }, [] { return false; });
  std::vector<Level> levels;
  for (const char* const* name = isa_names(); *name != nullptr; ++name)
    if (isa_available(*name)) levels.push_back({*name});
  int count;
  const FormatInfo* formats = format_list(&count);
  for (int f = 0; f < count; ++f) {
    for (int i = 0; i < cases; ++i) {
      Problem problem(formats[f], i);
      for (Level& level : levels) {
        force_isa(level.name);
        const int64_t before = products;
        std::string wrong = problem.run();
        level.products += products - before;
        if (wrong.empty() && holds_context) wrong = "a thread kept the engine's context";
        ++level.cases;
        level.merges += problem.merges;
        level.worst = std::max(level.worst, problem.worst);
        if (wrong.empty()) continue;
        if (++level.wrong <= 10)
          std::printf("%s, %s, case %d: %s\n", level.name, formats[f].name, i, wrong.c_str());
      }
    }
  }
  bool good = true;
  for (const Level& level : levels) {
    const bool lent = std::strcmp(level.name, "onednn") == 0;
    const bool passed = level.wrong == 0 && level.merges > 0 && (level.products > 0) == lent;
    std::printf("%s: %s, %lld cases, %lld wrong, %lld merges, errors up to %.2f of the bound\n",
                level.name, passed ? "passed" : "FAILED", static_cast<long long>(level.cases),
                static_cast<long long>(level.wrong), static_cast<long long>(level.merges),
                level.worst);
    good = good && passed;
  }
  return good ? 0 : 1;
}

}  // namespace
}  // namespace flashmla

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 24;
  return cases > 0 ? flashmla::test(cases) : 2;
}
