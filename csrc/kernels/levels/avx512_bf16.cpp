// levels/avx512_bf16.cpp: the kernels of one level, compiled with that level's flags.
#include "kernels/simd/avx512_bf16.h"

#include "kernels/levels/level.h"

namespace flashmla {

extern const KernelTable kernels_avx512_bf16;
const KernelTable kernels_avx512_bf16 = Level<Avx512Bf16>::table("avx512_bf16");

}  // namespace flashmla
