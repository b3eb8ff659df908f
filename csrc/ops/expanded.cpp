// expanded.cpp: the expanded form (forms.h), for prompts: keys and values of a group of heads are
// made from the latent by ATen products (oneDNN), then the same kernels attend to them.
//
// One sequence at a time, head groups outermost, all keys of a group at once: nothing is carried
// over and nothing is made twice. Only if the keys of a single head exceed the buffer, they come in
// parts whose results are merged by their log-sum-exp.
#include <ATen/ThreadLocalState.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <vector>

#include "kernels/call/driver.h"
#include "kernels/call/kernel_table.h"
#include "kernels/call/visible.h"
#include "ops/checks.h"
#include "ops/forms.h"
#include "ops/interrupt.h"
#include "ops/parallel.h"

namespace flashmla {
namespace {

constexpr int64_t kBufferBytes = int64_t{24} << 20;  // keys and values of a group of heads
constexpr int64_t kGatherTokens = 2048;              // latent rows dequantised at a time
constexpr int64_t kKeyMultiple = 128;                // parts begin at tiles of the kernels
constexpr int64_t kCacheLine = 64;

// Values per row of `width`: an odd number of cache lines, so that rows spread over the L1 cache.
int64_t padded_row(int64_t width, int64_t item) {
  return ((width * item + kCacheLine - 1) / kCacheLine | 1) * kCacheLine / item;
}

struct Part {
  int32_t begin, end;  // keys
  int32_t first_head, heads;
};

// Expands and attends, one sequence of a call.
class Expansion {
 public:
  Expansion(const AttentionParams& p, const Projections& w)
      : p_(p),
        w_(w),
        type_(std::string_view(expanded_arithmetic(p.q_type)) == "bf16"
                  ? product_type(at::kBFloat16, p.cache.latent)
                  : at::kFloat),
        item_(type_ == at::kFloat ? 4 : 2),
        nope_(w.nope),
        value_(w.value),
        key_row_(padded_row(nope_, item_)),
        rope_row_(padded_row(p.cache.rope, item_)),
        value_row_(padded_row(value_, item_)) {}

  void attend(int32_t sequence) {
    const AttentionParams one = of_sequences(p_, sequence, sequence + 1);
    const QueryTokens tokens = query_tokens(one, 0);
    if (tokens.count == 0) return;
    KeyRange keys = visible_keys(one, 0, 0, tokens.count);
    keys.begin = static_cast<int32_t>(keys.begin / kKeyMultiple * kKeyMultiple);
    const int64_t count = keys.end - keys.begin;
    const int64_t key_bytes = (key_row_ + value_row_) * item_;
    const int64_t fit = kBufferBytes / (key_bytes * std::max<int64_t>(count, 1));
    const int64_t groups = fit == 0 ? p_.heads : (p_.heads + fit - 1) / fit;
    const int64_t part =
        fit == 0 ? std::max(kBufferBytes / key_bytes, kKeyMultiple) / kKeyMultiple * kKeyMultiple
                 : count;
    for (int64_t g = 0; g < groups && !interrupted(); ++g) {
      const auto first = static_cast<int32_t>(p_.heads * g / groups),
                 last = static_cast<int32_t>(p_.heads * (g + 1) / groups);
      if (count <= part) {
        attend_part(one, {keys.begin, keys.end, first, last - first}, nullptr);
      } else {
        attend_parts(one, keys, static_cast<int32_t>(part), first, last - first);
      }
    }
  }

 private:
  // Makes the keys and values of a part.
  void expand(const AttentionParams& one, const Part& part) {
    const int64_t count = part.end - part.begin, latent = p_.cache.latent;
    make_buffer(keys_, part.heads, count, key_row_);
    make_buffer(values_, part.heads, count, value_row_);
    make_buffer(rope_, 1, count, rope_row_);
    const int64_t chunk = std::min(count, kGatherTokens), width = latent + p_.cache.rope;
    if (!rows_.defined() || rows_.size(0) < chunk) {
      const int64_t memory = (chunk + kExpandedTokens - 1) / kExpandedTokens * kExpandedTokens;
      rows_ = uninitialised({memory, width}, type_);
    }
    const Tensor uk = dense_rows(w_.uk().narrow(0, part.first_head, part.heads).to(type_));
    const Tensor uv = dense_rows(w_.uv().narrow(0, part.first_head, part.heads).to(type_));
    for (int64_t at = 0; at < count && !interrupted(); at += chunk) {
      const int64_t n = std::min(chunk, count - at);
      GatherParams g = {};
      g.batch = 1;
      g.max_seqlen = n;
      g.begin = part.begin + at;
      g.cache = one.cache;
      g.cache_seqlens = one.cache_seqlens;
      g.out_type = float_type(type_, "rows");
      g.out = static_cast<std::byte*>(rows_.mutable_data_ptr());
      gather(g, torch_executor());
      if (p_.deterministic) {
        multiply_in_order(uk, uv, at, n);
      } else {
        multiply(uk, uv, at, n);
      }
      if (p_.cache.rope > 0) {
        rope_[0]
            .narrow(0, at, n)
            .narrow(1, 0, p_.cache.rope)
            .copy_(rows_.narrow(0, 0, n).narrow(1, latent, p_.cache.rope));
      }
    }
  }

