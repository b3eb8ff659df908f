// stages.cpp: where the time of attention goes on one instruction set: the kernels' own attend(),
// with a clock in it. stages.py builds one program per level and shows what they say; LEVEL_HEADER
// and LEVEL_SIMD name the level's vocabulary.
//
//   stages_<level> SECONDS KEYS FORMAT:HEADS...     one JSON object per line: GFLOP/s, seconds
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include LEVEL_HEADER

#include "kernels/formats/formats.h"
#include "kernels/levels/level.h"

namespace flashmla {
namespace {

using Simd = LEVEL_SIMD;
constexpr int32_t kLatent = 512, kRope = 64, kBlockSize = 64;

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

enum Stage { kPack, kStage, kScore, kSoften, kAccumulate, kFinish, kStages };
constexpr const char* kNames[] = {"pack", "stage", "score", "soften", "accumulate", "finish"};

// The time since the last lap belongs to a stage.
struct Clock {
  double seconds[kStages] = {};
  double last = now();
  StageRows stage_rows = nullptr;
  bool packing = true;

  void lap(Stage stage) {
    const double time = now();
    seconds[stage] += time - last;
    last = time;
  }
  void begin_item() {
    packing = true;
    last = now();
  }
  // Queries are packed when the first row is staged, or the first product begins.
  void packed() {
    if (packing) lap(kPack);
    packing = false;
  }
};
Clock timer;

void timed_stage_rows(const RowAddress* from, int32_t count, const RowLayout& layout,
                      std::byte* rows) {
  timer.packed();
  timer.stage_rows(from, count, layout, rows);
}

template <class Simd, class Arithmetic>
struct TimedProducts : OwnProducts<Simd, Arithmetic> {
  using Own = OwnProducts<Simd, Arithmetic>;
  using Own::Own;

