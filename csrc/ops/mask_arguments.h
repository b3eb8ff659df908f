// mask_arguments.h: attn_mask, checked, as the kernels take it.
#pragma once
#include "ops/attention_arguments.h"

namespace flashmla {

// Sets the mask of a call: where its rows are, or only the ranges of keys they leave.
void set_mask(const Tensor& attn_mask, const Queries& queries, Attention& attention);

}  // namespace flashmla
