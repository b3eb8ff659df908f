// simd/avx2_vnni.h: the AVX2 vocabulary plus the 8-bit dot product of AVX-VNNI, in either of the
// encodings that this instruction has.
#pragma once
#include "kernels/simd/avx2.h"

namespace flashmla {
namespace {

struct Avx2Vnni : Avx2 {
  static constexpr bool kInt8Dot = true;

  static Word dot_u8s8(Word sum, Word u8, Word s8) {
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(u8), "x"(s8));
    return sum;
  }
};

// The same on CPUs that have the instruction in its AVX-512VL encoding alone: there it stands in
// for Avx2Vnni in tests.
struct Avx2VnniEvex : Avx2Vnni {
  static Word dot_u8s8(Word sum, Word u8, Word s8) {
    asm("%{evex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(u8), "x"(s8));
    return sum;
  }
};

}  // namespace
}  // namespace flashmla
