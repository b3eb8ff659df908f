// onednn.cpp: the matrix engine of the level `onednn`: brgemm of the oneDNN inside torch, which
// runs on AMX where there is AMX. The only file that names brgemm.
//
// torch keeps compiled products per thread and shape, with no bound, and per thread the one whose
// hardware context (the tile configuration of AMX) is loaded. It does not notice when something
// else on the thread configures tiles. So a thread begins and ends each work item without context.
#include "ops/onednn.h"

#include <ATen/Context.h>
#include <ATen/cpu/Utils.h>
#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <exception>
#include <unordered_set>

#include "kernels/levels/dispatch.h"
#include "ops/checks.h"

namespace flashmla {
namespace {

namespace blas = at::native::cpublas;

// Products have 16 rows at least. Measured without AMX (docs/kernels.md): 8 rows take 1.4 times as
// long as by avx512_bf16, 16 rows 1.1 times.
std::atomic<int32_t> least_rows = 16;

std::atomic<int64_t> all_products = 0, all_shapes = 0, all_nanoseconds = 0;

struct ShapeKey {
  ProductShape shape;
  bool bytes;

  std::array<int64_t, 4> words() const {
    auto pair = [](int32_t high, int32_t low) { return int64_t{high} << 32 | low; };
    return {pair(shape.m, shape.n), pair(shape.k, shape.lda), pair(shape.ldb, shape.ldc),
            shape.add * 2 + bytes};
  }
  bool operator==(const ShapeKey& other) const { return words() == other.words(); }
};
struct ShapeHash {
  size_t operator()(const ShapeKey& key) const {
    uint64_t hash = 0;
    for (const int64_t word : key.words())
      hash = (hash ^ static_cast<uint64_t>(word)) * 0x9e3779b97f4a7c15u, hash ^= hash >> 29;
    return hash;
  }
};

// What a thread did. Counts reach the totals in release(): one write per work item.
struct Thread {
  std::unordered_set<ShapeKey, ShapeHash> known;
  int64_t products = 0;
  bool busy = false;  // between a product and release()
};
Thread& thread() {
  thread_local Thread instance;
  return instance;
}

void release() {
  Thread& t = thread();
  blas::brgemm_release();
  all_products += t.products;
  t.products = 0;
  t.busy = false;
}

template <class A, class B, class C>
void multiply(const ProductShape& s, const std::byte* a, const std::byte* b, C* c) {
  Thread& t = thread();
  if (!t.busy) blas::brgemm_release();
  t.busy = true;
  ++t.products;
  auto run = [&] {
    blas::brgemm(s.m, s.n, s.k, s.lda, s.ldb, s.ldc, s.add, reinterpret_cast<const A*>(a),
                 reinterpret_cast<const B*>(b), c);
  };
  try {
    const ShapeKey key{s, sizeof(A) == 1};
    if (t.known.contains(key)) return run();
    const auto start = std::chrono::steady_clock::now();
    run();
    t.known.insert(key);
    const std::chrono::nanoseconds passed = std::chrono::steady_clock::now() - start;
    ++all_shapes;
    all_nanoseconds += passed.count();
  } catch (...) {
    release();
    throw;
  }
}

constexpr MatrixEngine kEngine = {multiply<c10::BFloat16, c10::BFloat16, float>,
                                  multiply<unsigned char, signed char, int32_t>, release,
                                  [] { return least_rows.load(std::memory_order_relaxed); }};

// Whether products of both kinds come out right here: oneDNN throws where the CPU or
// ONEDNN_MAX_CPU_ISA rules them out.
bool probe() {
  constexpr int32_t n = 16;
  alignas(64) c10::BFloat16 a[n * 32], b[n * 32];
  alignas(64) unsigned char codes[n * 64];
  alignas(64) signed char signed_codes[n * 64];
  alignas(64) float c[n * n];
  alignas(64) int32_t sums[n * n];
  auto value = [](int32_t row, int32_t k) { return (row * 7 + k * 5) % 31 - 15; };
  for (int32_t row = 0; row < n; ++row) {
    for (int32_t k = 0; k < 32; ++k) {
      a[row * 32 + k] = static_cast<float>(value(row, k));
      b[(k / 2 * n + row) * 2 + k % 2] = static_cast<float>(value(k, row));
    }
    for (int32_t k = 0; k < 64; ++k) {
      codes[row * 64 + k] = static_cast<unsigned char>(255 - (row + k) % 50);
      signed_codes[(k / 4 * n + row) * 4 + k % 4] =
          static_cast<signed char>((row + k) % 3 == 0 ? 120 + k % 8 : -127);
    }
  }
  try {
    auto bytes = [](const void* p) { return static_cast<const std::byte*>(p); };
    kEngine.multiply_bf16({n, n, 32, 32, n, n, false}, bytes(a), bytes(b), c);
    kEngine.multiply_u8s8({n, n, 64, 64, n, n, false}, bytes(codes), bytes(signed_codes), sums);
    release();
  } catch (const std::exception&) {
    return false;
  }
  for (int32_t row = 0; row < n; ++row) {
    for (int32_t column = 0; column < n; ++column) {
      int32_t expected = 0, expected_sum = 0;
      for (int32_t k = 0; k < 32; ++k) expected += value(row, k) * value(k, column);
      for (int32_t k = 0; k < 64; ++k)
        expected_sum += codes[row * 64 + k] * signed_codes[(k / 4 * n + column) * 4 + k % 4];
      if (c[row * n + column] != static_cast<float>(expected) ||
          sums[row * n + column] != expected_sum)
        return false;
    }
  }
  return true;
}

bool available() {
  if (onednn_engine() == nullptr) return false;
  static const bool works = probe();
  return works;
}

// AMX by cpuid, the system's permission to use it (arch_prctl ARCH_REQ_XCOMP_PERM, asked for by
// torch), and oneDNN's own opinion, which includes ONEDNN_MAX_CPU_ISA: it packs operands for AMX
// alone.
bool preferred() {
  return onednn_engine() != nullptr && at::cpu::init_amx() && blas::could_pack(at::kBFloat16) &&
         blas::could_pack(at::kByte);
}

[[maybe_unused]] const bool offered = [] {
  offer_matrix_engine(available, preferred);
  return true;
}();

}  // namespace

const MatrixEngine* onednn_engine() {
  return at::globalContext().userEnabledMkldnn() ? &kEngine : nullptr;
}

void pause_products() {
  if (thread().busy) release();
}

std::tuple<int64_t, int64_t, double> onednn_stats() {
  return {all_products, all_shapes, static_cast<double>(all_nanoseconds) * 1e-9};
}

int64_t set_onednn_least_rows(int64_t rows) {
  TORCH_CHECK_VALUE(rows >= 1 && rows <= INT32_MAX, "rows: ", rows, ", expected at least 1");
  return least_rows.exchange(static_cast<int32_t>(rows));
}

}  // namespace flashmla
