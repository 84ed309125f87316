// int8 activations, one token, 2, 4 or 8 bits: codes go from the packed bytes through a table in a
// register straight into the dot product, four columns of four rows at a time.
#pragma once

#include "common.h"

namespace fdk {
namespace {

// One register of packed bytes (4 rows) at a step: adds its products to acc. kFirst is the lane of
// x where the step's columns start; a lane is four activations.
template <int kLane>
inline int32x4_t dot4(int32x4_t acc, int8x16_t w, int8x16_t x) {
  return vdotq_laneq_s32(acc, w, x, kLane);
}

struct Table4 {  // any 16 levels, less 128
  static constexpr bool kLargeLevels = true;
  static constexpr int kBits = 4;
  static constexpr int kBias = 128;
  int8x16_t table;
  explicit Table4(const Levels &levels) : table(Int8Tables(levels, kBits, false).low) {}
  template <int kFirst>
  int32x4_t add(int32x4_t acc, uint8x16_t v, int8x16_t x) const {
    acc = dot4<kFirst>(acc, vqtbl1q_s8(table, vandq_u8(v, vdupq_n_u8(15))), x);
    return dot4<kFirst + 1>(acc, vqtbl1q_s8(table, vshrq_n_u8(v, 4)), x);
  }
};

struct Uniform4 {  // level = code
  static constexpr bool kLargeLevels = false;
  static constexpr int kBits = 4;
  static constexpr int kBias = 0;
  explicit Uniform4(const Levels &) {}
  template <int kFirst>
  int32x4_t add(int32x4_t acc, uint8x16_t v, int8x16_t x) const {
    acc = dot4<kFirst>(acc, vreinterpretq_s8_u8(vandq_u8(v, vdupq_n_u8(15))), x);
    return dot4<kFirst + 1>(acc, vreinterpretq_s8_u8(vshrq_n_u8(v, 4)), x);
  }
};

// A nibble is two codes: one table for each, instead of shifts and masks.
template <bool kUniform>
struct Table2 {
  static constexpr bool kLargeLevels = !kUniform;
  static constexpr int kBits = 2;
  static constexpr int kBias = kUniform ? 0 : 128;
  int8x16_t low;
  int8x16_t high;
  explicit Table2(const Levels &levels) {
    const Int8Tables tables(levels, kBits, kUniform);
    low = tables.low;
    high = tables.high;
  }
  template <int kFirst>
  int32x4_t add(int32x4_t acc, uint8x16_t v, int8x16_t x) const {
    const uint8x16_t first = vandq_u8(v, vdupq_n_u8(15));
    const uint8x16_t second = vshrq_n_u8(v, 4);
    acc = dot4<0>(acc, vqtbl1q_s8(low, first), x);
    acc = dot4<1>(acc, vqtbl1q_s8(high, first), x);
    acc = dot4<2>(acc, vqtbl1q_s8(low, second), x);
    return dot4<3>(acc, vqtbl1q_s8(high, second), x);
  }
};

struct Uniform8 {  // level = code, less 128
  static constexpr bool kLargeLevels = true;
  static constexpr int kBits = 8;
  static constexpr int kBias = 128;
  explicit Uniform8(const Levels &) {}
  template <int kFirst>
  int32x4_t add(int32x4_t acc, uint8x16_t v, int8x16_t x) const {
    return dot4<kFirst>(acc, vreinterpretq_s8_u8(veorq_u8(v, vdupq_n_u8(128))), x);
  }
};

// Sums start at the bits of 1.5 * 2**23, so that they are floats when they end: a conversion costs
// two slots of the vector pipes on the big cores. The sum of a block is below 2**22.
inline constexpr int32_t kMagicBits = 0x4b400000;
inline constexpr float kMagic = 12582912.0F;

// A Code is one of the structures above. kLargeLevels: over 64 columns the sums are so large that
// half a unit of their last place is nothing beside the rounding of the activations (1e-5 of y
// against 1e-2); then the start is subtracted with the shift, for nothing. What that rounds off
// is the same for all rows, so the next block's shift takes it along.
template <typename Code>
struct Matvec {
  // Steps that share a register of 16 activations.
  static constexpr int kStepsPerVector = 16 / static_cast<int>(step_k(Code::kBits));
  static constexpr int64_t kAffineFloats = 8;  // slope and shift of a block, four times each

  static size_t scratch_bytes(const Plan &plan) {
    return plan.blocks.size() * kAffineFloats * sizeof(float);
  }

  static void make_affine(const Plan &plan, const Int8Token &token, const Affine &affine,
                          float *out) {
    const size_t full = static_cast<size_t>(full_blocks(plan));
    float lost = 0.0F;
    for (size_t b = 0; b < plan.blocks.size(); ++b, out += kAffineFloats) {
      const float slope = affine.slope(token.scales[b]);
      const float shift = affine.shift(token.scales[b], token.sums[b]) + lost;
      const bool early = Code::kLargeLevels && b < full;
      const float start = early ? std::fma(-kMagic, slope, shift) : shift;
      lost = early ? shift - std::fma(kMagic, slope, start) : 0.0F;
      vst1q_f32(out, vdupq_n_f32(slope));
      vst1q_f32(out + 4, vdupq_n_f32(start));
    }
  }

