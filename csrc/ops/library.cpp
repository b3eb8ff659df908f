// library.cpp: the operators' schemas, and which function serves each on CPU tensors. Gradients are
// registered by autograd.cpp, shapes without data (torch.compile) by torch_flash_mla/_fake.py.
//
// Arguments written to are marked (a!) and never returned. Arguments are only ever appended, with a
// default, so that saved programs keep loading; no tensor is keyword-only, which would rule out
// gradients and vmap.
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <new>
#include <stdexcept>
#include <string>
#include <utility>

#include "ops/onednn.h"
#include "ops/ops.h"

namespace {

// The schema of an operator with mla_attention's arguments and results.
std::string attention_schema(const char* name) {
  return name +
         std::string(
             "(Tensor q, Tensor kv_cache, Tensor? block_table, Tensor cache_seqlens, "
             "int head_dim_v, float softmax_scale, bool causal=False, Tensor? attn_mask=None, "
             "Tensor? cache_leftpad=None, Tensor? indices=None, Tensor? topk_length=None, "
             "Tensor? attn_sink=None, Tensor? q_pe=None, Tensor? k_pe_cache=None, int window=0, "
             "str kv_cache_dtype=\"auto\", Tensor? cu_seqlens_q=None) -> (Tensor out, Tensor lse)");
}

// The same for concat_and_cache_mla.
std::string append_schema(const char* name) {
  return name + std::string(
                    "(Tensor kv_c, Tensor k_pe, Tensor(a!) kv_cache, Tensor slot_mapping, "
                    "str kv_cache_dtype=\"auto\", Tensor(b!)? k_pe_cache=None) -> ()");
}

}  // namespace

TORCH_LIBRARY(flashmla, m) {
  m.set_python_module("torch_flash_mla._fake");

  // Attention of ready queries (absorbed form): q [B, Sq, H, L + R], or q [B, Sq, H, L] with q_pe
  // [B, Sq, H, R].
  m.def(attention_schema("mla_attention").c_str());

  // Attention of queries as the model makes them, with the latent's up-projection: chooses the
  // form.
  m.def(
      "mla_attention_kv_b(Tensor q, Tensor kv_cache, Tensor? block_table, Tensor cache_seqlens, "
      "Tensor w_kv_b, int head_dim_v, float softmax_scale, bool causal=False, "
      "Tensor? attn_mask=None, Tensor? cache_leftpad=None, Tensor? indices=None, "
      "Tensor? topk_length=None, Tensor? attn_sink=None, Tensor? q_pe=None, "
      "Tensor? k_pe_cache=None, int window=0, str kv_cache_dtype=\"auto\", "
      "Tensor? cu_seqlens_q=None, str form=\"auto\") -> (Tensor out, Tensor lse)");

  // The cache: write tokens, read them back dequantised, copy blocks.
  m.def(append_schema("concat_and_cache_mla").c_str());
  m.def(
      "gather_cache(Tensor kv_cache, Tensor? block_table, Tensor cache_seqlens, int head_dim_v, "
      "int head_dim, ScalarType dtype, str kv_cache_dtype=\"auto\", SymInt? max_seqlen=None) "
      "-> Tensor");
  m.def("copy_blocks(Tensor(a!) kv_cache, Tensor block_mapping) -> ()");

  // Two partial results over different keys become one.
  m.def(
      "merge_attn_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b, "
      "Tensor? attn_sink=None) -> (Tensor out, Tensor lse)");

  // Gradients of both attention operators, in the order q, kv_cache, w_kv_b, attn_sink, q_pe,
  // k_pe_cache; those that `needs` leaves out are empty. Implemented by
  // torch_flash_mla/_autograd.py.
  m.def(
      "_mla_attention_backward(Tensor? grad_out, Tensor? grad_lse, Tensor q, Tensor kv_cache, "
      "Tensor? block_table, Tensor cache_seqlens, Tensor? w_kv_b, int head_dim_v, "
      "float softmax_scale, bool causal, Tensor? attn_mask, Tensor? cache_leftpad, "
      "Tensor? indices, Tensor? topk_length, Tensor? attn_sink, Tensor? q_pe, "
      "Tensor? k_pe_cache, int window, str kv_cache_dtype, Tensor? cu_seqlens_q, bool[] needs) "
      "-> (Tensor, Tensor, "
      "Tensor, Tensor, Tensor, Tensor)");

  // For tests and reports: the instruction set in use, those this machine can run, forcing one (""
  // is the best), the scratch memory held by all threads, and the parallel regions begun until now.
  m.def("_isa() -> str", &flashmla::isa);
  m.def("_isas() -> str[]", &flashmla::isas);
  m.def("_force_isa(str name) -> ()", &flashmla::set_isa);
  m.def("_scratch_bytes() -> int", &flashmla::scratch_bytes);
  // For warmup: from now on every thread takes part in the calls of this one.
  m.def("_set_steps_apart(bool apart) -> ()", &flashmla::set_steps_apart);
  m.def("_parallel_regions() -> int", &flashmla::parallel_regions);

  // Bytes of one token in a packed format, for the C++ interface; Python has formats.row_bytes.
  m.def("_row_bytes(str kv_cache_dtype, int latent_dim, int rope_dim) -> int",
        &flashmla::row_bytes);

  // For tests and measurements of the level onednn: products, shapes compiled and seconds compiling
  // (of all threads); the rows from which on it makes a block's products (returns the last value).
  m.def("_onednn_stats() -> (int products, int shapes, float seconds)", &flashmla::onednn_stats);
  m.def("_set_onednn_least_rows(int rows) -> int", &flashmla::set_onednn_least_rows);

  // For the benchmark: the kernels' compiler; the arithmetic (f32, bf16, int16, int8) that computes
  // a format; the flop of its dot products on registers alone, on all threads.
  m.def("_compiler() -> str", &flashmla::compiler);
  m.def("_arithmetic(str kv_cache_dtype, ScalarType q) -> str", &flashmla::arithmetic);
  m.def("_roof(str arithmetic, int iterations) -> float", &flashmla::roof);
  // mla_attention that only allocates its results, concat_and_cache_mla that does nothing: what is
  // not theirs of the time of a call.
  m.def(attention_schema("_allocate").c_str(), &flashmla::allocate);
  m.def(append_schema("_append_nothing").c_str(), &flashmla::append_nothing);
}

