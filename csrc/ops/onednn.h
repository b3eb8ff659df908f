// onednn.h: oneDNN's matrix products as the kernels' matrix engine (matrix_engine.h), for the level
// `onednn`.
#pragma once
#include <cstdint>
#include <tuple>

#include "kernels/call/matrix_engine.h"

namespace flashmla {

// The engine, or null while the user has switched oneDNN off (torch.backends.mkldnn.enabled).
const MatrixEngine* onednn_engine();

// Something else may run on the calling thread, between two products of a work item.
void pause_products();

// What all threads did until now: products; (thread, shape) pairs met for the first time, each of
// which oneDNN compiles; the seconds that took.
std::tuple<int64_t, int64_t, double> onednn_stats();

// Row blocks of fewer rows are left to the kernels of avx512_bf16. Returns what was set before.
int64_t set_onednn_least_rows(int64_t rows);

}  // namespace flashmla
