// checks.h: what every operator asks of its arguments before it reads or writes anything. A message
// names the argument, what came and what was expected.
#pragma once
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <limits>
#include <string>
#include <vector>

#include "kernels/call/params.h"
#include "kernels/levels/dispatch.h"

namespace flashmla {

inline int64_t item_bytes(const at::Tensor& t) { return static_cast<int64_t>(t.itemsize()); }

// In bytes. That of a dimension of one element may be anything, and no number of bytes: nobody
// steps along it.
inline int64_t byte_stride(const at::Tensor& t, int64_t d) {
  return (t.size(d) > 1 ? t.stride(d) : t.size(-1)) * item_bytes(t);
}

// Rows of queries of one sequence, and entries of an index list, are at most this many: steps
// beyond the last one still fit 32 bits.
constexpr int64_t kMostRows = int64_t{1} << 30;

inline bool is_aligned(const at::Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % t.itemsize() == 0;
}
inline at::Tensor aligned(const at::Tensor& t) { return is_aligned(t) ? t : t.clone(); }

enum class Address : uint8_t { kAligned, kAny };
constexpr Address kAnyAddress = Address::kAny;  // of what is copied before it is read

// A strided CPU tensor of numbers in memory (no lazy view of them), aligned, whose storage holds
// all of it.
inline void check_tensor(const at::Tensor& t, const char* name,
                         Address address = Address::kAligned) {
  TORCH_CHECK(t.defined(), name, ": undefined tensor");
  TORCH_CHECK(t.device().is_cpu(), name, ": on device ", t.device(), ", expected cpu");
  TORCH_CHECK_NOT_IMPLEMENTED(!t.is_nested(), name, ": a nested tensor, expected a strided one");
  TORCH_CHECK_NOT_IMPLEMENTED(t.layout() == at::kStrided && t.has_storage(), name, ": layout ",
                              t.layout(), ", expected strided");
  TORCH_CHECK(
      !t.is_conj() && !t.is_neg() && !t._is_zerotensor(), name,
      ": a lazily conjugated, negated or zero tensor, expected one in memory; resolve_conj(), "
      "resolve_neg() or clone() make one");
  if (t.numel() == 0) return;
  int64_t last = t.storage_offset();
  for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
  TORCH_CHECK((last + 1) * item_bytes(t) <= static_cast<int64_t>(t.storage().nbytes()), name,
              ": shape ", t.sizes(), " and strides ", t.strides(), " reach outside its storage of ",
              t.storage().nbytes(), " bytes");
  TORCH_CHECK(address == Address::kAny || is_aligned(t), name,
              ": its data is not aligned to elements of ", t.itemsize(), " bytes; clone() is");
}

inline void check_dtype(const at::Tensor& t, const char* name, at::ScalarType expected) {
  TORCH_CHECK_TYPE(t.scalar_type() == expected, name, ": dtype ", t.scalar_type(), ", expected ",
                   expected);
}

inline void check_same_dtype(const at::Tensor& t, const char* name, const at::Tensor& other,
                             const char* other_name) {
  TORCH_CHECK_TYPE(t.scalar_type() == other.scalar_type(), name, ": dtype ", t.scalar_type(),
                   ", expected ", other.scalar_type(), " as in ", other_name);
}

// The kernels' name of a float dtype.
inline ScalarType float_type(at::ScalarType type, const char* name) {
  switch (type) {
    case at::kFloat:
      return ScalarType::kF32;
    case at::kBFloat16:
      return ScalarType::kBf16;
    case at::kHalf:
      return ScalarType::kF16;
    default:
      TORCH_CHECK_TYPE(false, name, ": dtype ", type, ", expected Float, BFloat16 or Half");
  }
}

// `layout` spells the expected dimensions for the message, e.g. "[B, Sq, H, L]".
inline void check_rank(const at::Tensor& t, const char* name, int64_t rank, const char* layout) {
  TORCH_CHECK_VALUE(t.dim() == rank, name, ": shape ", t.sizes(), " has ", t.dim(),
                    " dimensions, expected ", layout);
}

inline void check_shape(const at::Tensor& t, const char* name, at::IntArrayRef expected,
                        const char* layout) {
  TORCH_CHECK_VALUE(t.sizes() == expected, name, ": shape ", t.sizes(), ", expected ", layout,
                    " = ", expected);
}

inline void check_rows_contiguous(const at::Tensor& t, const char* name) {
  TORCH_CHECK_VALUE(t.size(-1) <= 1 || t.stride(-1) == 1 || t.numel() == 0, name, ": strides ",
                    t.strides(), ", expected the last dimension to be contiguous (stride 1)");
}

// Of tokens or rows of one sequence.
inline int32_t check_length(int64_t value, const char* name) {
  TORCH_CHECK_VALUE(value >= 0 && value <= kMostRows, name, ": ", value, ", expected 0 to ",
                    kMostRows);
  return static_cast<int32_t>(value);
}

inline int32_t check_int32(int64_t value, const char* name) {
  TORCH_CHECK_VALUE(value >= 0 && value <= std::numeric_limits<int32_t>::max(), name, ": ", value,
                    ", expected 0 to 2147483647");
  return static_cast<int32_t>(value);
}

// Widths of the latent and the rope part: bounded so that integer dot products of a row fit 32
// bits.
inline int32_t check_width(int64_t value, const char* name, int64_t smallest) {
  constexpr int64_t kLargest = 65536;
  TORCH_CHECK_VALUE(value >= smallest && value <= kLargest, name, ": ", value, ", expected ",
                    smallest, " to ", kLargest);
  return static_cast<int32_t>(value);
}

// The levels that can run here, for messages.
inline std::string isa_list() {
  std::string names;
  for (const char* const* name = isa_names(); *name != nullptr; ++name) {
    if (isa_available(*name)) names += (names.empty() ? "" : ", ") + std::string(*name);
  }
  return names;
}

// FLASHMLA_ISA naming a level that cannot run must not pass unseen.
inline void check_environment() {
  const char* error = isa_environment_error();
  TORCH_CHECK_VALUE(error == nullptr, "FLASHMLA_ISA: ", error, ", expected ", isa_list());
}

inline const std::byte* bytes(const at::Tensor& t) {
  return static_cast<const std::byte*>(t.const_data_ptr());
}

// at::empty without its way through the dispatcher. `name` is for the message when memory runs out.
inline at::Tensor uninitialised(at::IntArrayRef shape, at::ScalarType type,
                                const char* name = "working memory") {
  try {
    return at::detail::empty_cpu(shape, type);
  } catch (const std::exception&) {  // sizes whose product overflows, too
    TORCH_CHECK_WITH(OutOfMemoryError, false, name, ": cannot allocate ", type, " of shape ",
                     shape);
  }
}

// An integer that another thread may be writing: read once, whole.
template <class T>
T read_once(const T* p) {
  return __atomic_load_n(p, __ATOMIC_RELAXED);
}

// The elements of a one-dimensional tensor, copied: what is checked here is what the kernels will
// read, whatever becomes of the tensor meanwhile.
template <class T>
std::vector<T> copied(const at::Tensor& t) {
  std::vector<T> values(static_cast<size_t>(t.size(0)));
  const at::Tensor source = aligned(t);
  const T* from = source.const_data_ptr<T>();
  const int64_t stride = source.stride(0);
  for (T& value : values) value = read_once(from), from += stride;
  return values;
}

// [H, rows, L], a part of w_kv_b.
inline WeightRows weight_rows(const at::Tensor& w) {
  return {bytes(w), {byte_stride(w, 0), byte_stride(w, 1), byte_stride(w, 2)}};
}

// [B, Sq, H, width], or ragged [T, H, width], as the kernels take it. They write through `out`
// tensors only.
inline QueryRows query_rows(const at::Tensor& t) {
  return {const_cast<std::byte*>(bytes(t)),
          {t.dim() == 4 ? byte_stride(t, 0) : 0, byte_stride(t, -3), byte_stride(t, -2)}};
}

}  // namespace flashmla
