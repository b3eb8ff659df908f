// simd/avx512_bf16.h: the AVX-512 vocabulary plus the bf16 dot product.
#pragma once
#include "kernels/simd/avx512.h"

namespace flashmla {
namespace {

struct Avx512Bf16 : Avx512 {
  static constexpr bool kBf16Dot = true;

  static Float dot_bf16(Float sum, Word a, Word b) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  static Float dot_bf16_at(Float sum, Word a, const void* b) {
    asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(a), "m"(word_at(b)));
    return sum;
  }
  // Words of (low, high) bf16 pairs, lane by lane.
  static Word pair_bf16(Float low, Float high) {
    const Word both = reinterpret_cast<Word>(_mm512_cvtne2ps_pbh(high, low));
    const Word order =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                         23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, both);
  }
  // The instruction takes subnormals for 0.
  static void store_bf16(void* p, Float x) {
    constexpr int kSubnormal = 0x20;
    if (_mm512_fpclass_ps_mask(x, kSubnormal) != 0) [[unlikely]]
      return Avx512::store_bf16(p, x);
    _mm256_storeu_si256(static_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
  }
};

}  // namespace
}  // namespace flashmla
