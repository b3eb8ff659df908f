// values.h: values of the ops' dtypes to and from f32.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/call/params.h"
#include "kernels/formats/float.h"

namespace flashmla {
namespace {

// Calls f with the element of a type.
template <class F>
void with_element(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::kF32:
      return f(F32Element{});
    case ScalarType::kBf16:
      return f(Bf16Element{});
    case ScalarType::kF16:
      return f(F16Element{});
  }
}

// count values of `type`.
template <class Simd>
void load_values(ScalarType type, const std::byte* from, int32_t count, float* to) {
  with_element(
      type, [=]<class Element>(Element) { widen_values<Simd, Element>(from, count, count, to); });
}

// Calls body(i, x) for the values [i, i + kVectors * kLanes) of `count`, zeros behind the last.
template <class Simd, int kVectors, class Element, class Body>
void for_vectors(Element, const std::byte* from, int32_t count, const Body& body) {
  constexpr int kStep = kVectors * Simd::kLanes;
  const auto* source = reinterpret_cast<const typename Element::Storage*>(from);
  typename Simd::Float x[kVectors];
  int32_t i = 0;
  for (; i + kStep <= count; i += kStep) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      x[v] = Element::template load<Simd>(source + i + v * Simd::kLanes);
    body(i, x);
  }
  if (i == count) return;
  float rest[kStep];
  widen_values<Simd, Element>(reinterpret_cast<const std::byte*>(source + i), count - i, kStep,
                              rest);
  for (int v = 0; v < kVectors; ++v) x[v] = Simd::load(rest + v * Simd::kLanes);
  body(i, x);
}

// kLanes f32 values as values [i, i + kLanes) of `to`.
template <class Simd>
[[gnu::always_inline]] inline void store_vector(ScalarType type, typename Simd::Float x, int32_t i,
                                                std::byte* to) {
  switch (type) {
    case ScalarType::kF32:
      return Simd::store(reinterpret_cast<float*>(to) + i, x);
    case ScalarType::kBf16:
      return Simd::store_bf16(to + 2 * i, x);
    case ScalarType::kF16:
      return Simd::store_f16(to + 2 * i, x);
  }
}

// count f32 values as `type`.
template <class Simd>
void store_values(ScalarType type, const float* from, int32_t count, std::byte* to) {
  int32_t i = 0;
  for (; i + Simd::kLanes <= count; i += Simd::kLanes)
    store_vector<Simd>(type, Simd::load(from + i), i, to);
  with_element(type, [=]<class Element>(Element) {
    for (int32_t j = i; j < count; ++j)
      reinterpret_cast<typename Element::Storage*>(to)[j] = Element::narrow(from[j]);
  });
}

}  // namespace
}  // namespace flashmla
