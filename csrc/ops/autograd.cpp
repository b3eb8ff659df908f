// autograd.cpp: gradients of the two attention operators. A call that needs none passes on to the
// kernels right away; one that does is recorded, and its backward pass is the operator
// _mla_attention_backward, which torch_flash_mla/_autograd.py implements.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/ops.h"

namespace flashmla {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Results = std::tuple<Tensor, Tensor>;

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// A tensor that the backward pass will need, before anything is computed.
void check_recordable(const OptionalTensor& t, const char* name) {
  TORCH_CHECK(!t.has_value() || t->defined(), name, ": undefined tensor");
  TORCH_CHECK(
      !t.has_value() || !t->is_inference(), name,
      ": an inference tensor, which cannot be saved for the backward pass; clone it outside "
      "inference mode, or call under torch.no_grad()");
}

bool requires_grad(const Tensor& t) { return t.requires_grad(); }
bool requires_grad(const OptionalTensor& t) { return t.has_value() && t->requires_grad(); }

// Forward mode has no formula: without this check, results would silently have no tangent.
void refuse_tangent(const Tensor& t) {
  TORCH_CHECK_NOT_IMPLEMENTED(!t.defined() || !t._fw_grad(/*level=*/0).defined(),
                              "forward-mode gradients (jvp) of attention are not implemented; "
                              "use reverse mode (backward, torch.autograd.grad)");
}
void refuse_tangent(const OptionalTensor& t) {
  if (t.has_value()) refuse_tangent(*t);
}

template <class... Tensors>
bool records(const Tensors&... tensors) {
  (refuse_tangent(tensors), ...);
  return c10::GradMode::is_enabled() && (requires_grad(tensors) || ...);
}

// What the backward pass needs besides the tensors that have gradients.
struct Rest {
  const OptionalTensor& block_table;
  const Tensor& cache_seqlens;
  int64_t head_dim_v;
  double softmax_scale;
  bool causal;
  const OptionalTensor& attn_mask;
  const OptionalTensor& cache_leftpad;
  const OptionalTensor& indices;
  const OptionalTensor& topk_length;
  int64_t window;
  std::string_view kv_cache_dtype;
  const OptionalTensor& cu_seqlens_q;
};

void check_recordable(const Tensor& q, const Tensor& kv_cache, const OptionalTensor& w_kv_b,
                      const OptionalTensor& attn_sink, const OptionalTensor& q_pe,
                      const OptionalTensor& k_pe_cache, const Rest& rest) {
  check_recordable(q, "q");
  check_recordable(kv_cache, "kv_cache");
  check_recordable(w_kv_b, "w_kv_b");
  check_recordable(attn_sink, "attn_sink");
  check_recordable(q_pe, "q_pe");
  check_recordable(k_pe_cache, "k_pe_cache");
  check_recordable(rest.block_table, "block_table");
  check_recordable(rest.cache_seqlens, "cache_seqlens");
  check_recordable(rest.attn_mask, "attn_mask");
  check_recordable(rest.cache_leftpad, "cache_leftpad");
  check_recordable(rest.indices, "indices");
  check_recordable(rest.topk_length, "topk_length");
  check_recordable(rest.cu_seqlens_q, "cu_seqlens_q");
}

struct MlaAttention : torch::autograd::Function<MlaAttention> {
  static constexpr bool is_traceable = true;  // by compiled autograd

  // Tensors that have gradients, in the order of _mla_attention_backward's results.
  static constexpr int kDifferentiable = 6;

