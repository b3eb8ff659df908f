// simd/avx512.h: the vector vocabulary on AVX-512 (F, BW, DQ, VL) with VNNI: 16 lanes of 32 bits.
//
// Every simd/*.h defines the same verbs (simd/concept.h lists and explains them); the algorithms
// name only these.
#pragma once
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace flashmla {
namespace {

struct Avx512 {
  static constexpr int kLanes = 16;
  static constexpr int kRegisters = 32;
  static constexpr bool kBf16Dot = false;
  static constexpr bool kInt8Dot = true;
  static constexpr bool kInt16Dot = true;
  using Float = __m512;
  using Word = __m512i;

  // Moving.
  static Float zero() { return _mm512_setzero_ps(); }
  static Float set(float x) { return _mm512_set1_ps(x); }
  static Float load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Float x) { _mm512_storeu_ps(p, x); }
  static Word zero_word() { return _mm512_setzero_si512(); }
  static Word set_word(int32_t x) { return _mm512_set1_epi32(x); }
  static Word load_word(const void* p) { return _mm512_loadu_si512(p); }
  static void store_word(void* p, Word x) { _mm512_storeu_si512(p, x); }
  static Word broadcast_word(const void* p) {
    int32_t x;
    __builtin_memcpy(&x, p, 4);
    return _mm512_set1_epi32(x);
  }
  // The same four words in every quarter.
  static Word broadcast_quad(const void* p) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(p)));
  }
  // Lane 4 i + j: the sum of quarter i of x[j].
  static Word sum_quads(const Word x[4]) {
    const Word a =
        _mm512_add_epi32(_mm512_unpacklo_epi32(x[0], x[1]), _mm512_unpackhi_epi32(x[0], x[1]));
    const Word b =
        _mm512_add_epi32(_mm512_unpacklo_epi32(x[2], x[3]), _mm512_unpackhi_epi32(x[2], x[3]));
    return _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
  }
  static Word as_word(Float x) { return _mm512_castps_si512(x); }
  static Float as_float(Word x) { return _mm512_castsi512_ps(x); }

  // Float arithmetic. min and max return b when either operand is NaN.
  static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static Float sub(Float a, Float b) { return _mm512_sub_ps(a, b); }
  static Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Float div(Float a, Float b) { return _mm512_div_ps(a, b); }
  static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static Float fma_at(Float a, const void* b, Float c) {
    asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(c) : "v"(a), "m"(word_at(b)));
    return c;
  }
  static Float max(Float a, Float b) { return _mm512_max_ps(a, b); }
  static Float abs(Float a) { return _mm512_abs_ps(a); }
  static Float round(Float a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }

  // x = mantissa * 2^exponent, mantissa in [1, 2), for positive normal x.
  static Float exponent(Float x) { return _mm512_getexp_ps(x); }
  static Float mantissa(Float x) {
    return _mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
  }

  // Words.
  static Word add_word(Word a, Word b) { return _mm512_add_epi32(a, b); }
  static Float to_float(Word x) { return _mm512_cvtepi32_ps(x); }
  static Word round_to_word(Float x) { return _mm512_cvtps_epi32(x); }
  static Word bit_or(Word a, Word b) { return _mm512_or_si512(a, b); }
  static Word bit_xor(Word a, Word b) { return _mm512_xor_si512(a, b); }
  template <int kBits>
  static Word shift_left(Word x) {
    return _mm512_slli_epi32(x, kBits);
  }

  // a where first <= t < limit, else b.
  static Float select_in_range(int32_t t, Word first, Word limit, Float a, Float b) {
    const Word at = _mm512_set1_epi32(t);
    const __mmask16 in = _mm512_cmple_epi32_mask(first, at) & _mm512_cmplt_epi32_mask(at, limit);
    return _mm512_mask_blend_ps(in, b, a);
  }
  // a where x == -inf, else b.
  static Float select_minus_infinity(Float x, Float a, Float b) {
    const __mmask16 is = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-__builtin_inff()), _CMP_EQ_OQ);
    return _mm512_mask_blend_ps(is, b, a);
  }

  // Half of the smallest subnormal is 2^-150: the floor gives exactly 0 for every p < 2^42.
  static constexpr float kExp2Floor = -192.0f;
  static Float scale_by_exp2(Float p, Float n) { return _mm512_scalef_ps(p, n); }

  // Dot products of a 32-bit group per lane.
  // Not the intrinsics: g++ 12 spills the accumulators around them, at 40 % of the rate, and clang
  // 19 makes two instructions of the 16-bit one.
  static Word dot_u8s8(Word sum, Word u8, Word s8) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u8), "v"(s8));
    return sum;
  }
  static Word dot_s16(Word sum, Word a, Word b) {
    asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
  }
  static Word dot_s16_at(Word sum, Word a, const void* b) {
    asm("vpdpwssd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(a), "m"(word_at(b)));
    return sum;
  }

  // Interleaves of rows for a dot over tokens: lane w of the results holds one dim of all rows.
  static void interleave16(Word a, Word b, Word out[2]) {
    out[0] = _mm512_unpacklo_epi16(a, b);
    out[1] = _mm512_unpackhi_epi16(a, b);
  }
  static void interleave8(Word a, Word b, Word c, Word d, Word out[4]) {
    const Word ab0 = _mm512_unpacklo_epi8(a, b), ab1 = _mm512_unpackhi_epi8(a, b);
    const Word cd0 = _mm512_unpacklo_epi8(c, d), cd1 = _mm512_unpackhi_epi8(c, d);
    out[0] = _mm512_unpacklo_epi16(ab0, cd0);
    out[1] = _mm512_unpackhi_epi16(ab0, cd0);
    out[2] = _mm512_unpacklo_epi16(ab1, cd1);
    out[3] = _mm512_unpackhi_epi16(ab1, cd1);
  }
  // The dims of interleaved results, back in order.
  static void restore16(Float v[2]) {
    const Word lo = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    const Word hi = _mm512_set_epi32(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8);
    const Float a = _mm512_permutex2var_ps(v[0], lo, v[1]);
    v[1] = _mm512_permutex2var_ps(v[0], hi, v[1]);
    v[0] = a;
  }
  static void restore8(Float v[4]) {
    const Float a = _mm512_shuffle_f32x4(v[0], v[1], 0x44),
                b = _mm512_shuffle_f32x4(v[0], v[1], 0xee);
    const Float c = _mm512_shuffle_f32x4(v[2], v[3], 0x44),
                d = _mm512_shuffle_f32x4(v[2], v[3], 0xee);
    v[0] = _mm512_shuffle_f32x4(a, c, 0x88);
    v[1] = _mm512_shuffle_f32x4(a, c, 0xdd);
    v[2] = _mm512_shuffle_f32x4(b, d, 0x88);
    v[3] = _mm512_shuffle_f32x4(b, d, 0xdd);
  }

  // Lane i: the sum of the lanes of x[i].
  static Float sum_lanes(const Float x[16]) {
    Float quads[4];  // [i]: rows 4 i to 4 i + 3 within each quarter
    for (int i = 0; i < 4; ++i, x += 4) {
      const Word a = as_word(add(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1])));
      const Word b = as_word(add(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3])));
      quads[i] = add(as_float(_mm512_unpacklo_epi64(a, b)), as_float(_mm512_unpackhi_epi64(a, b)));
    }
    auto halve = [](Float a, Float b) {
      return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    };
    return halve(halve(quads[0], quads[1]), halve(quads[2], quads[3]));
  }

  // kLanes x kLanes words, in place.
  static void transpose(Word x[16]) {
    Word t[16];
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
      t[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
      x[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
      x[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
      x[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
      x[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
      t[i + 4] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
      t[i + 8] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
      t[i + 12] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
      x[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
      x[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
      x[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
      x[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
  }

  // kLanes values of a storage type. The `count` forms touch only the first count (< kLanes)
  // elements.
  static Float load_bf16(const void* p) { return widen_bf16(load256(p)); }
  static Float load_f16(const void* p) { return _mm512_cvtph_ps(load256(p)); }
  static Float load_f16(const void* p, int count) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), p));
  }
  static Float load_s8(const void* p) {
    return _mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
  }
  static Float load_u8(const void* p) {
    return _mm512_cvtepi32_ps(
        _mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
  }
  static void store_bf16(void* p, Float x) {
    _mm256_storeu_si256(static_cast<__m256i*>(p),
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_bf16(x), 16)));
  }
  static void store_f16(void* p, Float x) {
    _mm256_storeu_si256(static_cast<__m256i*>(p),
                        _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  // Saturates to int8.
  static void store_s8(void* p, Word x) {
    _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(x));
  }

  static void store_s16(void* p, Word x) {
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtsepi32_epi16(x));
  }

  // Of eight unsigned 16-bit values.
  static uint32_t largest_of_eight(const void* p) {
    const __m128i flipped =
        _mm_xor_si128(_mm_loadu_si128(static_cast<const __m128i*>(p)), _mm_set1_epi32(-1));
    return ~static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_minpos_epu16(flipped))) & 0xffff;
  }

  // 2 * kLanes codes as int16: bytes, flipped by xor, sign extended. Then (code << kShift) * factor
  // / 2^15, rounded; the halves of the word at `factor` both are the factor.
  static Word widen8(const void* p, int flip) {
    return _mm512_cvtepi8_epi16(
        _mm256_xor_si256(load256(p), _mm256_set1_epi8(static_cast<char>(flip))));
  }
  template <int kShift>
  static Word rescale16(Word codes, const int32_t* factor) {
    return _mm512_mulhrs_epi16(_mm512_slli_epi16(codes, kShift), broadcast_word(factor));
  }

  // 64 (4 * kLanes) packed codes: two blocks of 32.
  static constexpr int kBytes = 64;
  // Four-bit codes of two neighbouring blocks of 16 bytes: low nibbles, then high ones.
  static Word unpack4(const std::byte* nibbles) {
    return _mm512_and_si512(spread4(nibbles), _mm512_set1_epi8(15));
  }
  // Six-bit codes, minus 32: nibbles and 8 bytes of high bits per block.
  static Word unpack6(const std::byte* nibbles, const std::byte* high) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(high));
    __m512i h = _mm512_permutexvar_epi64(_mm512_set_epi64(1, 1, 1, 1, 0, 0, 0, 0),
                                         _mm512_castsi128_si512(bits));
    h = _mm512_rolv_epi64(h, _mm512_set_epi64(62, 0, 2, 4, 62, 0, 2, 4));  // to bits 4 and 5
    const Word low = _mm512_set1_epi8(15);
    const Word code = _mm512_ternarylogic_epi32(spread4(nibbles), h, low, 0xe4);  // low ? a : b
    return _mm512_sub_epi8(_mm512_and_si512(code, _mm512_set1_epi8(63)), _mm512_set1_epi8(32));
  }
  // Four-bit codes replaced by their entry of a table.
  static Word look_up4(const std::byte* nibbles, const int8_t table[16]) {
    const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(entries), unpack4(nibbles));
  }
  // code * factor / 128, rounded, as int8; a word of factors (< 4 * 128) for each of the two
  // blocks.
  static Word rescale8(Word codes, const int32_t* factors) {
    const Word f = _mm512_mask_set1_epi32(set_word(factors[0]), 0xff00, factors[1]);
    const Word zero = _mm512_setzero_si512();
    const Word low = _mm512_mulhrs_epi16(_mm512_unpacklo_epi8(zero, codes), f);
    const Word high = _mm512_mulhrs_epi16(_mm512_unpackhi_epi8(zero, codes), f);
    return _mm512_packs_epi16(low, high);
  }

  static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

 protected:
  // The word at an address, as an operand of the instructions that broadcast one: g++ 12 does not
  // fold the load of a broadcast into them, and no compiler does into assembly.
  using AliasingWord [[gnu::may_alias, gnu::aligned(1)]] = int32_t;
  static const AliasingWord& word_at(const void* p) { return *static_cast<const AliasingWord*>(p); }

 private:
  static __m256i load256(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  }
  // Bytes whose low halves are the codes of unpack4.
  static Word spread4(const std::byte* nibbles) {
    const Word n = _mm512_permutexvar_epi64(_mm512_set_epi64(3, 2, 3, 2, 1, 0, 1, 0),
                                            _mm512_castsi256_si512(load256(nibbles)));
    return _mm512_srlv_epi64(n, _mm512_set_epi64(4, 4, 0, 0, 4, 4, 0, 0));
  }
  // Into the high halves of words, by one instruction: extending and shifting are two, on the very
  // units that multiply.
  static Float widen_bf16(__m256i x) {
    const Word from = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0,  //
                                       7, 0, 6, 0, 5, 0, 4, 0, 3, 0, 2, 0, 1, 0, 0, 0);
    return _mm512_castsi512_ps(
        _mm512_maskz_permutexvar_epi16(0xaaaaaaaa, from, _mm512_castsi256_si512(x)));
  }

 protected:
  // Nearest-even bf16 in the high half of each word; NaN stays NaN.
  static Word round_bf16(Float x) {
    const Word w = _mm512_castps_si512(x);
    const Word odd = _mm512_and_si512(_mm512_srli_epi32(w, 16), _mm512_set1_epi32(1));
    const Word rounded = _mm512_add_epi32(w, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
  }
};

}  // namespace
}  // namespace flashmla
