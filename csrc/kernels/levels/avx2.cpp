// levels/avx2.cpp: the kernels of one level, compiled with that level's flags.
#include "kernels/simd/avx2.h"

#include "kernels/levels/level.h"

namespace flashmla {

extern const KernelTable kernels_avx2;
const KernelTable kernels_avx2 = Level<Avx2>::table("avx2");

}  // namespace flashmla