  template <class Call>
  static variable_list forward(AutogradContext* context, const Tensor& q, const Tensor& kv_cache,
                               const OptionalTensor& w_kv_b, const OptionalTensor& attn_sink,
                               const OptionalTensor& q_pe, const OptionalTensor& k_pe_cache,
                               const Rest& rest, const Call& call) {
    TORCH_CHECK(!requires_grad(rest.attn_mask),
                "attn_mask: requires grad, but the operator has no gradient for it; pass "
                "attn_mask.detach()");
    auto [out, lse] = call();
    auto given = [](const OptionalTensor& t) { return t.value_or(Tensor()); };
    context->set_materialize_grads(false);
    context->save_for_backward({q, kv_cache, given(w_kv_b), given(attn_sink), given(q_pe),
                                given(k_pe_cache), given(rest.block_table), rest.cache_seqlens,
                                given(rest.attn_mask), given(rest.cache_leftpad),
                                given(rest.indices), given(rest.topk_length),
                                given(rest.cu_seqlens_q)});
    context->saved_data["head_dim_v"] = rest.head_dim_v;
    context->saved_data["softmax_scale"] = rest.softmax_scale;
    context->saved_data["causal"] = rest.causal;
    context->saved_data["window"] = rest.window;
    context->saved_data["kv_cache_dtype"] = std::string(rest.kv_cache_dtype);
    return {std::move(out), std::move(lse)};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    using T = const Tensor&;
    using O = const OptionalTensor&;
    using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
    static const auto op =
        find<Gradients(O, O, T, T, O, T, O, int64_t, double, bool, O, O, O, O, O, O, O, int64_t,
                       std::string_view, O, c10::List<bool>)>("flashmla::_mla_attention_backward");
    const variable_list saved = context->get_saved_variables();
    auto given = [](const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; };
    c10::List<bool> needs;
    size_t edge = 0;  // of tensors that were given
    for (size_t i = 0; i < kDifferentiable; ++i) {
      needs.push_back(saved[i].defined() && context->needs_input_grad(edge));
      edge += saved[i].defined();
    }
    auto& setting = context->saved_data;
    const auto& [q, kv_cache, w_kv_b, attn_sink, q_pe, k_pe_cache] =
        op.call(given(grads[0]), given(grads[1]), saved[0], saved[1], given(saved[6]), saved[7],
                given(saved[2]), setting["head_dim_v"].toInt(), setting["softmax_scale"].toDouble(),
                setting["causal"].toBool(), given(saved[8]), given(saved[9]), given(saved[10]),
                given(saved[11]), given(saved[3]), given(saved[4]), given(saved[5]),
                setting["window"].toInt(), setting["kv_cache_dtype"].toStringView(),
                given(saved[12]), needs);
    variable_list results = {q, kv_cache, w_kv_b, attn_sink, q_pe, k_pe_cache};
    for (size_t i = 0; i < kDifferentiable; ++i) {
      if (!needs[i]) results[i] = Tensor();
    }
    results.resize(kDifferentiable + 2);  // the arguments that are no tensors
    return results;
  }
};

Results mla_attention_autograd(c10::DispatchKeySet keys, const Tensor& q, const Tensor& kv_cache,
                               const OptionalTensor& block_table, const Tensor& cache_seqlens,
                               int64_t head_dim_v, double softmax_scale, bool causal,
                               const OptionalTensor& attn_mask, const OptionalTensor& cache_leftpad,
                               const OptionalTensor& indices, const OptionalTensor& topk_length,
                               const OptionalTensor& attn_sink, const OptionalTensor& q_pe,
                               const OptionalTensor& k_pe_cache, int64_t window,
                               std::string_view kv_cache_dtype,
                               const OptionalTensor& cu_seqlens_q) {
  static const auto op = find<decltype(mla_attention)>("flashmla::mla_attention");
  auto call = [&] {
    const at::AutoDispatchBelowAutograd below;
    return op.redispatch(keys & c10::after_autograd_keyset, q, kv_cache, block_table, cache_seqlens,
                         head_dim_v, softmax_scale, causal, attn_mask, cache_leftpad, indices,
                         topk_length, attn_sink, q_pe, k_pe_cache, window, kv_cache_dtype,
                         cu_seqlens_q);
  };
  if (!records(q, kv_cache, attn_mask, attn_sink, q_pe, k_pe_cache)) return call();
  const Rest rest = {block_table, cache_seqlens, head_dim_v,     softmax_scale,
                     causal,      attn_mask,     cache_leftpad,  indices,
                     topk_length, window,        kv_cache_dtype, cu_seqlens_q};
  check_recordable(q, kv_cache, {}, attn_sink, q_pe, k_pe_cache, rest);
  const variable_list results =
      MlaAttention::apply(q, kv_cache, OptionalTensor(), attn_sink, q_pe, k_pe_cache, rest, call);
  return {results[0], results[1]};
}

Results mla_attention_kv_b_autograd(
    c10::DispatchKeySet keys, const Tensor& q, const Tensor& kv_cache,
    const OptionalTensor& block_table, const Tensor& cache_seqlens, const Tensor& w_kv_b,
    int64_t head_dim_v, double softmax_scale, bool causal, const OptionalTensor& attn_mask,
    const OptionalTensor& cache_leftpad, const OptionalTensor& indices,
    const OptionalTensor& topk_length, const OptionalTensor& attn_sink, const OptionalTensor& q_pe,
    const OptionalTensor& k_pe_cache, int64_t window, std::string_view kv_cache_dtype,
    const OptionalTensor& cu_seqlens_q, std::string_view form) {
  static const auto op = find<decltype(mla_attention_kv_b)>("flashmla::mla_attention_kv_b");
  auto call = [&] {
    const at::AutoDispatchBelowAutograd below;
    return op.redispatch(keys & c10::after_autograd_keyset, q, kv_cache, block_table, cache_seqlens,
                         w_kv_b, head_dim_v, softmax_scale, causal, attn_mask, cache_leftpad,
                         indices, topk_length, attn_sink, q_pe, k_pe_cache, window, kv_cache_dtype,
                         cu_seqlens_q, form);
  };
  if (!records(q, kv_cache, w_kv_b, attn_mask, attn_sink, q_pe, k_pe_cache)) return call();
  const Rest rest = {block_table, cache_seqlens, head_dim_v,     softmax_scale,
                     causal,      attn_mask,     cache_leftpad,  indices,
                     topk_length, window,        kv_cache_dtype, cu_seqlens_q};
  check_recordable(q, kv_cache, OptionalTensor(w_kv_b), attn_sink, q_pe, k_pe_cache, rest);
  const variable_list results = MlaAttention::apply(q, kv_cache, OptionalTensor(w_kv_b), attn_sink,
                                                    q_pe, k_pe_cache, rest, call);
  return {results[0], results[1]};
}

}  // namespace
}  // namespace flashmla

TORCH_LIBRARY_IMPL(flashmla, Autograd, m) {
  m.impl("mla_attention", &flashmla::mla_attention_autograd);
  m.impl("mla_attention_kv_b", &flashmla::mla_attention_kv_b_autograd);
}
