// levels/scalar.cpp: the kernels of one level, compiled with that level's flags.
#include "kernels/simd/scalar.h"

#include "kernels/levels/level.h"

namespace flashmla {

extern const KernelTable kernels_scalar;
const KernelTable kernels_scalar = Level<Scalar>::table("scalar");

}  // namespace flashmla