  // Loads that the compiler may not merge: an accumulator's start comes from the cache, where
  // there are ports to spare, not from a move, which takes a vector port.
  template <typename Vector>
  static Vector load_again(const void *p) {
    Vector out;
    __asm__ volatile("ldr %q0, %1" : "=w"(out) : "m"(*static_cast<const Vector *>(p)));
    return out;
  }

  // The steps of one register of activations, from w on. x holds kSteps * step_k columns.
  template <int kSteps, int kStep = 0>
  static void add_vector(const Code &code, const uint8_t *w, int8x16_t x, int32x4_t acc[4]) {
    constexpr int kFirst = kStep * static_cast<int>(step_k(Code::kBits)) / 4;
    for (int j = 0; j < 4; ++j)
      acc[j] = code.template add<kFirst>(acc[j], vld1q_u8(w + kStep * kStepBytes + j * 16), x);
    if constexpr (kStep + 1 < kSteps) add_vector<kSteps, kStep + 1>(code, w, x, acc);
  }

  template <fdk_dtype kDtype>
  [[gnu::always_inline]] static void add_block(const Tile &at, const Code &code, const Block &block,
                                               bool full, const int8_t *x, const float *affine,
                                               float32x4_t y[4]) {
    alignas(16) static constexpr int32_t kStart[4] = {kMagicBits, kMagicBits, kMagicBits,
                                                      kMagicBits};
    const uint8_t *w = at.packed + block.step_begin * kStepBytes;
    int32x4_t acc[4];
    for (int j = 0; j < 4; ++j) acc[j] = load_again<int32x4_t>(kStart);
    if (full) {
#pragma clang loop unroll(full)
      for (int v = 0; v < 4; ++v)
        add_vector<kStepsPerVector>(code, w + v * kStepsPerVector * kStepBytes,
                                    vld1q_s8(x + 16 * v), acc);
    } else {
      int64_t steps = block.step_end - block.step_begin;
      for (; steps >= kStepsPerVector; steps -= kStepsPerVector, x += 16) {
        add_vector<kStepsPerVector>(code, w, vld1q_s8(x), acc);
        w += kStepsPerVector * kStepBytes;
      }
      if constexpr (kStepsPerVector > 1)
        for (; steps > 0; --steps, x += step_k(Code::kBits), w += kStepBytes) {
          int8_t last[16] = {};
          std::memcpy(last, x, static_cast<size_t>(step_k(Code::kBits)));
          add_vector<1>(code, w, vld1q_s8(last), acc);
        }
    }
    const float32x4_t slope = vld1q_f32(affine);
    float32x4_t scales[4];
    load_scales4<kDtype>(at.scales_of<kDtype>(0, block.group), scales);
    for (int j = 0; j < 4; ++j) {
      float32x4_t sum = vreinterpretq_f32_s32(acc[j]);
      if (!(Code::kLargeLevels && full)) sum = vsubq_f32(sum, vdupq_n_f32(kMagic));
      const float32x4_t value = vfmaq_f32(load_again<float32x4_t>(affine + 4), sum, slope);
      y[j] = vfmaq_f32(y[j], scales[j], value);
    }
  }

  // Not inlined: its loop is the one that the model of cpu/model looks for.
  template <fdk_dtype kDtype>
  [[gnu::noinline]] static void run_tile(const Plan &plan, const Code &code, const int8_t *x,
                                         const float *affine, int64_t token, int64_t tile,
                                         const Range &range) {
    float32x4_t y[4] = {};
    const Tile at(plan, tile);
    const Block *blocks = plan.blocks.data();
    const int64_t stride = columns_stride(plan);
    const int64_t count = static_cast<int64_t>(plan.blocks.size());
    const int64_t full = full_blocks(plan);
    for (int64_t b = 0; b < full; ++b, x += stride, affine += kAffineFloats)
      add_block<kDtype>(at, code, blocks[b], true, x, affine, y);
    for (int64_t b = full; b < count; ++b, x += stride, affine += kAffineFloats)
      add_block<kDtype>(at, code, blocks[b], false, x, affine, y);
    store_tile4(plan, token, tile, range, y);
  }

  template <fdk_dtype kDtype>
  static void run_dtype(const Plan &plan, const void *prepared, void *scratch, const Range &range) {
    float *affine = static_cast<float *>(scratch);
    const Levels &levels = plan.levels[range.codebook];
    const Code code(levels);
    for (int64_t t = range.token_begin; t < range.token_end; ++t) {
      const Int8Token token(plan, prepared, t, columns_stride(plan));
      make_affine(plan, token, Affine(levels, Code::kBits, Code::kBias), affine);
      for (int64_t tile = range.tile_begin; tile < range.tile_end; ++tile)
        run_tile<kDtype>(plan, code, token.x, affine, t, tile, range);
    }
  }

  static void run(const Plan &plan, const void *prepared, void *scratch, const Range &range) {
    if (plan.scales_dtype == FDK_BF16) return run_dtype<FDK_BF16>(plan, prepared, scratch, range);
    if (plan.scales_dtype == FDK_F16) return run_dtype<FDK_F16>(plan, prepared, scratch, range);
    run_dtype<FDK_F32>(plan, prepared, scratch, range);
  }
};

}  // namespace
}  // namespace fdk
