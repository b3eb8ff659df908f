// simd/scalar.h: the vector vocabulary in portable C++ (compiler vector extensions of 4 lanes):
// runs on any CPU. The verbs are explained in simd/concept.h.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/arithmetic/numeric.h"

namespace flashmla {
namespace {

struct Scalar {
  static constexpr int kLanes = 4;
  static constexpr int kRegisters = 16;
  static constexpr bool kBf16Dot = false;
  static constexpr bool kInt8Dot = false;
  static constexpr bool kInt16Dot = false;
  typedef float Float __attribute__((vector_size(16)));
  typedef int32_t Word __attribute__((vector_size(16)));

  // Moving.
  static Float zero() { return Float{}; }
  static Float set(float x) { return Float{x, x, x, x}; }
  static Float load(const float* p) { return copy<Float>(p); }
  static void store(float* p, Float x) { __builtin_memcpy(p, &x, sizeof x); }
  static Word zero_word() { return Word{}; }
  static Word set_word(int32_t x) { return Word{x, x, x, x}; }
  static Word load_word(const void* p) { return copy<Word>(p); }
  static void store_word(void* p, Word x) { __builtin_memcpy(p, &x, sizeof x); }
  static Word broadcast_word(const void* p) { return set_word(copy<int32_t>(p)); }
  static Word as_word(Float x) { return copy<Word>(&x); }
  static Float as_float(Word x) { return copy<Float>(&x); }

  // Float arithmetic. max returns b when either operand is NaN.
  static Float add(Float a, Float b) { return a + b; }
  static Float sub(Float a, Float b) { return a - b; }
  static Float mul(Float a, Float b) { return a * b; }
  static Float div(Float a, Float b) { return a / b; }
  static Float fma(Float a, Float b, Float c) { return a * b + c; }
  static Float fma_at(Float a, const void* b, Float c) {
    return fma(a, as_float(broadcast_word(b)), c);
  }
  static Float max(Float a, Float b) { return blend(a > b, a, b); }
  static Float abs(Float a) { return as_float(as_word(a) & set_word(0x7fffffff)); }
  static Float round(Float a) {
    Float r;
    for (int i = 0; i < kLanes; ++i) r[i] = __builtin_rintf(a[i]);
    return r;
  }

  // Words.
  static Float to_float(Word x) { return __builtin_convertvector(x, Float); }
  static Word round_to_word(Float x) { return __builtin_convertvector(round(x), Word); }
  static Word bit_or(Word a, Word b) { return a | b; }
  static Word bit_xor(Word a, Word b) { return a ^ b; }
  template <int kBits>
  static Word shift_left(Word x) {
    return x << kBits;
  }

  static Float select_in_range(int32_t t, Word first, Word limit, Float a, Float b) {
    return blend((first <= t) & (limit > t), a, b);
  }
  static Float select_minus_infinity(Float x, Float a, Float b) {
    return blend(x == set(-__builtin_inff()), a, b);
  }

  // The exponent field of 2^-127 is 0: the floor gives exactly 0.
  static constexpr float kExp2Floor = -127.0f;
  static Float scale_by_exp2(Float p, Float n) {
    return p * as_float((__builtin_convertvector(n, Word) + 127) << 23);
  }

  static Float sum_lanes(const Float x[4]) {
    Float sums;
    for (int i = 0; i < 4; ++i) sums[i] = (x[i][0] + x[i][1]) + (x[i][2] + x[i][3]);
    return sums;
  }

  static void transpose(Word x[4]) {
    for (int i = 0; i < 4; ++i) {
      for (int j = 0; j < i; ++j) {
        const int32_t upper = x[j][i];
        x[j][i] = x[i][j];
        x[i][j] = upper;
      }
    }
  }

  static Float load_bf16(const void* p) { return load_each<uint16_t>(p, kLanes, bf16_to_float); }
  static Float load_f16(const void* p) { return load_each<uint16_t>(p, kLanes, f16_to_float); }
  static Float load_f16(const void* p, int count) {
    return load_each<uint16_t>(p, count, f16_to_float);
  }
  static Float load_s8(const void* p) {
    return load_each<int8_t>(p, kLanes, [](int8_t x) { return static_cast<float>(x); });
  }
  static Float load_u8(const void* p) {
    return load_each<uint8_t>(p, kLanes, [](uint8_t x) { return static_cast<float>(x); });
  }
  static void store_bf16(void* p, Float x) { store_each(p, x, float_to_bf16); }
  static void store_f16(void* p, Float x) { store_each(p, x, float_to_f16); }

  // 16 (4 * kLanes) packed codes: half a block, which no unpacking serves; the codecs take their
  // scalar form.
  static constexpr int kBytes = 16;

  static void prefetch(const void* p) { __builtin_prefetch(p); }

 private:
  template <class T>
  static T copy(const void* p) {
    T x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
  }
  static Float blend(Word mask, Float a, Float b) {
    return as_float((as_word(a) & mask) | (as_word(b) & ~mask));
  }
  template <class T, class Convert>
  static Float load_each(const void* p, int count, Convert convert) {
    Float r = {};
    for (int i = 0; i < count; ++i)
      r[i] = convert(copy<T>(static_cast<const char*>(p) + i * sizeof(T)));
    return r;
  }
  template <class Convert>
  static void store_each(void* p, Float x, Convert convert) {
    for (int i = 0; i < kLanes; ++i) {
      const uint16_t y = convert(x[i]);
      __builtin_memcpy(static_cast<char*>(p) + 2 * i, &y, 2);
    }
  }
};

}  // namespace
}  // namespace flashmla
