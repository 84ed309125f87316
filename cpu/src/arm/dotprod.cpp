// NEON with the dot product of int8 (Cortex-A55 and A75 of 2017 on).
#if defined(__aarch64__)
#include "../isas.h"
#include "features.h"
#include "int8_panel.h"
#include "matvec.h"

namespace fdk {
namespace {

// One unit of four columns: a register of weights by a lane of activations.
struct DotProduct {
  static constexpr int kTokens = 4;

  template <int T, int kLane>
  static void multiply_unit(const int8_t *panel, const int8x16_t x[T], int32x4_t acc[T][4]) {
    for (int j = 0; j < 4; ++j) {
      const int8x16_t w = vld1q_s8(panel + 16 * j);
      for (int t = 0; t < T; ++t) acc[t][j] = vdotq_laneq_s32(acc[t][j], w, x[t], kLane);
    }
  }

  // The prepared activations reach to whole vectors of 16, so loading one is always allowed.
  template <int T>
  static void multiply(const int8_t *panel, int64_t count, const int8_t *x, int64_t x_stride,
                       int32x4_t acc[T][4]) {
    for (int64_t c = 0; c < count; c += 16) {
      int8x16_t x16[T];
      for (int t = 0; t < T; ++t) x16[t] = vld1q_s8(x + t * x_stride + c);
      const int8_t *w = panel + c * kTileRows;
      multiply_unit<T, 0>(w, x16, acc);
      if (c + 4 < count) multiply_unit<T, 1>(w + 64, x16, acc);
      if (c + 8 < count) multiply_unit<T, 2>(w + 128, x16, acc);
      if (c + 12 < count) multiply_unit<T, 3>(w + 192, x16, acc);
    }
  }
};

template <int kBits, bool kUniform>
bool supports_matvec(const Plan &plan) {
  return plan.arithmetic == FDK_INT8 && plan.m == 1 && plan.bits == kBits &&
         (plan.uniform || !kUniform);
}

// For one or two tokens at 1 bit the tables of plain NEON are faster.
bool supports_panel(const Plan &plan) {
  return plan.arithmetic == FDK_INT8 && (plan.bits != 1 || plan.m > 2);
}

constexpr Kernel kKernels[] = {
    {"dotprod.matvec_uniform4", supports_matvec<4, true>, int8_prepared_bytes, int8_prepare,
     Matvec<Uniform4>::scratch_bytes, Matvec<Uniform4>::run, 4},
    {"dotprod.matvec_table4", supports_matvec<4, false>, int8_prepared_bytes, int8_prepare,
     Matvec<Table4>::scratch_bytes, Matvec<Table4>::run, 4},
    {"dotprod.matvec_uniform2", supports_matvec<2, true>, int8_prepared_bytes, int8_prepare,
     Matvec<Table2<true>>::scratch_bytes, Matvec<Table2<true>>::run, 4},
    {"dotprod.matvec_table2", supports_matvec<2, false>, int8_prepared_bytes, int8_prepare,
     Matvec<Table2<false>>::scratch_bytes, Matvec<Table2<false>>::run, 4},
    {"dotprod.matvec_uniform8", supports_matvec<8, true>, int8_prepared_bytes, int8_prepare,
     Matvec<Uniform8>::scratch_bytes, Matvec<Uniform8>::run, 4},
    {"dotprod.panel_int8", supports_panel, int8_prepared_bytes, int8_prepare,
     int8_panel_scratch_bytes, Int8Panel<DotProduct>::run, 1},
};

bool available() { return arm_features().dotprod; }

}  // namespace

const Isa kDotprodIsa = {"dotprod", available, kKernels, nullptr, nullptr, nullptr};

}  // namespace fdk
#endif
