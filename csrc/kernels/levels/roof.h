// roof.h: how fast one instruction set can multiply at all: the dot product of an arithmetic on
// registers alone. The benchmark's yardstick; no kernel uses it.
#pragma once
#include <cstdint>

#include "kernels/arithmetic/arithmetic_id.h"
#include "kernels/arithmetic/bf16.h"
#include "kernels/arithmetic/f32.h"
#include "kernels/arithmetic/int16.h"
#include "kernels/arithmetic/int8.h"

namespace flashmla {
namespace {

// The same vector, its value unknown to the compiler. No instruction; `volatile`: anew every time,
// so nothing is hoisted.
template <class Vector>
[[gnu::always_inline]] inline Vector unknown(Vector x) {
#if defined(__aarch64__)
  asm volatile("" : "+w"(x));
#else
  asm volatile("" : "+v"(x));
#endif
  return x;
}
// The same, once, for g++ 12 alone: it moves accumulators about that are not pinned. (clang spills
// them when they are.)
template <class Vector>
[[gnu::always_inline]] inline Vector pinned(Vector x) {
#if defined(__clang__)
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#else
  asm("" : "+v"(x));
#endif
  return x;
}

// `iterations` products into each of kSums independent accumulators: enough of them to hide the
// latency of the instruction, few enough to stay in registers beside two operands and a temporary.
// Returns the flop done.
template <class Simd, class Arithmetic>
int64_t spin_products(int64_t iterations) {
  using Acc = typename Arithmetic::Acc;
  // Products of two instructions (16-bit ones of AVX2, all of the portable vocabulary): only the
  // addition waits for the last sum, so 8 do, and compilers spill more.
  constexpr bool kTwoSteps =
      Simd::kRegisters == 16 && (Arithmetic::kGroup == 2 || Simd::kLanes == 4);
  constexpr int kSums = kTwoSteps ? 8 : Simd::kRegisters * 3 / 4;
  Acc sum[kSums];
  const auto query = Simd::set_word(0x3f803f80);  // about 1 in f32 and bf16
  auto key = query;
  for (int i = 0; i < kSums; ++i) sum[i] = Acc{};
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 24
    for (int i = 0; i < kSums; ++i) {
      key = unknown(key);
      sum[i] = pinned(Arithmetic::dot_key(sum[i], query, key));
    }
  }
  for (int i = 0; i < kSums; ++i) unknown(sum[i]);
  return iterations * kSums * Simd::kLanes * Arithmetic::kGroup * 2;
}

// 0: the instruction set computes nothing in this arithmetic.
template <class Simd>
int64_t spin(ArithmeticId arithmetic, int64_t iterations) {
  if (arithmetic == ArithmeticId::kF32) return spin_products<Simd, F32<Simd>>(iterations);
  if constexpr (Simd::kBf16Dot) {
    if (arithmetic == ArithmeticId::kBf16) return spin_products<Simd, Bf16<Simd>>(iterations);
  }
  if constexpr (Simd::kInt16Dot) {
    if (arithmetic == ArithmeticId::kInt16) return spin_products<Simd, Int16<Simd>>(iterations);
  }
  if constexpr (Simd::kInt8Dot) {
    if (arithmetic == ArithmeticId::kInt8) return spin_products<Simd, Int8<Simd>>(iterations);
  }
  return 0;
}

}  // namespace
}  // namespace flashmla
