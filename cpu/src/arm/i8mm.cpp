// NEON with matrix products of int8 (Neoverse V1 and N2, Cortex-A510, A710 and X2 on): several
// tokens at once. One token stays with the dot products, which waste nothing on it.
#if defined(__aarch64__)
#include "../isas.h"
#include "features.h"
#include "mmla.h"

namespace fdk {
namespace {

struct Int8Pairs {
  static constexpr int64_t kColumns = 8;
  using Accumulator = int32x4_t;

  struct Tables {
    Int8Tables int8;
    Affine affine;
    Tables(const Plan &plan, int64_t codebook)
        : int8(plan.levels[codebook], plan.bits, plan.uniform),
          affine(plan.levels[codebook], plan.bits, int8.bias) {}
    float factor() const { return affine.factor; }
    float offset() const { return affine.offset; }
  };

  static int32x4_t multiply(int32x4_t acc, int8x16_t rows, int8x16_t tokens) {
    return vmmlaq_s32(acc, rows, tokens);
  }
  static float32x4_t value(int32x4_t acc, float32x4_t slope, float32x4_t shift) {
    return vfmaq_f32(shift, vcvtq_f32_s32(acc), slope);
  }

  static void write_row(const Plan &plan, int64_t token, const Block &block, int8_t *row,
                        float &scale, float &sum) {
    QuantisedBlock quantised;
    quantise_block(plan, token, block, 127, quantised);
    alignas(16) int8_t narrow[kMaxBlock];
    narrow_block(quantised, narrow);
    std::memcpy(row + (block.k0 - block_columns(plan, block).first), narrow,
                static_cast<size_t>(block.length));
    scale = quantised.scale;
    sum = static_cast<float>(quantised.sum);
  }

  // Two units of [4 rows][4 columns] make two pairs of [2 rows][8 columns]. At 8 bits a block may
  // end on half a unit.
  template <int kBits>
  static void decode(const uint8_t *bytes, int64_t count, const Tables &tables, int8_t *panel) {
    int8x16_t even[4] = {};
    const auto store = [&](int64_t unit, int j, int8x16_t odd) {
      const int32x4_t low = vreinterpretq_s32_s8(even[j]);
      const int32x4_t high = vreinterpretq_s32_s8(odd);
      int8_t *to = panel + unit / 2 * 128 + j * 32;
      vst1q_s8(to, vreinterpretq_s8_s32(vzip1q_s32(low, high)));
      vst1q_s8(to + 16, vreinterpretq_s8_s32(vzip2q_s32(low, high)));
    };
    for_each_unit<kBits>(bytes, count, tables.int8, [&](int64_t unit, int j, int8x16_t w) {
      if (unit % 2 == 0) even[j] = w;
      else store(unit, j, w);
    });
    if (kBits == 8 && count % 8 != 0)
      for (int j = 0; j < 4; ++j) store(count / 4, j, vdupq_n_s8(0));
  }
};

using Panel = Mmla<Int8Pairs>;

// At 1 bit the tables of plain NEON are faster for two tokens, too.
bool supports(const Plan &plan) {
  return plan.arithmetic == FDK_INT8 && plan.m > (plan.bits == 1 ? 2 : 1);
}

constexpr Kernel kKernels[] = {
    {"i8mm.panel_int8", supports, Panel::prepared_bytes, Panel::prepare, Panel::scratch_bytes,
     Panel::run, 1},
};

bool available() { return arm_features().dotprod && arm_features().i8mm; }

}  // namespace

const Isa kI8mmIsa = {"i8mm", available, kKernels, nullptr, nullptr, nullptr};

}  // namespace fdk
#endif
