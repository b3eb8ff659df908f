// dispatch.cpp: the list of levels and the choice among them. Adding an instruction set: its
// levels/*.cpp, one line here.
#include "kernels/levels/dispatch.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "kernels/call/kernel_table.h"

namespace flashmla {

extern const KernelTable kernels_scalar;
#if defined(__x86_64__)
extern const KernelTable kernels_avx2;
extern const KernelTable kernels_avx2_vnni;
extern const KernelTable kernels_avx2_vnni_evex;
extern const KernelTable kernels_avx512_vnni;
extern const KernelTable kernels_avx512_bf16;
extern const KernelTable kernels_onednn;
#endif

namespace {

struct LevelEntry {
  const char* name;
  const KernelTable* table;
  bool (*available)();
  bool (*preferred)() = available;  // chosen by itself where it is available
};

#if defined(__x86_64__)
// __builtin_cpu_supports also asks the system whether it saves the registers.
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
bool has_avx2_vnni() { return has_avx2() && __builtin_cpu_supports("avxvnni"); }
bool has_avx2_vnni_evex() {
  return has_avx2() && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}
bool has_avx512_vnni() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}
bool has_avx512_bf16() { return has_avx512_vnni() && __builtin_cpu_supports("avx512bf16"); }

// The matrix engine of the level onednn (offer_matrix_engine).
bool (*engine_available)() = [] { return false; };
bool (*engine_preferred)() = [] { return false; };
bool has_onednn() { return has_avx512_bf16() && engine_available(); }
bool prefers_onednn() { return has_avx512_bf16() && engine_preferred() && engine_available(); }
#endif

// Lowest first.
constexpr LevelEntry kLevels[] = {
    {"scalar", &kernels_scalar, [] { return true; }},
#if defined(__x86_64__)
    {"avx2", &kernels_avx2, has_avx2},
    {"avx2_vnni", &kernels_avx2_vnni, has_avx2_vnni},
    {"avx2_vnni_evex", &kernels_avx2_vnni_evex, has_avx2_vnni_evex},  // tests avx2_vnni
    {"avx512_vnni", &kernels_avx512_vnni, has_avx512_vnni},
    {"avx512_bf16", &kernels_avx512_bf16, has_avx512_bf16},
    {"onednn", &kernels_onednn, has_onednn, prefers_onednn},
#endif
};
constexpr int kCount = sizeof(kLevels) / sizeof(kLevels[0]);

const LevelEntry* find(const char* name) {
  for (const LevelEntry& level : kLevels) {
    if (std::strcmp(level.name, name) == 0) return &level;
  }
  return nullptr;
}

const KernelTable* best() {
  for (int i = kCount - 1; i > 0; --i) {
    if (kLevels[i].preferred()) return kLevels[i].table;
  }
  return kLevels[0].table;
}

struct State {
  std::atomic<const KernelTable*> table;
  char environment_error[128] = "";

  State() : table(best()) {
    const char* name = std::getenv("FLASHMLA_ISA");
    if (name == nullptr || *name == 0 || std::strcmp(name, "auto") == 0) return;
    const LevelEntry* level = find(name);
    if (level != nullptr && level->available()) {
      table = level->table;
    } else {  // kept, as the variable may change
      std::snprintf(
          environment_error, sizeof(environment_error), "\"%.60s\" is %s", name,
          level == nullptr ? "no level of this build" : "a level that this machine does not offer");
    }
  }
};

State& state() {
  static State instance;
  return instance;
}

}  // namespace

const KernelTable& kernels() { return *state().table.load(std::memory_order_relaxed); }

const char* isa_name() { return kernels().name; }

const char* const* isa_names() {
  static const struct Names {
    const char* list[kCount + 1] = {};
    Names() {
      for (int i = 0; i < kCount; ++i) list[i] = kLevels[i].name;
    }
  } names;
  return names.list;
}

bool isa_available(const char* name) {
  const LevelEntry* level = find(name);
  return level != nullptr && level->available();
}

bool force_isa(const char* name) {
  if (*name == 0 || std::strcmp(name, "auto") == 0) {
    state().table = best();
    return true;
  }
  if (!isa_available(name)) return false;
  state().table = find(name)->table;
  return true;
}

void offer_matrix_engine(bool (*available)(), bool (*preferred)()) {
#if defined(__x86_64__)
  engine_available = available;
  engine_preferred = preferred;
#else
  (void)available, (void)preferred;
#endif
}

const char* isa_environment_error() {
  const char* error = state().environment_error;
  return *error == 0 ? nullptr : error;
}

const char* kernel_compiler() {
#ifdef __clang__
  return "clang " __clang_version__;
#else
  return "g++ " __VERSION__;
#endif
}

}  // namespace flashmla
