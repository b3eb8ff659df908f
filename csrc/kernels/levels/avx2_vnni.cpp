// levels/avx2_vnni.cpp: the kernels of one level, compiled with that level's flags.
#include "kernels/simd/avx2_vnni.h"

#include "kernels/levels/level.h"

namespace flashmla {

extern const KernelTable kernels_avx2_vnni;
const KernelTable kernels_avx2_vnni = Level<Avx2Vnni>::table("avx2_vnni");

}  // namespace flashmla
