// ops.h: the functions behind the operators that library.cpp declares. CPU tensors in, checked, CPU
// tensors out.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

namespace flashmla {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

using AttentionOperator = std::tuple<Tensor, Tensor>(
    const Tensor& q, const Tensor& kv_cache, const OptionalTensor& block_table,
    const Tensor& cache_seqlens, int64_t head_dim_v, double softmax_scale, bool causal,
    const OptionalTensor& attn_mask, const OptionalTensor& cache_leftpad,
    const OptionalTensor& indices, const OptionalTensor& topk_length,
    const OptionalTensor& attn_sink, const OptionalTensor& q_pe, const OptionalTensor& k_pe_cache,
    int64_t window, std::string_view kv_cache_dtype, const OptionalTensor& cu_seqlens_q);
AttentionOperator mla_attention;

std::tuple<Tensor, Tensor> mla_attention_kv_b(
    const Tensor& q, const Tensor& kv_cache, const OptionalTensor& block_table,
    const Tensor& cache_seqlens, const Tensor& w_kv_b, int64_t head_dim_v, double softmax_scale,
    bool causal, const OptionalTensor& attn_mask, const OptionalTensor& cache_leftpad,
    const OptionalTensor& indices, const OptionalTensor& topk_length,
    const OptionalTensor& attn_sink, const OptionalTensor& q_pe, const OptionalTensor& k_pe_cache,
    int64_t window, std::string_view kv_cache_dtype, const OptionalTensor& cu_seqlens_q,
    std::string_view form);

using AppendOperator = void(const Tensor& kv_c, const Tensor& k_pe, const Tensor& kv_cache,
                            const Tensor& slot_mapping, std::string_view kv_cache_dtype,
                            const OptionalTensor& k_pe_cache);
AppendOperator concat_and_cache_mla;

Tensor gather_cache(const Tensor& kv_cache, const OptionalTensor& block_table,
                    const Tensor& cache_seqlens, int64_t head_dim_v, int64_t head_dim,
                    at::ScalarType dtype, std::string_view kv_cache_dtype,
                    std::optional<int64_t> max_seqlen);

void copy_blocks(const Tensor& kv_cache, const Tensor& block_mapping);

std::tuple<Tensor, Tensor> merge_attn_states(const Tensor& out_a, const Tensor& lse_a,
                                             const Tensor& out_b, const Tensor& lse_b,
                                             const OptionalTensor& attn_sink);

// Which instruction set runs (isa.cpp).
std::string isa();
std::vector<std::string> isas();
void set_isa(std::string_view name);
// How it computes and how fast it could (isa.cpp).
std::string compiler();
std::string arithmetic(std::string_view kv_cache_dtype, at::ScalarType q);
int64_t row_bytes(std::string_view kv_cache_dtype, int64_t latent_dim, int64_t rope_dim);
double roof(std::string_view arithmetic, int64_t iterations);
// The time of a call that is not theirs: the first allocates the results, the second does nothing.
AttentionOperator allocate;
AppendOperator append_nothing;

// Whether every thread takes part in the calls of this one, for warming up (parallel.cpp).
void set_steps_apart(bool apart);

// Bytes of scratch that all threads together hold; parallel regions begun until now (parallel.cpp).
int64_t scratch_bytes();
int64_t parallel_regions();

}  // namespace flashmla
