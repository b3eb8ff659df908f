// isa.cpp: which instruction set the kernels use, for torch_flash_mla.cpu_isa(), available_isas()
// and force_isa(); how it computes and what it could reach, for the benchmark.
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <atomic>

#include "kernels/call/kernel_table.h"
#include "kernels/formats/formats.h"
#include "kernels/levels/dispatch.h"
#include "ops/checks.h"
#include "ops/ops.h"
#include "ops/parallel.h"

namespace flashmla {
namespace {

ArithmeticId arithmetic_id(std::string_view name) {
  if (name == "f32") return ArithmeticId::kF32;
  if (name == "bf16") return ArithmeticId::kBf16;
  if (name == "int16") return ArithmeticId::kInt16;
  if (name == "int8") return ArithmeticId::kInt8;
  TORCH_CHECK_VALUE(false, "arithmetic: \"", name, "\", expected f32, bf16, int16 or int8");
}

}  // namespace

std::string isa() { return isa_name(); }

std::vector<std::string> isas() {
  std::vector<std::string> available;
  for (const char* const* name = isa_names(); *name != nullptr; ++name) {
    if (isa_available(*name)) available.emplace_back(*name);
  }
  return available;
}

void set_isa(std::string_view name) {
  if (force_isa(std::string(name).c_str())) return;
  TORCH_CHECK_VALUE(false, "name: \"", name,
                    "\" is no instruction set that this build and machine can run, expected ",
                    isa_list());
}

std::string compiler() { return kernel_compiler(); }

std::string arithmetic(std::string_view kv_cache_dtype, at::ScalarType q) {
  const FormatInfo* info = find_format(kv_cache_dtype.data(), kv_cache_dtype.size());
  TORCH_CHECK_VALUE(info != nullptr, "kv_cache_dtype: \"", kv_cache_dtype,
                    "\", expected float32, bfloat16, float16 or a packed format");
  return kernels().arithmetic(info->format, float_type(q, "q"));
}

int64_t row_bytes(std::string_view kv_cache_dtype, int64_t latent_dim, int64_t rope_dim) {
  const FormatInfo* info = find_format(kv_cache_dtype.data(), kv_cache_dtype.size());
  TORCH_CHECK_VALUE(info != nullptr && info->packed, "kv_cache_dtype: \"", kv_cache_dtype,
                    "\", expected a packed format");
  const int32_t latent = check_width(latent_dim, "latent_dim", 1);
  const int32_t rope = check_width(rope_dim, "rope_dim", 0);
  TORCH_CHECK_VALUE(latent % info->multiple == 0 && rope % info->multiple == 0,
                    "kv_cache_dtype: ", info->name, " packs multiples of ", info->multiple,
                    " values, but latent_dim is ", latent, " and rope_dim ", rope);
  return info->row_bytes(latent, rope);
}

double roof(std::string_view arithmetic, int64_t iterations) {
  struct Context {
    ArithmeticId arithmetic;
    int64_t iterations;
    std::atomic<int64_t> flop = 0;
  } context{arithmetic_id(arithmetic), iterations};
  const Executor executor = torch_executor();
  executor.parallel_for(
      executor.workers,
      [](int64_t, void* p) {
        Context& c = *static_cast<Context*>(p);
        c.flop += kernels().spin(c.arithmetic, c.iterations);
      },
      &context);
  return static_cast<double>(context.flop);
}

std::tuple<Tensor, Tensor> allocate(
    const Tensor& q, const Tensor& /*kv_cache*/, const OptionalTensor& /*block_table*/,
    const Tensor& /*cache_seqlens*/, int64_t head_dim_v, double /*softmax_scale*/, bool /*causal*/,
    const OptionalTensor& /*attn_mask*/, const OptionalTensor& /*cache_leftpad*/,
    const OptionalTensor& /*indices*/, const OptionalTensor& /*topk_length*/,
    const OptionalTensor& /*attn_sink*/, const OptionalTensor& /*q_pe*/,
    const OptionalTensor& /*k_pe_cache*/, int64_t /*window*/, std::string_view /*kv_cache_dtype*/,
    const OptionalTensor& /*cu_seqlens_q*/) {
  return {at::empty({q.size(0), q.size(1), q.size(2), head_dim_v}, q.options()),
          at::empty({q.size(0), q.size(2), q.size(1)}, q.options().dtype(at::kFloat))};
}

void append_nothing(const Tensor& /*kv_c*/, const Tensor& /*k_pe*/, const Tensor& /*kv_cache*/,
                    const Tensor& /*slot_mapping*/, std::string_view /*kv_cache_dtype*/,
                    const OptionalTensor& /*k_pe_cache*/) {}

}  // namespace flashmla
