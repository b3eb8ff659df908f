// cache_arguments.cpp: checks of cache tensors, block tables and lengths (cache_arguments.h).
#include "ops/cache_arguments.h"

#include <c10/core/GradMode.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <utility>

#include "kernels/formats/formats.h"
#include "ops/checks.h"

namespace flashmla {
namespace {

std::string format_names() {
  std::string names = "auto";
  int count = 0;
  const FormatInfo* list = format_list(&count);
  for (int i = 0; i < count; ++i) names += std::string(", ") + list[i].name;
  return names;
}

at::ScalarType storage_type(const FormatInfo& info) {
  if (info.packed) return at::kByte;
  if (info.format == CacheFormat::kF32) return at::kFloat;
  return info.format == CacheFormat::kBf16 ? at::kBFloat16 : at::kHalf;
}

const FormatInfo& resolve_format(const Tensor& kv_cache, std::string_view name) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      name != "fp8_ds_mla",
      "kv_cache_dtype: \"fp8_ds_mla\" is not implemented yet; available: ", format_names());
  if (name == "auto") {
    TORCH_CHECK_TYPE(kv_cache.scalar_type() != at::kByte,
                     "kv_cache: dtype Byte holds packed rows, whose format must be named; "
                     "kv_cache_dtype is \"auto\", expected one of ",
                     format_names());
    switch (float_type(kv_cache.scalar_type(), "kv_cache")) {
      case ScalarType::kF32:
        return format_info(CacheFormat::kF32);
      case ScalarType::kBf16:
        return format_info(CacheFormat::kBf16);
      case ScalarType::kF16:
        return format_info(CacheFormat::kF16);
    }
  }
  const FormatInfo* info = find_format(name.data(), name.size());
  TORCH_CHECK_VALUE(info != nullptr, "kv_cache_dtype: \"", name, "\" is unknown, expected one of ",
                    format_names());
  check_dtype(kv_cache, "kv_cache", storage_type(*info));
  return *info;
}

// [num_blocks, block_size, width] or [num_blocks, block_size, 1, width]
PagedRows paged_rows(const Tensor& t, const char* name, int64_t width, const char* what) {
  TORCH_CHECK_VALUE(t.dim() == 3 || (t.dim() == 4 && t.size(2) == 1), name, ": shape ", t.sizes(),
                    ", expected [num_blocks, block_size, row] or [num_blocks, block_size, 1, row]");
  TORCH_CHECK_VALUE(t.size(-1) == width, name, ": rows of ", t.size(-1), ", expected ", width, " (",
                    what, ")");
  check_rows_contiguous(t, name);
  return {const_cast<std::byte*>(bytes(t)), t.stride(0) * item_bytes(t),
          t.stride(1) * item_bytes(t)};
}

}  // namespace

Cache check_cache(const Tensor& kv_cache, const OptionalTensor& k_pe_cache,
                  std::string_view kv_cache_dtype, int64_t latent, int64_t rope, WidthNames names) {
  check_tensor(kv_cache, "kv_cache");
  const FormatInfo& info = resolve_format(kv_cache, kv_cache_dtype);
  CacheView view = {};
  view.format = info.format;
  view.latent = view.value = check_width(latent, names.latent, 1);
  view.rope = check_width(rope, names.rope, 0);
  TORCH_CHECK_VALUE(latent % info.multiple == 0 && rope % info.multiple == 0,
                    "kv_cache_dtype: ", info.name, " packs multiples of ", info.multiple,
                    " values, but the latent has ", latent, " and the rope part ", rope);
  if (k_pe_cache.has_value()) {
    check_tensor(*k_pe_cache, "k_pe_cache");
    TORCH_CHECK_VALUE(!info.packed, "k_pe_cache: given, but rows of ", info.name,
                      " hold the rope part themselves; expected None");
    check_same_dtype(*k_pe_cache, "k_pe_cache", kv_cache, "kv_cache");
    view.kv_c = paged_rows(kv_cache, "kv_cache", latent, "the latent, as k_pe_cache is given");
    view.k_pe = paged_rows(*k_pe_cache, "k_pe_cache", rope, "the rope part");
    TORCH_CHECK_VALUE(
        k_pe_cache->size(0) == kv_cache.size(0) && k_pe_cache->size(1) == kv_cache.size(1),
        "k_pe_cache: shape ", k_pe_cache->sizes(),
        ", expected the blocks of kv_cache, whose shape is ", kv_cache.sizes());
  } else if (info.packed) {
    view.kv_c = paged_rows(kv_cache, "kv_cache", info.row_bytes(view.latent, view.rope),
                           "bytes of a packed row");
    view.k_pe = view.kv_c;
  } else {
    view.kv_c = paged_rows(kv_cache, "kv_cache", latent + rope, "latent and rope part");
    view.k_pe = view.kv_c;
    view.k_pe.data += rope > 0 ? latent * item_bytes(kv_cache) : 0;
  }
  TORCH_CHECK_VALUE(kv_cache.size(1) >= 1, "kv_cache: block_size 0, expected at least 1");
  view.block_size = check_int32(kv_cache.size(1), "kv_cache.size(1), the block size");
  return {view, kv_cache.size(0)};
}

