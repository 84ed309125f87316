// Plain NEON: what every 64-bit ARM machine since 2013 runs.
#if defined(__aarch64__)
#include "../isas.h"
#include "../prompt_attention.h"
#include "column_panel.h"
#include "int8_panel.h"
#include "tables1.h"

namespace fdk {
namespace {

// Products of two columns fit in int16: 2 * 128 * 127 < 2**15; pairs are added into int32.
struct LongMultiply {
  static constexpr int kTokens = 2;

  template <int T>
  static void multiply(const int8_t *panel, int64_t count, const int8_t *x, int64_t x_stride,
                       int32x4_t acc[T][4]) {
    int32x4_t pairs[T][8] = {};
    for (int64_t unit = 0; unit < count / 4; unit += 2) {
      // An odd last unit (8 bits, K not a multiple of 8) is paired with a zero.
      const bool both = unit + 1 < count / 4;
      int8x16_t x0[T];
      int8x16_t x1[T];
      for (int t = 0; t < T; ++t) {
        const int8_t *at = x + t * x_stride + unit * 4;
        x0[t] = vreinterpretq_s8_s32(vld1q_dup_s32(reinterpret_cast<const int32_t *>(at)));
        x1[t] = both
                    ? vreinterpretq_s8_s32(vld1q_dup_s32(reinterpret_cast<const int32_t *>(at + 4)))
                    : vdupq_n_s8(0);
      }
      const int8_t *next = panel + (both ? unit + 1 : unit) * 64;
      for (int j = 0; j < 4; ++j) {
        const int8x16_t w0 = vld1q_s8(panel + unit * 64 + j * 16);
        const int8x16_t w1 = vld1q_s8(next + j * 16);
        for (int t = 0; t < T; ++t) {
          int16x8_t low = vmull_s8(vget_low_s8(w0), vget_low_s8(x0[t]));
          int16x8_t high = vmull_high_s8(w0, x0[t]);
          low = vmlal_s8(low, vget_low_s8(w1), vget_low_s8(x1[t]));
          high = vmlal_high_s8(high, w1, x1[t]);
          pairs[t][2 * j] = vpadalq_s16(pairs[t][2 * j], low);
          pairs[t][2 * j + 1] = vpadalq_s16(pairs[t][2 * j + 1], high);
        }
      }
    }
    for (int t = 0; t < T; ++t)
      for (int j = 0; j < 4; ++j)
        acc[t][j] = vaddq_s32(acc[t][j], vpaddq_s32(pairs[t][2 * j], pairs[t][2 * j + 1]));
  }
};

bool supports_tables1(const Plan &plan) { return plan.arithmetic == FDK_INT8 && plan.bits == 1; }
bool supports_int8(const Plan &plan) { return plan.arithmetic == FDK_INT8; }
bool supports_int16(const Plan &plan) { return plan.arithmetic == FDK_INT16; }
bool supports_exact(const Plan &plan) { return plan.arithmetic == FDK_EXACT; }

float32x4_t bf16_low(uint16x8_t v) {
  return vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(v), 16));
}
float32x4_t bf16_high(uint16x8_t v) { return vreinterpretq_f32_u32(vshll_high_n_u16(v, 16)); }

// kTokens rows of x by one row of w.
template <int kTokens>
void dense_row(const fdk_dense_args &args, int64_t n, int64_t token) {
  const int64_t k = args.in_features;
  const uint16_t *w = args.weight + n * k;
  float32x4_t low[kTokens] = {};
  float32x4_t high[kTokens] = {};
  int64_t i = 0;
  for (; i + 8 <= k; i += 8) {
    const uint16x8_t w8 = vld1q_u16(w + i);
    for (int t = 0; t < kTokens; ++t) {
      const uint16x8_t x8 = vld1q_u16(args.x + (token + t) * k + i);
      low[t] = vfmaq_f32(low[t], bf16_low(w8), bf16_low(x8));
      high[t] = vfmaq_f32(high[t], bf16_high(w8), bf16_high(x8));
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    float sum = vaddvq_f32(vaddq_f32(low[t], high[t]));
    for (int64_t r = i; r < k; ++r)
      sum += bf16_to_f32(w[r]) * bf16_to_f32(args.x[(token + t) * k + r]);
    args.y[(token + t) * args.out_features + n] = f32_to_bf16(sum);
  }
}

void dense_rows(const fdk_dense_args &args, int64_t row_begin, int64_t row_end) {
  for (int64_t n = row_begin; n < row_end; ++n) {
    int64_t token = 0;
    for (; token + 4 <= args.m; token += 4) dense_row<4>(args, n, token);
    for (; token < args.m; ++token) dense_row<1>(args, n, token);
  }
}

void probe_copy(const void *source, void *target, size_t bytes) {
  const uint8_t *from = static_cast<const uint8_t *>(source);
  uint8_t *to = static_cast<uint8_t *>(target);
  size_t i = 0;
  for (; i + 64 <= bytes; i += 64) vst1q_u8_x4(to + i, vld1q_u8_x4(from + i));
  std::memcpy(to + i, from + i, bytes - i);
}

int64_t probe_sum(const int32_t *source, size_t count) {
  int64x2_t sums[4] = {};
  size_t i = 0;
  for (; i + 16 <= count; i += 16)
    for (size_t j = 0; j < 4; ++j) sums[j] = vpadalq_s32(sums[j], vld1q_s32(source + i + 4 * j));
  int64_t sum = vaddvq_s64(vaddq_s64(vaddq_s64(sums[0], sums[1]), vaddq_s64(sums[2], sums[3])));
  for (; i < count; ++i) sum += source[i];
  return sum;
}

using Exact = ColumnPanel<ExactColumns>;
using Int16 = ColumnPanel<Int16Columns>;

constexpr Kernel kKernels[] = {
    {"neon.tables_1bit", supports_tables1, Tables1::prepared_bytes, Tables1::prepare,
     Tables1::scratch_bytes, Tables1::run, 2},
    {"neon.panel_int8", supports_int8, int8_prepared_bytes, int8_prepare, int8_panel_scratch_bytes,
     Int8Panel<LongMultiply>::run, 1},
    {"neon.panel_int16", supports_int16, Int16Columns::prepared_bytes, Int16Columns::prepare,
     Int16::scratch_bytes, Int16::run, 1},
    {"neon.panel_exact", supports_exact, ExactColumns::prepared_bytes, ExactColumns::prepare,
     Exact::scratch_bytes, Exact::run, 1},
};

// Advanced SIMD is part of every 64-bit ARM processor that runs Linux, macOS or Windows.
bool available() { return true; }

}  // namespace

const Isa kNeonIsa = {"neon", available, kKernels, dense_rows, probe_copy, probe_sum, &kDecoding};

}  // namespace fdk
#endif
