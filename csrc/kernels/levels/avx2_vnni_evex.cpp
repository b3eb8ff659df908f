// levels/avx2_vnni_evex.cpp: the kernels of one level, compiled with that level's flags.
#include "kernels/levels/level.h"
#include "kernels/simd/avx2_vnni.h"

namespace flashmla {

extern const KernelTable kernels_avx2_vnni_evex;
const KernelTable kernels_avx2_vnni_evex = Level<Avx2VnniEvex>::table("avx2_vnni_evex");

}  // namespace flashmla
