// operators.cpp: the operators on tensors of one's own. Two sequences of 20 tokens in a paged 8-bit
// cache; absorbed queries, and queries as a model makes them, against the same computed by hand;
// attention in two parts; a copied block; every instruction set; a mistake.
#include <ATen/ATen.h>
#include <torch_flash_mla/ops.h>

#include <cmath>
#include <cstdio>

#include "paging.h"

namespace mla = torch_flash_mla;
using at::Tensor;

namespace {

// B sequences, S tokens, H heads; widths of latent, rope, rope-free part and value of a head.
constexpr int64_t B = 2, S = 20, H = 4, L = 64, R = 32, P = 16, V = 24;
constexpr int64_t kBlockSize = 16;

// Values that every language makes alike: sin(first), sin(first + 1), ...
Tensor numbers(int first, at::IntArrayRef shape) {
  int64_t count = 1;
  for (const int64_t n : shape) count *= n;
  return at::arange(first, first + count, at::kFloat).sin_().view(shape);
}

void print(const char* name, const Tensor& t) {
  std::printf("%s:", name);
  const Tensor flat = t.flatten();
  for (int64_t i = 0; i < 6; ++i) std::printf(" %.6f", flat[i].item<float>());
  std::printf("\n");
}

// Whether two results agree as well as 8-bit rounding on the way lets them.
bool near(const char* name, const Tensor& actual, const Tensor& expected) {
  const double error = ((actual - expected).norm() / expected.norm()).item<double>();
  std::printf("%s: relative difference %.1e\n", name, error);
  return error < 0.01;
}

}  // namespace

int main() {
  const at::NoGradGuard no_grad;
  std::printf("instruction set: %s\n", mla::cpu_isa().c_str());

  // The cache: rows of L + R codes and two scales, in blocks that the two sequences share.
  Tensor kv_cache = at::empty({6, kBlockSize, mla::row_bytes("q8_kv", L, R)}, at::kByte);
  Paging paging(B, /*max_blocks=*/3, /*num_blocks=*/6, kBlockSize);
  const Tensor slots = paging.reserve(S);
  const Tensor kv_c = numbers(0, {B, S, L}), k_pe = numbers(7, {B, S, R});
  mla::concat_and_cache_mla(kv_c, k_pe, kv_cache, slots, "q8_kv");

  // One new query per sequence and head, already in the latent space.
  const double scale = 1 / std::sqrt(P + R);
  const Tensor w_kv_b = numbers(3, {H, P + V, L});
  const Tensor q_nope = numbers(11, {B, 1, H, P}), q_pe = numbers(13, {B, 1, H, R});
  const Tensor q_latent = at::einsum("bshp,hpl->bshl", {q_nope, w_kv_b.narrow(1, 0, P)});
  const auto [latent_out, lse] =
      mla::mla_attention(at::cat({q_latent, q_pe}, -1), kv_cache, paging.block_table(),
                         paging.cache_seqlens(), L, scale, {.kv_cache_dtype = "q8_kv"});
  print("latent out", latent_out);
  print("lse", lse);

  // The same query as the model makes it; the operator has the projections of the heads.
  const auto [out, same_lse] =
      mla::mla_attention_kv_b(q_nope, kv_cache, paging.block_table(), paging.cache_seqlens(),
                              w_kv_b, V, scale, {.q_pe = q_pe, .kv_cache_dtype = "q8_kv"});
  print("out", out);

  // By hand, over the rows as the cache holds them.
  const Tensor rows = mla::gather_cache(kv_cache, paging.block_table(), paging.cache_seqlens(), L,
                                        L + R, at::kFloat, "q8_kv", S);
  const Tensor query = at::cat({q_latent, q_pe}, -1);
  const Tensor p = at::einsum("bshd,bnd->bshn", {query, rows}).mul_(scale).softmax(-1);
  const Tensor o_latent = at::einsum("bshn,bnl->bshl", {p, rows.narrow(2, 0, L)});
  const Tensor by_hand = at::einsum("bshl,hvl->bshv", {o_latent, w_kv_b.narrow(1, P, V)});
  print("by hand", by_hand);

  if (!near("by hand", out, by_hand)) return 1;

  // The keys in two parts, as for a shared prefix, joined by their log-sum-exp.
  const Tensor prefix = at::full({B}, 12, at::kInt);
  const auto [out_a, lse_a] = mla::mla_attention(query, kv_cache, paging.block_table(), prefix, L,
                                                 scale, {.kv_cache_dtype = "q8_kv"});
  const auto [out_b, lse_b] =
      mla::mla_attention(query, kv_cache, paging.block_table(), paging.cache_seqlens(), L, scale,
                         {.cache_leftpad = prefix, .kv_cache_dtype = "q8_kv"});
  const auto [merged, merged_lse] = mla::merge_attn_states(out_a, lse_a, out_b, lse_b);
  if (!near("merged", merged, latent_out) || !near("merged lse", merged_lse, lse)) return 1;

  // Sequence 1 takes over the first block of sequence 0, by copy.
  const Tensor first = paging.block_table().select(1, 0).to(at::kLong);
  mla::copy_blocks(kv_cache, first.unsqueeze(0));
  const Tensor copied = mla::gather_cache(kv_cache, paging.block_table(), paging.cache_seqlens(), L,
                                          L + R, at::kFloat, "q8_kv", kBlockSize);
  if (!at::equal(copied[0], copied[1])) return 1;

  // What each instruction set of this machine makes of it.
  for (const std::string& name : mla::available_isas()) {
    mla::force_isa(name);
    const auto [with, with_lse] =
        mla::mla_attention(query, kv_cache, paging.block_table(), paging.cache_seqlens(), L, scale,
                           {.causal = true, .kv_cache_dtype = "q8_kv"});
    print(name.c_str(), with);
  }
  mla::force_isa("");

  // Mistakes arrive as exceptions that name the argument.
  try {
    mla::mla_attention(q_latent, kv_cache, paging.block_table(), paging.cache_seqlens(), L, scale,
                       {.kv_cache_dtype = "q8_kv"});
  } catch (const c10::Error& e) {
    std::printf("as expected: %s\n", e.what_without_backtrace());
    return 0;
  }
  return 1;
}
