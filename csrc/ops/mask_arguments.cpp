// mask_arguments.cpp: checks of attn_mask, and its reduction to ranges of keys (mask_rows.h).
#include "ops/mask_arguments.h"

#include "kernels/call/mask_rows.h"
#include "ops/checks.h"

namespace flashmla {
namespace {

MaskType mask_type(at::ScalarType type) {
  switch (type) {
    case at::kBool:
      return MaskType::kBool;
    case at::kFloat:
      return MaskType::kF32;
    case at::kBFloat16:
      return MaskType::kBf16;
    case at::kHalf:
      return MaskType::kF16;
    default:
      TORCH_CHECK_TYPE(false, "attn_mask: dtype ", type,
                       ", expected Bool, Float, BFloat16 or Half");
  }
}

// The mask as [B or 1, H or 1, Sq or 1, S] with contiguous columns; ragged: [1, H or 1, T or 1, S].
// A copy, where columns are strided, keeps broadcast dimensions at size 1.
Tensor check_mask(const Tensor& attn_mask, const Queries& queries, int32_t longest) {
  check_tensor(attn_mask, "attn_mask", kAnyAddress);  // the kernels copy its elements
  const char* expected = queries.ragged() ? "[H, T, S]" : "[B, H, Sq, S]";
  TORCH_CHECK_VALUE(attn_mask.dim() >= 1 && attn_mask.dim() <= 4, "attn_mask: shape ",
                    attn_mask.sizes(), ", expected one broadcastable to ", expected);
  Tensor mask = attn_mask;
  while (mask.dim() < 4) mask = mask.unsqueeze(0);
  const int64_t full[3] = {queries.ragged() ? 1 : queries.q.size(0), queries.heads(),
                           queries.q.size(-3)};
  for (int64_t d = 0; d < 3; ++d) {
    TORCH_CHECK_VALUE(mask.size(d) == 1 || mask.size(d) == full[d], "attn_mask: shape ",
                      attn_mask.sizes(), ", expected one broadcastable to ", expected, " with ",
                      full[0], " sequences, ", full[1], " heads and ", full[2], " query tokens");
  }
  TORCH_CHECK_VALUE(mask.size(3) >= longest, "attn_mask: shape ", attn_mask.sizes(), " has ",
                    mask.size(3), " columns, expected at least max(cache_seqlens) = ", longest);
  if (mask.size(3) > 1 && mask.stride(3) != 1) {
    for (int64_t d = 0; d < 3; ++d) {
      if (mask.size(d) > 1 && mask.stride(d) == 0) mask = mask.narrow(d, 0, 1);
    }
    mask = mask.contiguous();
  }
  return mask;
}

// Replaces a mask that only hides keys at the ends of its rows by the ranges it leaves; one with
// holes or values gets them beside. A mask that differs between heads stays as it is.
void reduce_mask(Attention& attention) {
  AttentionParams& p = attention.params;
  const Tensor& mask = attention.attn_mask;
  if (mask.size(1) != 1) return;
  const int64_t batch = mask.size(0), tokens = mask.size(2);
  attention.key_ranges.resize(static_cast<size_t>(2 * batch * tokens));
  bool holes = false;
  int32_t* extent = attention.key_ranges.data();
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t s = 0; s < tokens; ++s, extent += 2) {
      const std::byte* row = p.mask + b * p.mask_stride[0] + s * p.mask_stride[2];
      holes |= mask_extent(p.mask_type, row, attention.sequences.longest, extent);
    }
  }
  p.key_ranges = attention.key_ranges.data();
  p.key_ranges_stride[0] = batch == 1 ? 0 : 2 * tokens;
  p.key_ranges_stride[1] = tokens == 1 ? 0 : 2;
  if (!holes) p.mask_type = MaskType::kNone;
}

}  // namespace

void set_mask(const Tensor& attn_mask, const Queries& queries, Attention& attention) {
  AttentionParams& p = attention.params;
  p.mask_type = mask_type(attn_mask.scalar_type());
  const Tensor mask = check_mask(attn_mask, queries, attention.sequences.longest);
  for (int d = 0; d < 3; ++d)
    p.mask_stride[d] = mask.size(d) == 1 ? 0 : mask.stride(d) * item_bytes(mask);
  p.mask = bytes(mask);
  attention.attn_mask = mask;
  reduce_mask(attention);
}

}  // namespace flashmla