  void score(const Tile& tile, int vectors, const Scratch& s) const {
    timer.packed();
    timer.lap(kStage);
    Own::score(tile, vectors, s);
    timer.lap(kScore);
  }
  void accumulate(const Tile& tile, const Output& output, int32_t used, int32_t rows,
                  const Scratch& s) const {
    timer.lap(kSoften);
    Own::accumulate(tile, output, used, rows, s);
    timer.lap(kAccumulate);
  }
};

template <class List>
struct Timed;
template <class... Formats>
struct Timed<FormatList<Formats...>> {
  static constexpr Pipeline kAll[][3] = {
      {choose<Simd, Formats, ScalarType::kF32, TimedProducts>(),
       choose<Simd, Formats, ScalarType::kBf16, TimedProducts>(),
       choose<Simd, Formats, ScalarType::kF16, TimedProducts>()}...};
};

float normal() {
  static uint64_t state = 1;
  auto uniform = [] {  // splitmix64
    uint64_t x = state += 0x9e3779b97f4a7c15;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return static_cast<double>(((x ^ (x >> 31)) >> 11) + 1) * 0x1p-53;
  };
  return static_cast<float>(std::sqrt(-2 * std::log(uniform())) * std::cos(6.2831853 * uniform()));
}

struct Free {
  void operator()(std::byte* p) const { std::free(p); }
};
using Memory = std::unique_ptr<std::byte, Free>;

Memory allocate(size_t bytes) {
  void* p = std::aligned_alloc(kCacheLine, (bytes + kCacheLine - 1) / kCacheLine * kCacheLine);
  if (p == nullptr) throw std::bad_alloc();
  return Memory(static_cast<std::byte*>(p));
}

ArithmeticId arithmetic_id(const char* name) {
  if (std::strcmp(name, "bf16") == 0) return ArithmeticId::kBf16;
  if (std::strcmp(name, "int16") == 0) return ArithmeticId::kInt16;
  if (std::strcmp(name, "int8") == 0) return ArithmeticId::kInt8;
  return ArithmeticId::kF32;
}

// One token of one sequence of `keys` tokens in shuffled pages, for `duration` seconds.
void measure(const FormatInfo& format, int32_t heads, int32_t keys, double duration) {
  constexpr int32_t kWidth = kLatent + kRope;
  const int32_t blocks = (keys + kBlockSize - 1) / kBlockSize;
  std::vector<int32_t> table(static_cast<size_t>(blocks));
  for (int32_t i = 0; i < blocks; ++i) table[static_cast<size_t>(i)] = i;
  for (int32_t i = 0; i + 7 < blocks; i += 2)
    std::swap(table[static_cast<size_t>(i)], table[static_cast<size_t>(i + 7)]);

  const int64_t row_bytes = format.row_bytes(kLatent, kRope);
  const size_t value_bytes = format.format == CacheFormat::kF32 ? 4 : 2;
  const Memory cells = allocate(static_cast<size_t>(blocks) * kBlockSize * row_bytes);
  CacheView cache = {};
  cache.format = format.format;
  cache.latent = cache.value = kLatent;
  cache.rope = kRope;
  cache.kv_c = {cells.get(), kBlockSize * row_bytes, row_bytes};
  cache.k_pe = cache.kv_c;
  if (!format.packed) cache.k_pe.data += kLatent * value_bytes;
  cache.block_size = kBlockSize;
  cache.block_table = table.data();

  std::vector<float> row(kWidth), work(kWidth);
  for (int64_t slot = 0; slot < blocks * kBlockSize; ++slot) {
    for (float& x : row) x = normal();
    AppendParams append = {};
    append.tokens = 1;
    append.kv_c = reinterpret_cast<const std::byte*>(row.data());
    append.k_pe = append.kv_c + kLatent * 4;
    append.slot_mapping = &slot;
    append.cache = cache;
    append_rows<Simd>(append, 0, 1, work.data());
  }

  AttentionParams p = {};
  p.batch = p.q_len = 1;
  p.heads = heads;
  p.q_type = p.q_main_type = p.out_type = format.format == CacheFormat::kF32   ? ScalarType::kF32
                                          : format.format == CacheFormat::kF16 ? ScalarType::kF16
                                                                               : ScalarType::kBf16;
  const int64_t element = size_of(p.q_type);
  const Memory q = allocate(static_cast<size_t>(heads * kWidth * element)),
               out = allocate(static_cast<size_t>(heads * kLatent * element));
  for (int32_t h = 0; h < heads; ++h) {
    for (float& x : row) x = normal();
    store_values<Simd>(p.q_type, row.data(), kWidth, q.get() + h * kWidth * element);
  }
  std::vector<float> lse(static_cast<size_t>(heads));
  p.q = {q.get(), {0, 0, kWidth * element}};
  p.q_pe = {q.get() + kLatent * element, {0, 0, kWidth * element}};
  p.out = {out.get(), {0, 0, kLatent * element}};
  p.lse = lse.data();
  p.lse_stride[1] = 1;
  p.cache = cache;
  p.cache_seqlens = &keys;
  p.softmax_scale = 0.0721688f;  // 192^-0.5

  const Pipeline& pipeline =
      Timed<CacheFormats>::kAll[static_cast<int>(format.format)][static_cast<int>(p.q_type)];
  const RowLayout layout = pipeline.row_layout(cache);
  const BlockShape shape = pipeline.block_shape(layout);
  Scratch unused;
  const Memory scratch = allocate(pipeline.lay_out(layout, shape, nullptr, unused));

  // The least disturbed round counts, of the roof too.
  const ArithmeticId id = arithmetic_id(pipeline.arithmetic);
  double roof = 0, least = std::numeric_limits<double>::infinity();
  Clock best;
  for (const double end = now() + duration; now() < end;) {
    for (const double turn_end = now() + 1e-3; now() < turn_end;) {
      timer = {};
      timer.stage_rows = pipeline.stage;
      const double begin = now();
      for (int32_t r = 0; r < heads; r += shape.rows) {
        const WorkItem item = {0, r, r + shape.rows < heads ? r + shape.rows : heads, 0, keys, -1};
        timer.begin_item();
        pipeline.attend(p, shape, item, timed_stage_rows, pipeline.native, pipeline.key_max,
                        nullptr, nullptr, scratch.get());
        timer.lap(kFinish);
      }
      const double seconds = now() - begin;
      if (seconds < least) least = seconds, best = timer;
    }
    const double begin = now();
    const auto flop = static_cast<double>(spin<Simd>(id, 20000));
    roof = std::fmax(roof, flop / (now() - begin));
  }

  const double pairs = 2.0 * heads * keys;
  std::printf("{\"format\": \"%s\", \"heads\": %d, \"keys\": %d, \"arithmetic\": \"%s\", ",
              format.name, heads, keys, pipeline.arithmetic);
  std::printf("\"roof\": %.4g, \"seconds\": %.4g, \"rate\": %.4g, ", roof / 1e9, least,
              pairs * (kWidth + kLatent) / least / 1e9);
  std::printf("\"score_rate\": %.4g, \"accumulate_rate\": %.4g, ",
              pairs * kWidth / best.seconds[kScore] / 1e9,
              pairs * kLatent / best.seconds[kAccumulate] / 1e9);
  std::printf("\"stages\": {");
  for (int i = 0; i < kStages; ++i)
    std::printf("%s\"%s\": %.4g", i ? ", " : "", kNames[i], best.seconds[i]);
  std::printf("}}\n");
  std::fflush(stdout);
}

int run(int count, char** arguments) {
  if (count < 4) {
    std::fprintf(stderr, "usage: %s SECONDS KEYS FORMAT:HEADS...\n", arguments[0]);
    return 2;
  }
  const double duration = std::atof(arguments[1]);
  const int keys = std::atoi(arguments[2]);
  for (int i = 3; i < count; ++i) {
    const std::string text = arguments[i];
    const size_t colon = text.find(':');
    const FormatInfo* format =
        find_format(text.data(), colon == std::string::npos ? text.size() : colon);
    const int heads = colon == std::string::npos ? 0 : std::atoi(text.c_str() + colon + 1);
    if (format == nullptr || heads < 1 || keys < 1) {
      std::fprintf(stderr, "%s: expected FORMAT:HEADS of %d keys\n", text.c_str(), keys);
      return 2;
    }
    measure(*format, heads, keys, duration);
  }
  return 0;
}

}  // namespace
}  // namespace flashmla

int main(int count, char** arguments) { return flashmla::run(count, arguments); }
