// simd/avx2.h: the vector vocabulary on AVX2 with FMA and F16C: 8 lanes of 32 bits. The verbs are
// explained in simd/concept.h.
#pragma once
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace flashmla {
namespace {

struct Avx2 {
  static constexpr int kLanes = 8;
  static constexpr int kRegisters = 16;
  static constexpr bool kBf16Dot = false;
  static constexpr bool kInt8Dot = false;
  static constexpr bool kInt16Dot = true;
  using Float = __m256;
  using Word = __m256i;

  // Moving.
  static Float zero() { return _mm256_setzero_ps(); }
  static Float set(float x) { return _mm256_set1_ps(x); }
  static Float load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Float x) { _mm256_storeu_ps(p, x); }
  static Word zero_word() { return _mm256_setzero_si256(); }
  static Word set_word(int32_t x) { return _mm256_set1_epi32(x); }
  static Word load_word(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  }
  static void store_word(void* p, Word x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
  static Word broadcast_word(const void* p) {
    int32_t x;
    __builtin_memcpy(&x, p, 4);
    return _mm256_set1_epi32(x);
  }
  static Word as_word(Float x) { return _mm256_castps_si256(x); }
  static Float as_float(Word x) { return _mm256_castsi256_ps(x); }

  // Float arithmetic. max returns b when either operand is NaN.
  static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  static Float sub(Float a, Float b) { return _mm256_sub_ps(a, b); }
  static Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static Float div(Float a, Float b) { return _mm256_div_ps(a, b); }
  static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static Float fma_at(Float a, const void* b, Float c) {
    return fma(a, as_float(broadcast_word(b)), c);
  }
  static Float max(Float a, Float b) { return _mm256_max_ps(a, b); }
  static Float abs(Float a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  static Float round(Float a) {
    return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }

  static Float exponent(Float x) {
    const Word biased = _mm256_srli_epi32(_mm256_castps_si256(x), 23);
    const Float e = _mm256_cvtepi32_ps(_mm256_sub_epi32(biased, _mm256_set1_epi32(127)));
    return _mm256_add_ps(e, _mm256_sub_ps(x, x));  // NaN for NaN
  }
  static Float mantissa(Float x) {
    const Float one = _mm256_set1_ps(1.0f);
    const Float fraction = _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_set1_epi32(0x007fffff)));
    return _mm256_or_ps(fraction, one);
  }

  // Words.
  static Float to_float(Word x) { return _mm256_cvtepi32_ps(x); }
  static Word round_to_word(Float x) { return _mm256_cvtps_epi32(x); }
  static Word add_word(Word a, Word b) { return _mm256_add_epi32(a, b); }
  static Word bit_or(Word a, Word b) { return _mm256_or_si256(a, b); }
  static Word bit_xor(Word a, Word b) { return _mm256_xor_si256(a, b); }
  template <int kBits>
  static Word shift_left(Word x) {
    return _mm256_slli_epi32(x, kBits);
  }

  static Float select_in_range(int32_t t, Word first, Word limit, Float a, Float b) {
    const Word at = _mm256_set1_epi32(t);
    const Word in =
        _mm256_andnot_si256(_mm256_cmpgt_epi32(first, at), _mm256_cmpgt_epi32(limit, at));
    return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(in));
  }
  static Float select_minus_infinity(Float x, Float a, Float b) {
    return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, _mm256_set1_ps(-__builtin_inff()), _CMP_EQ_OQ));
  }

  // The exponent field of 2^-127 is 0: the floor gives exactly 0.
  static constexpr float kExp2Floor = -127.0f;
  static Float scale_by_exp2(Float p, Float n) {
    const Word biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23)));
  }

  static Word dot_s16(Word sum, Word a, Word b) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
  }
  static Word dot_s16_at(Word sum, Word a, const void* b) {
    return dot_s16(sum, a, broadcast_word(b));
  }

  static void interleave16(Word a, Word b, Word out[2]) {
    out[0] = _mm256_unpacklo_epi16(a, b);
    out[1] = _mm256_unpackhi_epi16(a, b);
  }
  static void interleave8(Word a, Word b, Word c, Word d, Word out[4]) {
    const Word ab0 = _mm256_unpacklo_epi8(a, b), ab1 = _mm256_unpackhi_epi8(a, b);
    const Word cd0 = _mm256_unpacklo_epi8(c, d), cd1 = _mm256_unpackhi_epi8(c, d);
    out[0] = _mm256_unpacklo_epi16(ab0, cd0);
    out[1] = _mm256_unpackhi_epi16(ab0, cd0);
    out[2] = _mm256_unpacklo_epi16(ab1, cd1);
    out[3] = _mm256_unpackhi_epi16(ab1, cd1);
  }
  static void restore16(Float v[2]) {
    const Float a = _mm256_permute2f128_ps(v[0], v[1], 0x20);
    v[1] = _mm256_permute2f128_ps(v[0], v[1], 0x31);
    v[0] = a;
  }
  static void restore8(Float v[4]) {
    const Float a = _mm256_permute2f128_ps(v[0], v[1], 0x20),
                b = _mm256_permute2f128_ps(v[2], v[3], 0x20);
    const Float c = _mm256_permute2f128_ps(v[0], v[1], 0x31),
                d = _mm256_permute2f128_ps(v[2], v[3], 0x31);
    v[0] = a;
    v[1] = b;
    v[2] = c;
    v[3] = d;
  }

  static Float sum_lanes(const Float x[8]) {
    const Float a = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
    const Float b = _mm256_hadd_ps(_mm256_hadd_ps(x[4], x[5]), _mm256_hadd_ps(x[6], x[7]));
    return add(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  }

  static void transpose(Word x[8]) {
    Word t[8];
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_epi32(x[i], x[i + 1]);
      t[i + 1] = _mm256_unpackhi_epi32(x[i], x[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      x[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
      x[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
      x[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
      x[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
      const Word a = x[i], b = x[i + 4];
      x[i] = _mm256_permute2x128_si256(a, b, 0x20);
      x[i + 4] = _mm256_permute2x128_si256(a, b, 0x31);
    }
  }

  static Float load_bf16(const void* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load128(p)), 16));
  }
  static Float load_f16(const void* p) { return _mm256_cvtph_ps(load128(p)); }
  static Float load_f16(const void* p, int count) {
    alignas(16) uint16_t part[8] = {};
    for (int i = 0; i < count; ++i)
      __builtin_memcpy(part + i, static_cast<const char*>(p) + 2 * i, 2);
    return load_f16(part);
  }
  static Float load_s8(const void* p) {
    return _mm256_cvtepi32_ps(
        _mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))));
  }
  static Float load_u8(const void* p) {
    return _mm256_cvtepi32_ps(
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))));
  }
  static void store_bf16(void* p, Float x) {
    const Word w = _mm256_castps_si256(x);
    const Word odd = _mm256_and_si256(_mm256_srli_epi32(w, 16), _mm256_set1_epi32(1));
    Word r = _mm256_add_epi32(w, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    r = _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc00000),
                           as_word(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
    r = _mm256_srli_epi32(r, 16);
    r = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08);
    _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_castsi256_si128(r));
  }
  static void store_f16(void* p, Float x) {
    _mm_storeu_si128(static_cast<__m128i*>(p),
                     _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static void store_s8(void* p, Word x) {
    const __m128i s16 = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    _mm_storel_epi64(static_cast<__m128i*>(p), _mm_packs_epi16(s16, s16));
  }

  static void store_s16(void* p, Word x) {
    _mm_storeu_si128(static_cast<__m128i*>(p),
                     _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)));
  }

  static uint32_t largest_of_eight(const void* p) {
    const __m128i flipped = _mm_xor_si128(load128(p), _mm_set1_epi32(-1));
    return ~static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_minpos_epu16(flipped))) & 0xffff;
  }

  static Word widen8(const void* p, int flip) {
    return _mm256_cvtepi8_epi16(_mm_xor_si128(load128(p), _mm_set1_epi8(static_cast<char>(flip))));
  }
  template <int kShift>
  static Word rescale16(Word codes, const int32_t* factor) {
    return _mm256_mulhrs_epi16(_mm256_slli_epi16(codes, kShift), broadcast_word(factor));
  }

  // 32 (4 * kLanes) packed codes: one block of 32.
  static constexpr int kBytes = 32;
  static Word unpack4(const std::byte* nibbles) {
    const Word n = _mm256_broadcastsi128_si256(load128(nibbles));
    return _mm256_and_si256(_mm256_srlv_epi64(n, _mm256_set_epi64x(4, 4, 0, 0)),
                            _mm256_set1_epi8(15));
  }
  static Word unpack6(const std::byte* nibbles, const std::byte* high) {
    int64_t bits;
    __builtin_memcpy(&bits, high, 8);
    Word h = _mm256_srlv_epi64(_mm256_set1_epi64x(bits), _mm256_set_epi64x(6, 4, 2, 0));
    h = _mm256_slli_epi16(_mm256_and_si256(h, _mm256_set1_epi8(3)), 4);
    return _mm256_sub_epi8(_mm256_or_si256(unpack4(nibbles), h), _mm256_set1_epi8(32));
  }
  static Word look_up4(const std::byte* nibbles, const int8_t table[16]) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load128(table)), unpack4(nibbles));
  }
  static Word rescale8(Word codes, const int32_t* factor) {
    const Word f = broadcast_word(factor), zero = _mm256_setzero_si256();
    const Word low = _mm256_mulhrs_epi16(_mm256_unpacklo_epi8(zero, codes), f);
    const Word high = _mm256_mulhrs_epi16(_mm256_unpackhi_epi8(zero, codes), f);
    return _mm256_packs_epi16(low, high);
  }

  static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

 private:
  static __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
};

}  // namespace
}  // namespace flashmla
