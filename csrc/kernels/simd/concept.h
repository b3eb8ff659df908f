// The room simd/: the vector vocabulary, one file per instruction set; intrinsics are named nowhere
// else. May include arithmetic/ (conversions of single numbers).
//
// simd/concept.h: the vector vocabulary that every instruction set defines, and what each verb
// means.
//
// - Float, Word: vectors of kLanes f32 / 32-bit words
// - fma_at, dot_bf16_at, dot_s16_at: with the word at an address in every lane of the second factor
// - max(a, b): b when either is NaN
// - select_in_range: a where first <= t < limit, else b
// - select_minus_infinity: a where x == -inf, else b
// - scale_by_exp2(p, n): p * 2^n for integral n in [kExp2Floor, 127); exactly 0 at the floor, for
//   p <= 2^11
// - transpose: kLanes x kLanes words in place
// - sum_lanes: lane i of the result is the sum of the lanes of x[i], of kLanes vectors
// - load_bf16, ...: kLanes values of a storage type, widened; (p, count) touches only the first
//   count elements
//
// With a dot product of bf16 (kBf16Dot), int16 (kInt16Dot) or int8 (kInt8Dot):
//
// - interleave16, interleave8: rows of 2- / 1-byte elements -> vectors whose words hold one dim of
//   all 2 / 4 rows
// - restore16, restore8: the inverse order of dims, for f32 results of interleaved values
// - dot_bf16, pair_bf16: f32 dot of bf16 pairs; words of (low, high) rounded to bf16
// - exponent, mantissa: of positive normal values
// - dot_s16: int32 dot of int16 pairs
// - widen8, rescale16: 2 * kLanes byte codes as int16; (code << kShift) * factor / 2^15, rounded
// - dot_u8s8: int32 dot of four codes, the first unsigned
// - broadcast_quad, sum_quads: with dot_u8s8 and 16 lanes: four words in every quarter; the sums of
//   the quarters of four vectors (query.h, kQuads)
// - largest_of_eight: of eight unsigned 16-bit values
// - unpack4, unpack6: kBytes codes of four bits, or of six minus 32, from their planes
// - look_up4, rescale8: four-bit codes through a table; code * factor / 128 as int8, rounded
#pragma once
#include <concepts>
#include <cstddef>
#include <cstdint>

namespace flashmla {
namespace {

template <class S>
concept SimdVocabulary =
    requires(typename S::Float f, typename S::Word w, typename S::Float* fs, typename S::Word* ws,
             float* p, void* v, const void* cv, const std::byte* plane, const int32_t* word) {
      { S::kLanes } -> std::convertible_to<int>;
      { S::kRegisters } -> std::convertible_to<int>;
      { S::load(p) } -> std::same_as<typename S::Float>;
      { S::load_word(cv) } -> std::same_as<typename S::Word>;
      { S::broadcast_word(cv) } -> std::same_as<typename S::Word>;
      { S::fma(f, f, f) } -> std::same_as<typename S::Float>;
      { S::fma_at(f, cv, f) } -> std::same_as<typename S::Float>;
      { S::max(f, f) } -> std::same_as<typename S::Float>;
      { S::to_float(w) } -> std::same_as<typename S::Float>;
      { S::round_to_word(f) } -> std::same_as<typename S::Word>;
      { S::select_in_range(0, w, w, f, f) } -> std::same_as<typename S::Float>;
      { S::select_minus_infinity(f, f, f) } -> std::same_as<typename S::Float>;
      { S::sum_lanes(fs) } -> std::same_as<typename S::Float>;
      { S::scale_by_exp2(f, f) } -> std::same_as<typename S::Float>;
      { S::load_bf16(cv) } -> std::same_as<typename S::Float>;
      { S::load_f16(cv) } -> std::same_as<typename S::Float>;
      { S::load_f16(cv, 1) } -> std::same_as<typename S::Float>;
      { S::load_s8(cv) } -> std::same_as<typename S::Float>;
      { S::load_u8(cv) } -> std::same_as<typename S::Float>;
      S::store_bf16(v, f);
      S::store_f16(v, f);
      S::transpose(ws);
      S::prefetch(cv);
      requires !S::kBf16Dot || requires {
        { S::dot_bf16(f, w, w) } -> std::same_as<typename S::Float>;
        { S::dot_bf16_at(f, w, cv) } -> std::same_as<typename S::Float>;
        { S::pair_bf16(f, f) } -> std::same_as<typename S::Word>;
        S::interleave16(w, w, ws);
        S::restore16(fs);
      };
      requires !(S::kInt8Dot || S::kInt16Dot) || requires(const int8_t* table) {
        { S::exponent(f) } -> std::same_as<typename S::Float>;
        { S::mantissa(f) } -> std::same_as<typename S::Float>;
        { S::largest_of_eight(cv) } -> std::same_as<uint32_t>;
        { S::unpack6(plane, plane) } -> std::same_as<typename S::Word>;
        { S::look_up4(plane, table) } -> std::same_as<typename S::Word>;
        { S::rescale8(w, word) } -> std::same_as<typename S::Word>;
      };
      requires !S::kInt16Dot || requires {
        { S::dot_s16(w, w, w) } -> std::same_as<typename S::Word>;
        { S::dot_s16_at(w, w, cv) } -> std::same_as<typename S::Word>;
        { S::widen8(cv, 0) } -> std::same_as<typename S::Word>;
        { S::template rescale16<8>(w, word) } -> std::same_as<typename S::Word>;
        S::interleave16(w, w, ws);
        S::restore16(fs);
        S::store_s16(v, w);
      };
      requires !S::kInt8Dot || requires {
        { S::dot_u8s8(w, w, w) } -> std::same_as<typename S::Word>;
        { S::add_word(w, w) } -> std::same_as<typename S::Word>;
        S::interleave8(w, w, w, w, ws);
        S::restore8(fs);
        S::store_s8(v, w);
      };
      requires !(S::kInt8Dot && S::kLanes == 16) || requires {
        { S::broadcast_quad(cv) } -> std::same_as<typename S::Word>;
        { S::sum_quads(ws) } -> std::same_as<typename S::Word>;
      };
    };

}  // namespace
}  // namespace flashmla