void check_cache_writable(const Tensor& cache, const char* name) {
  // Dimensions from the innermost outwards must each step over all of those inside.
  c10::SmallVector<std::pair<int64_t, int64_t>, 5> dims;  // stride, size
  for (int64_t d = 0; d < cache.dim(); ++d) {
    if (cache.size(d) != 1) dims.emplace_back(cache.stride(d), cache.size(d));
  }
  std::sort(dims.begin(), dims.end());
  int64_t inside = 1;
  for (const auto& [stride, size] : dims) {
    TORCH_CHECK(cache.numel() == 0 || stride >= inside, name, ": shape ", cache.sizes(),
                " and strides ", cache.strides(),
                " make cells share memory, so it cannot be written");
    inside = stride * (size - 1) + inside;
  }
  TORCH_CHECK(!(cache.requires_grad() && c10::GradMode::is_enabled()), name,
              ": requires grad, but writing to a cache is not recorded for gradients; write under "
              "torch.no_grad(), or to a cache that does not require grad");
}

std::byte* written_bytes(const Tensor& cache) {
  if (!cache.is_inference()) cache.unsafeGetTensorImpl()->bump_version();
  return static_cast<std::byte*>(cache.mutable_data_ptr());
}

bool may_overlap(const Tensor& a, const Tensor& b) {
  if (a.numel() == 0 || b.numel() == 0) return false;
  auto extent = [](const Tensor& t) {
    int64_t last = 0;
    for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
    const auto begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
    return std::pair(begin, begin + static_cast<uintptr_t>((last + 1) * item_bytes(t)));
  };
  const auto [a_begin, a_end] = extent(a);
  const auto [b_begin, b_end] = extent(b);
  return a_begin < b_end && b_begin < a_end;
}

Sequences check_sequences(Cache& cache, const OptionalTensor& block_table,
                          const Tensor& cache_seqlens, int64_t batch) {
  Sequences sequences;
  check_tensor(cache_seqlens, "cache_seqlens", kAnyAddress);
  check_dtype(cache_seqlens, "cache_seqlens", at::kInt);
  check_shape(cache_seqlens, "cache_seqlens", {batch}, "[B]");
  const int64_t block_size = cache.view.block_size;
  if (block_table.has_value()) {
    check_tensor(*block_table, "block_table", kAnyAddress);
    check_dtype(*block_table, "block_table", at::kInt);
    check_rank(*block_table, "block_table", 2, "[B, max_blocks]");
    TORCH_CHECK_VALUE(block_table->size(0) == batch, "block_table: shape ", block_table->sizes(),
                      ", expected [B, max_blocks] with B = ", batch);
    sequences.capacity = block_table->size(1) * block_size;
  } else {
    TORCH_CHECK_VALUE(batch <= cache.num_blocks, "kv_cache: ", cache.num_blocks,
                      " rows, expected one per sequence (", batch, ") as block_table is None");
    sequences.capacity = block_size;
  }

  sequences.cache_seqlens = copied<int32_t>(cache_seqlens);
  sequences.longest = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const int32_t length = sequences.cache_seqlens[static_cast<size_t>(b)];
    TORCH_CHECK_VALUE(length >= 0 && length <= sequences.capacity, "cache_seqlens[", b,
                      "]: ", length, ", expected 0 to ", sequences.capacity,
                      block_table.has_value() ? " (max_blocks * block_size)" : " (block_size)");
    sequences.longest = std::max(sequences.longest, length);
  }
  cache.view.block_table = nullptr;
  cache.view.block_table_stride = 0;
  if (!block_table.has_value()) return sequences;

  const int64_t columns = (sequences.longest + block_size - 1) / block_size;
  sequences.block_table.resize(static_cast<size_t>(batch * columns));
  const Tensor table = aligned(*block_table);
  const int64_t row = table.stride(0), step = table.stride(1);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t used =
        (sequences.cache_seqlens[static_cast<size_t>(b)] + block_size - 1) / block_size;
    const int32_t* from = table.const_data_ptr<int32_t>() + b * row;
    int32_t* to = sequences.block_table.data() + b * columns;
    for (int64_t i = 0; i < used; ++i) {
      const int32_t block = read_once(from + i * step);
      TORCH_CHECK_INDEX(block >= 0 && block < cache.num_blocks, "block_table[", b, "][", i,
                        "]: block ", block, ", expected 0 to ", cache.num_blocks - 1);
      to[i] = block;
    }
  }
  // The kernels tell a paged cache by the pointer, which an empty table does not have.
  static const int32_t kNothing = 0;
  cache.view.block_table = sequences.block_table.empty() ? &kNothing : sequences.block_table.data();
  cache.view.block_table_stride = columns;
  return sequences;
}

}  // namespace flashmla
