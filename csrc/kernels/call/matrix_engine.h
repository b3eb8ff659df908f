// matrix_engine.h: matrix products that a library makes, lent by the caller as an Executor is. The
// level `onednn` computes the scores and the values of whole tiles with them.
#pragma once
#include <cstddef>
#include <cstdint>

namespace flashmla {

// C [m][n] = A [m][k] B [k][n], or C + A B. A: rows `lda` elements apart. B: 32-bit words [k /
// group][n], rows `ldb` words apart; a word holds a group, as many values of k as fit into 32 bits.
// C: 32-bit values, rows `ldc` apart.
struct ProductShape {
  int32_t m, n, k;
  int32_t lda, ldb, ldc;
  bool add;
};

struct MatrixEngine {
  // bf16 x bf16, summed in f32.
  void (*multiply_bf16)(const ProductShape& shape, const std::byte* a, const std::byte* b,
                        float* c);
  // Unsigned x signed bytes, summed in int32, exactly.
  void (*multiply_u8s8)(const ProductShape& shape, const std::byte* a, const std::byte* b,
                        int32_t* c);
  // The calling thread makes no product for now: state of the CPU that it held for them is freed.
  void (*release)();
  // Blocks of fewer query rows are computed without the engine.
  int32_t (*least_rows)();
};

}  // namespace flashmla