namespace {

// A function as it is registered: memory that runs out says so.
template <auto kFunction>
struct Guarded;
template <class Result, class... Arguments, Result (*kFunction)(Arguments...)>
struct Guarded<kFunction> {
  static Result call(Arguments... arguments) {
    try {
      return kFunction(std::forward<Arguments>(arguments)...);
    } catch (const std::bad_alloc&) {
    } catch (const std::length_error&) {  // of a vector, before it asks for memory
    }
    TORCH_CHECK_WITH(OutOfMemoryError, false,
                     "working memory: cannot allocate what the arguments of this call take");
  }
};

// The dense tensor of the values that a lazy one stands for.
at::Tensor resolved(const at::Tensor& t) {
  if (!t.defined() || t.layout() != at::kStrided) return t;
  if (t._is_zerotensor()) return at::zeros(t.sizes(), t.options());
  return t.resolve_conj().resolve_neg();
}

// Where an argument is lazily conjugated, negated or zero: torch resolves those of an operator that
// returns new tensors, but expects one that writes to return what it has written. These resolve
// what is read, and leave it to the checks to refuse what would be written.
void concat_and_cache_mla_lazy(const at::Tensor& kv_c, const at::Tensor& k_pe,
                               const at::Tensor& kv_cache, const at::Tensor& slot_mapping,
                               std::string_view kv_cache_dtype,
                               const flashmla::OptionalTensor& k_pe_cache) {
  flashmla::concat_and_cache_mla(resolved(kv_c), resolved(k_pe), kv_cache, resolved(slot_mapping),
                                 kv_cache_dtype, k_pe_cache);
}
void copy_blocks_lazy(const at::Tensor& kv_cache, const at::Tensor& block_mapping) {
  flashmla::copy_blocks(kv_cache, resolved(block_mapping));
}

void register_lazy(torch::Library& m) {
  m.impl("concat_and_cache_mla", &Guarded<&concat_and_cache_mla_lazy>::call);
  m.impl("copy_blocks", &Guarded<&copy_blocks_lazy>::call);
}

void register_functions(torch::Library& m) {
  m.impl("mla_attention", &Guarded<&flashmla::mla_attention>::call);
  m.impl("mla_attention_kv_b", &Guarded<&flashmla::mla_attention_kv_b>::call);
  m.impl("concat_and_cache_mla", &Guarded<&flashmla::concat_and_cache_mla>::call);
  m.impl("gather_cache", &Guarded<&flashmla::gather_cache>::call);
  m.impl("copy_blocks", &Guarded<&flashmla::copy_blocks>::call);
  m.impl("merge_attn_states", &Guarded<&flashmla::merge_attn_states>::call);
}

}  // namespace

// Tensors of every backend: those of another than the CPU's own, sparse or quantised ones, reach
// the checks too, which name the argument. Shapes without data (Meta) are _fake.py's.
TORCH_LIBRARY_IMPL(flashmla, CompositeExplicitAutograd, m) { register_functions(m); }
TORCH_LIBRARY_IMPL(flashmla, NestedTensorCPU, m) { register_functions(m); }
TORCH_LIBRARY_IMPL(flashmla, NestedTensorMeta, m) { register_functions(m); }
TORCH_LIBRARY_IMPL(flashmla, AutogradNestedTensor, m) { register_functions(m); }

TORCH_LIBRARY_IMPL(flashmla, Conjugate, m) { register_lazy(m); }
TORCH_LIBRARY_IMPL(flashmla, Negative, m) { register_lazy(m); }
TORCH_LIBRARY_IMPL(flashmla, ZeroTensor, m) { register_lazy(m); }
