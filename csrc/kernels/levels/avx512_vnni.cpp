// levels/avx512_vnni.cpp: the kernels of one level, compiled with that level's flags.
#include "kernels/levels/level.h"
#include "kernels/simd/avx512.h"

namespace flashmla {

extern const KernelTable kernels_avx512_vnni;
const KernelTable kernels_avx512_vnni = Level<Avx512>::table("avx512_vnni");

}  // namespace flashmla