  // Keys and values of tokens [at, at + n) of a part, whose latents are the first rows of rows_.
  void multiply(const Tensor& uk, const Tensor& uv, int64_t at, int64_t n) {
    const Tensor rows = rows_.narrow(0, 0, n).narrow(1, 0, p_.cache.latent);
    // A product per task: ATen's own threads would each get a part too small to pay.
    for_each_task(2 * uk.size(0), [&](int64_t task) {
      const int64_t h = task / 2;
      const Tensor& weight = task % 2 == 0 ? uk : uv;
      Tensor out = (task % 2 == 0 ? keys_ : values_)[h].narrow(0, at, n);
      out = out.narrow(1, 0, weight.size(1));
      at::mm_out(out, rows, weight[h].t());
    });
  }

  // The same by the kernels. What oneDNN and MKL add up in which order depends on the number of
  // threads there are, even where a product has but one.
  void multiply_in_order(const Tensor& uk, const Tensor& uv, int64_t at, int64_t n) {
    const Tensor *weights[] = {&uk, &uv}, *outputs[] = {&keys_, &values_};
    ExpansionParams halves[2] = {};
    for (size_t i = 0; i < 2; ++i) {
      ExpansionParams& e = halves[i];
      e.type = float_type(type_, "rows");
      e.heads = static_cast<int32_t>(weights[i]->size(0));
      e.width = static_cast<int32_t>(weights[i]->size(1));
      e.latent = p_.cache.latent;
      e.tokens = static_cast<int32_t>(n);
      e.rows = bytes(rows_);
      e.row_stride = rows_.stride(0) * item_;
      e.weight = weight_rows(*weights[i]);
      e.out_head_stride = outputs[i]->stride(0) * item_;
      e.out_token_stride = outputs[i]->stride(1) * item_;
      e.out = const_cast<std::byte*>(bytes(*outputs[i])) + at * e.out_token_stride;
    }
    flashmla::expand(halves, torch_executor());
  }

  // Calls task(i) for i in [0, count) on torch's threads, under the modes of the calling one (no
  // autograd, no autocast, inference mode), which ATen keeps per thread.
  template <class Task>
  static void for_each_task(int64_t count, const Task& task) {
    struct Context {
      const Task& task;
      at::ThreadLocalState modes;
    } context{task, {}};
    torch_executor().parallel_for(
        count,
        [](int64_t i, void* p) {
          const Context& c = *static_cast<Context*>(p);
          const at::ThreadLocalStateGuard modes(c.modes);
          c.task(i);
        },
        &context);
  }

  // A buffer [heads, tokens, row] that is kept while it is large enough.
  void make_buffer(Tensor& t, int64_t heads, int64_t tokens, int64_t row) {
    if (t.defined() && t.size(0) >= heads && t.size(1) >= tokens) return;
    t = Tensor();  // or both would be held for a moment
    t = uninitialised({heads, tokens, row}, type_);
  }

  // Rows of a buffer whose first one is the key at position `begin`.
  PagedRows rows_from(const Tensor& t, int32_t begin, bool per_head) const {
    const int64_t row = t.stride(1) * item_;
    return {const_cast<std::byte*>(bytes(t)) - begin * row, per_head ? t.stride(0) * item_ : 0,
            row};
  }

  // Keys and values of a part, as a cache of which the heads are sequences.
  CacheView expanded_cache(const AttentionParams& one, const Part& part) const {
    CacheView cache = {};
    cache.format = type_ == at::kFloat ? CacheFormat::kF32 : CacheFormat::kBf16;
    cache.latent = static_cast<int32_t>(nope_);
    cache.rope = one.cache.rope;
    cache.value = static_cast<int32_t>(value_);
    cache.kv_c = rows_from(keys_, part.begin, true);
    cache.k_pe = rows_from(rope_, part.begin, false);
    cache.v = rows_from(values_, part.begin, true);
    cache.block_size = std::max(one.cache_seqlens[0], 1);
    return cache;
  }

