// SVE2, written for any vector length: int8 activations, one token, 4 and 2 bits.
//
// The packed bytes are those of every other machine: a step's 64 bytes are one register at 512
// bits and two at 256. At 128 bits, the length of every core sold today, the registers are NEON's
// and so is the speed; the kernels offer themselves from 256 bits on.
#if defined(__aarch64__) && defined(__linux__)
#include <arm_sve.h>

#include "../isas.h"
#include "common.h"
#include "features.h"

namespace fdk {
namespace {

// The 16 scales of a tile from row `row` on, as many as a vector of float holds.
svfloat32_t load_scales_sve(const Plan &plan, int64_t tile, int64_t group, int64_t row,
                            svbool_t rows) {
  const int64_t first = (tile * plan.groups + group) * kTileRows + row;
  if (plan.scales_dtype == FDK_F32)
    return svld1_f32(rows, static_cast<const float *>(plan.scales) + first);
  const svuint32_t half = svld1uh_u32(rows, static_cast<const uint16_t *>(plan.scales) + first);
  if (plan.scales_dtype == FDK_BF16) return svreinterpret_f32_u32(svlsl_n_u32_x(rows, half, 16));
  return svcvt_f32_f16_x(rows, svreinterpret_f16_u32(half));
}

// One vector of packed bytes at one step. kFirst is the lane of x where the step starts.
template <int kBits, int kFirst>
void add_step(svint8_t low, svint8_t high, svuint8_t v, svint8_t x, svint32_t &even,
              svint32_t &odd) {
  const svbool_t all = svptrue_b8();
  const svuint8_t first = svand_n_u8_x(all, v, 15);
  const svuint8_t second = svlsr_n_u8_x(all, v, 4);
  if constexpr (kBits == 4) {
    even = svdot_lane_s32(even, svtbl_s8(low, first), x, kFirst);
    odd = svdot_lane_s32(odd, svtbl_s8(low, second), x, kFirst + 1);
  } else {
    even = svdot_lane_s32(even, svtbl_s8(low, first), x, 0);
    odd = svdot_lane_s32(odd, svtbl_s8(high, first), x, 1);
    even = svdot_lane_s32(even, svtbl_s8(low, second), x, 2);
    odd = svdot_lane_s32(odd, svtbl_s8(high, second), x, 3);
  }
}

// The rows of a tile that one vector holds, over all of K.
template <int kBits>
svfloat32_t sum_rows(const Plan &plan, const Int8Token &token, const Affine &affine,
                     const int8_t tables[2][16], int64_t tile, int64_t row) {
  // Vectors of more than 512 bits are used up to there.
  const svbool_t bytes = svwhilelt_b8_s64(row * 4, kStepBytes);
  const svbool_t rows = svwhilelt_b32_s64(row, kTileRows);
  const svint8_t low = svld1rq_s8(svptrue_b8(), tables[0]);
  const svint8_t high = svld1rq_s8(svptrue_b8(), tables[1]);
  const int64_t stride = columns_stride(plan);
  svfloat32_t y = svdup_n_f32(0.0F);
  for (size_t b = 0; b < plan.blocks.size(); ++b) {
    const Block &block = plan.blocks[b];
    const int8_t *x = token.x + static_cast<int64_t>(b) * stride;
    const uint8_t *w = plan.tile_packed(tile) + block.step_begin * kStepBytes + row * 4;
    svint32_t even = svdup_n_s32(0);
    svint32_t odd = svdup_n_s32(0);
    int64_t steps = block.step_end - block.step_begin;
    for (; steps > 0; x += 16) {
      const svint8_t x16 = svld1rq_s8(svptrue_b8(), x);
      add_step<kBits, 0>(low, high, svld1_u8(bytes, w), x16, even, odd);
      w += kStepBytes;
      --steps;
      if (kBits == 4 && steps > 0) {
        add_step<kBits, kBits == 4 ? 2 : 0>(low, high, svld1_u8(bytes, w), x16, even, odd);
        w += kStepBytes;
        --steps;
      }
    }
    const svfloat32_t sum = svcvt_f32_s32_x(rows, svadd_s32_x(rows, even, odd));
    const svfloat32_t value =
        svmla_n_f32_x(rows, svdup_n_f32(affine.shift(token.scales[b], token.sums[b])), sum,
                      affine.slope(token.scales[b]));
    y = svmla_f32_x(rows, y, load_scales_sve(plan, tile, block.group, row, rows), value);
  }
  return y;
}

template <int kBits>
void run(const Plan &plan, const void *prepared, void *, const Range &range) {
  const Levels &levels = plan.levels[range.codebook];
  const Int8Tables registers(levels, kBits, plan.uniform);
  const Affine affine(levels, kBits, registers.bias);
  int8_t tables[2][16];
  vst1q_s8(tables[0], registers.low);
  vst1q_s8(tables[1], registers.high);
  const int64_t rows = std::min<int64_t>(static_cast<int64_t>(svcntw()), kTileRows);
  for (int64_t t = range.token_begin; t < range.token_end; ++t) {
    const Int8Token token(plan, prepared, t, columns_stride(plan));
    for (int64_t tile = range.tile_begin; tile < range.tile_end; ++tile) {
      float out[kTileRows];
      for (int64_t row = 0; row < kTileRows; row += rows)
        svst1_f32(svwhilelt_b32_s64(row, kTileRows), out + row,
                  sum_rows<kBits>(plan, token, affine, tables, tile, row));
      store_tile(plan, t, tile, range, out);
    }
  }
}

template <int kBits>
bool supports(const Plan &plan) {
  return plan.arithmetic == FDK_INT8 && plan.m == 1 && plan.bits == kBits && svcntb() > 16;
}

constexpr Kernel kKernels[] = {
    {"sve2.matvec_table4", supports<4>, int8_prepared_bytes, int8_prepare, nullptr, run<4>, 2},
    {"sve2.matvec_table2", supports<2>, int8_prepared_bytes, int8_prepare, nullptr, run<2>, 2},
};

bool available() {
  const ArmFeatures &has = arm_features();
  return has.dotprod && has.i8mm && has.bf16 && has.sve2;
}

}  // namespace

const Isa kSve2Isa = {"sve2", available, kKernels, nullptr, nullptr, nullptr};

}  // namespace fdk
#endif
