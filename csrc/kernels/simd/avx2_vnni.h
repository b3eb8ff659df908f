// simd/avx2_vnni.h: the AVX2 vocabulary plus the 8-bit dot product of AVX-VNNI.
#pragma once
#include "kernels/simd/avx2.h"

namespace flashmla {
namespace {

struct Avx2Vnni : Avx2 {
  static constexpr bool kInt8Dot = true;

  static Word dot_u8s8(Word sum, Word u8, Word s8) {
#ifdef FLASHMLA_AVX2_VNNI_EVEX
    // The same instruction in its AVX-512VL encoding: tests of this level on machines that lack the
    // VEX form.
    asm("%{evex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(u8), "x"(s8));
#else
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(u8), "x"(s8));
#endif
    return sum;
  }
};

}  // namespace
}  // namespace flashmla