  // Results over a part of the keys, without sink.
  struct Partial {
    Tensor out;  // f32 [heads, Sq, V]
    Tensor lse;  // f32 [heads, Sq]

    QueryRows rows() const {
      return {const_cast<std::byte*>(bytes(out)), {0, out.stride(1) * 4, out.stride(0) * 4}};
    }
  };

  // Attends to a part of the keys. Results go where the call wants them, or to `partial`.
  void attend_part(const AttentionParams& one, const Part& part, const Partial* partial) {
    expand(one, part);
    lengths_.assign(static_cast<size_t>(part.heads), one.cache_seqlens[0]);
    if (one.cache_leftpad) leftpads_.assign(static_cast<size_t>(part.heads), one.cache_leftpad[0]);
    AttentionParams p = heads_as_sequences(one, part.first_head, part.heads, lengths_.data(),
                                           one.cache_leftpad ? leftpads_.data() : nullptr);
    p.cache = expanded_cache(one, part);
    p.key_begin = part.begin;
    p.key_end = part.end;
    if (partial) {
      const QueryRows rows = partial->rows();
      p.out = {rows.data, {rows.stride[2], rows.stride[1], 0}};
      p.out_type = ScalarType::kF32;
      p.lse = partial->lse.mutable_data_ptr<float>();
      p.lse_stride[0] = partial->lse.stride(0);
      p.lse_stride[2] = 1;
      p.attn_sink = nullptr;
    }
    attention(p, thread_plan(), torch_executor());
  }

  // Attends to the keys in parts of `step`, and merges.
  void attend_parts(const AttentionParams& one, KeyRange keys, int32_t step, int32_t first_head,
                    int32_t heads) {
    const QueryTokens tokens = query_tokens(one, 0);
    auto make = [&] {
      return Partial{uninitialised({heads, tokens.count, value_}, at::kFloat),
                     uninitialised({heads, tokens.count}, at::kFloat)};
    };
    const Partial so_far = make(), next = make();
    MergeParams m = {};
    m.batch = 1;
    m.q_len = tokens.count;
    m.heads = heads;
    m.width = static_cast<int32_t>(value_);
    m.type = m.out_type = ScalarType::kF32;
    m.out_a = m.out = so_far.rows();
    m.out_b = next.rows();
    m.lse = so_far.lse.mutable_data_ptr<float>();
    m.lse_a = m.lse;
    m.lse_b = next.lse.const_data_ptr<float>();
    for (int64_t* stride : {m.lse_stride, m.lse_a_stride, m.lse_b_stride}) {
      stride[1] = tokens.count;
      stride[2] = 1;
    }
    attend_part(one, {keys.begin, keys.begin + step, first_head, heads}, &so_far);
    for (int64_t at = int64_t{keys.begin} + step; at < keys.end && !interrupted(); at += step) {
      const auto begin = static_cast<int32_t>(at),
                 end = static_cast<int32_t>(std::min<int64_t>(at + step, keys.end));
      attend_part(one, {begin, end, first_head, heads}, &next);
      if (end == keys.end) {  // the result, where the call wants it
        m.out_type = one.out_type;
        m.out = one.out;
        m.out.data += tokens.begin * one.out.stride[1] + first_head * one.out.stride[2];
        m.lse = one.lse + tokens.begin * one.lse_stride[2] + first_head * one.lse_stride[1];
        std::copy(one.lse_stride, one.lse_stride + 3, m.lse_stride);
        if (one.attn_sink) m.attn_sink = one.attn_sink + first_head * one.attn_sink_stride[1];
      }
      merge_states(m, torch_executor());
    }
  }

  const AttentionParams& p_;
  const Projections& w_;
  const at::ScalarType type_;
  const int64_t item_, nope_, value_, key_row_, rope_row_, value_row_;
  Tensor rows_;                              // [chunk, L + R]: latent rows, dequantised
  Tensor keys_;                              // [heads, keys, P padded]
  Tensor rope_;                              // [1, keys, R padded]: the same for all heads
  Tensor values_;                            // [heads, keys, V padded]
  std::vector<int32_t> lengths_, leftpads_;  // [heads]
};

}  // namespace

const char* expanded_arithmetic(ScalarType q) {
  return kernels().arithmetic(q == ScalarType::kBf16 ? CacheFormat::kBf16 : CacheFormat::kF32, q);
}

void attend_expanded(const AttentionParams& p, const Projections& w) {
  Expansion expansion(p, w);
  for (int32_t b = 0; b < p.batch; ++b) expansion.attend(b);
}

}  // namespace flashmla
