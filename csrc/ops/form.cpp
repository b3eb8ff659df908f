// form.cpp: which form of mla_attention_kv_b costs less.
#include <string_view>

#include "kernels/call/kernel_table.h"
#include "kernels/call/visible.h"
#include "ops/forms.h"

namespace flashmla {

// The model: microseconds of one core, of which only ratios matter. Rates were measured with
// `bench prefill --forms all` on one core of a Zen 4 server; between instruction sets and machines
// they move together.
namespace {

// GFLOP/s of the attention kernels, by the arithmetic that they compute in.
double kernel_rate(std::string_view arithmetic) {
  if (arithmetic == "bf16") return 205;
  if (arithmetic == "int8") return 385;
  if (arithmetic == "int16") return 180;
  return 103;
}

// GFLOP/s of ATen's products, by the dtype of keys and values.
double product_rate(std::string_view arithmetic) { return arithmetic == "bf16" ? 190 : 85; }

constexpr double kPerHead = 20;  // what expanding the keys of a head costs beside its flop

// Rows fill whole vectors.
double padded(int64_t rows) { return static_cast<double>((rows + 15) / 16 * 16); }

}  // namespace

// Few tokens read the weight at the pace of memory. A token takes 2 L (P + V) flop of each head at
// the rate of f32 (10 us on 16 heads of DeepSeek-V2-Lite, whose weight is read in 140 us), so many
// are better off with a matrix product, which in bf16 first copies the weight.
bool streams_projections(int64_t tokens, ScalarType type) {
  return tokens <= (type == ScalarType::kBf16 ? 20 : 40);
}

Form cheaper_form(const AttentionParams& p, int32_t sequence, const Projections& w) {
  const QueryTokens tokens = query_tokens(p, sequence);
  // Each query token would have to save its share of expanding every key.
  constexpr int32_t kFewest = 32;
  if (tokens.count < kFewest) return Form::kAbsorbed;

  auto visible = [&](int32_t token) {
    const KeyRange keys = visible_to_token(p, sequence, token);
    return static_cast<double>(keys.end - keys.begin);
  };
  // Keys that a token sees on average: Simpson's rule, exact without masks.
  const double average =
      (visible(0) + 4 * visible(tokens.count / 2) + visible(tokens.count - 1)) / 6;
  const KeyRange keys = visible_keys(p, sequence, 0, tokens.count);
  const double latent = p.cache.latent, rope = p.cache.rope, heads = p.heads;
  const double projections = 2 * heads * latent * (w.nope + w.value);  // flop per token or key
  const char* expanded_in = expanded_arithmetic(p.q_type);
  const double product = product_rate(expanded_in) * 1e3;  // flop per microsecond

  const double absorbed = 2 * padded(heads * tokens.count) * average * (2 * latent + rope) /
                              (kernel_rate(kernels().arithmetic(p.cache.format, p.q_type)) * 1e3) +
                          tokens.count * projections / product;
  const double expanded = 2 * heads * padded(tokens.count) * average * (w.nope + rope + w.value) /
                              (kernel_rate(expanded_in) * 1e3) +
                          (keys.end - keys.begin) * projections / product + heads * kPerHead;
  return expanded < absorbed ? Form::kExpanded : Form::kAbsorbed;
}

}  // namespace flashmla
