// dispatch.h: which instruction set runs. Chosen once at load from what CPU and system offer;
// FLASHMLA_ISA or force_isa() override.
#pragma once

namespace flashmla {

// Name of the level in use: scalar, avx2, avx2_vnni, avx2_vnni_evex, avx512_vnni, avx512_bf16,
// onednn.
const char* isa_name();

// Levels compiled in, lowest first; null terminated.
const char* const* isa_names();

// Whether this machine can run the level.
bool isa_available(const char* name);

// Makes `name` the level in use ("" or "auto": the best available). False, and nothing changes, if
// unknown or unavailable.
bool force_isa(const char* name);

// What is wrong with the value that FLASHMLA_ISA had at load, or null (the ops raise on the first
// call).
const char* isa_environment_error();

// Makes the level `onednn` known, for callers whose Executor has a matrix engine: whether the
// engine works here, and whether the level is to be chosen by itself then. Before the first choice.
void offer_matrix_engine(bool (*available)(), bool (*preferred)());

// Name and version of the compiler that built the kernels.
const char* kernel_compiler();

}  // namespace flashmla
