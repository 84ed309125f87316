// What the ARM kernels share: activations to integers, scales, codes by column, tables.
//
// Everything here lies in an unnamed namespace: each translation unit is compiled for another
// instruction set, and the linker must never give the old machines' code a copy made for the new.
#pragma once

#include <arm_neon.h>

#include <algorithm>
#include <cstring>

#include "../kernel.h"
#include "../numeric.h"

namespace fdk {
namespace {

constexpr int64_t round_up_to(int64_t value, int64_t multiple) {
  return ceil_div(value, multiple) * multiple;
}

// Four activations or scales, from element `index` on, as float32.
inline float32x4_t load4_f32(const void *data, fdk_dtype dtype, int64_t index) {
  if (dtype == FDK_F32) return vld1q_f32(static_cast<const float *>(data) + index);
  const uint16x4_t half = vld1_u16(static_cast<const uint16_t *>(data) + index);
  if (dtype == FDK_BF16) return vreinterpretq_f32_u32(vshll_n_u16(half, 16));
  return vcvt_f32_f16(vreinterpret_f16_u16(half));
}

inline void copy_as_f32(const void *data, fdk_dtype dtype, int64_t index, int64_t count,
                        float *out) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) vst1q_f32(out + i, load4_f32(data, dtype, index + i));
  for (; i < count; ++i) out[i] = load_as_f32(data, dtype, index + i);
}

// The 16 scales of a group of a tile. `zero` lets a caller have its zeros from elsewhere.
template <fdk_dtype kDtype>
inline void load_scales4(const void *data, float32x4_t out[4], uint16x8_t zero = vdupq_n_u16(0)) {
  if constexpr (kDtype == FDK_F32) {
    for (int j = 0; j < 4; ++j) out[j] = vld1q_f32(static_cast<const float *>(data) + 4 * j);
    return;
  }
  for (int half = 0; half < 2; ++half) {
    const uint16x8_t v = vld1q_u16(static_cast<const uint16_t *>(data) + 8 * half);
    if constexpr (kDtype == FDK_BF16) {
      out[2 * half] = vreinterpretq_f32_u16(vzip1q_u16(zero, v));
      out[2 * half + 1] = vreinterpretq_f32_u16(vzip2q_u16(zero, v));
    } else {
      out[2 * half] = vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(v)));
      out[2 * half + 1] = vcvt_f32_f16(vreinterpret_f16_u16(vget_high_u16(v)));
    }
  }
}

// A tile's packed bytes and scales; the next tile's lie a stride further.
struct Tile {
  const uint8_t *packed;
  int64_t packed_stride;
  const char *scales;
  int64_t groups;

  Tile(const Plan &plan, int64_t tile)
      : packed(plan.tile_packed(tile)),
        packed_stride(plan.steps * kStepBytes),
        scales(static_cast<const char *>(plan.scales) +
               tile * plan.groups * kTileRows *
                   static_cast<int64_t>(dtype_size(plan.scales_dtype))),
        groups(plan.groups) {}
  template <fdk_dtype kDtype>
  const void *scales_of(int64_t next, int64_t group) const {
    return scales + (next * groups + group) * kTileRows * (kDtype == FDK_F32 ? 4 : 2);
  }
};

inline void load_scales4(const Plan &plan, int64_t tile, int64_t group, float32x4_t out[4]) {
  const Tile at(plan, tile);
  if (plan.scales_dtype == FDK_BF16)
    return load_scales4<FDK_BF16>(at.scales_of<FDK_BF16>(0, group), out);
  if (plan.scales_dtype == FDK_F16)
    return load_scales4<FDK_F16>(at.scales_of<FDK_F16>(0, group), out);
  load_scales4<FDK_F32>(at.scales_of<FDK_F32>(0, group), out);
}

// ---- Activations as integers ---------------------------------------------------------------

// Integers of one block of activations, zeros after them.
struct QuantisedBlock {
  float scale;
  int32_t sum;
  alignas(16) int16_t x[kMaxBlock];
};

inline void quantise_block(const Plan &plan, int64_t token, const Block &block, int32_t limit,
                           QuantisedBlock &out) {
  alignas(16) float x[kMaxBlock] = {};
  copy_as_f32(plan.x, plan.x_dtype, token * plan.k + block.k0, block.length, x);
  uint32x4_t largest = vdupq_n_u32(0);
  for (int i = 0; i < kMaxBlock; i += 4)
    largest = vmaxq_u32(largest, vreinterpretq_u32_f32(vabsq_f32(vld1q_f32(x + i))));
  const BlockScale scale = block_scale(vmaxvq_u32(largest), limit);
  int32x4_t sum = vdupq_n_s32(0);
  for (int i = 0; i < kMaxBlock; i += 8) {
    int32x4_t low = vdupq_n_s32(0);
    int32x4_t high = low;
    if (scale.inverse != 0.0F) {
      low = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + i), scale.inverse));
      high = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + i + 4), scale.inverse));
    }
    sum = vaddq_s32(sum, vaddq_s32(low, high));
    vst1q_s16(out.x + i, vcombine_s16(vmovn_s32(low), vmovn_s32(high)));
  }
  out.scale = scale.scale;
  out.sum = vaddvq_s32(sum);
}

inline void narrow_block(const QuantisedBlock &block, int8_t out[kMaxBlock]) {
  for (int i = 0; i < kMaxBlock; i += 16)
    vst1q_s8(out + i,
             vcombine_s8(vmovn_s16(vld1q_s16(block.x + i)), vmovn_s16(vld1q_s16(block.x + i + 8))));
}

// The columns that a kernel walks through for a block: whole units of the packed bytes, from
// column `first` on. Activations outside the block are zero there.
struct Columns {
  int64_t first;
  int64_t count;  // <= kMaxColumns
};
inline constexpr int64_t kMaxColumns = 80;  // 64, and at 2 bits up to 8 on either side

inline Columns block_columns(const Plan &plan, const Block &block) {
  // At 1 bit eight columns of a tile are 16 bytes by themselves, and blocks start at such a unit.
  if (plan.bits == 1) return {block.k0, round_up_to(block.length, 8)};
  const int64_t columns = step_k(plan.bits);
  return {block.step_begin * columns, (block.step_end - block.step_begin) * columns};
}

// First packed byte of a tile's columns.
inline const uint8_t *column_bytes(const Plan &plan, int64_t tile, const Columns &columns) {
  return plan.tile_packed(tile) + columns.first * plan.bits * kTileRows / 8;
}

// Space for any block's columns in the prepared activations.
inline int64_t columns_stride(const Plan &plan) {
  int64_t widest = 0;
  for (const Block &block : plan.blocks)
    widest = std::max(widest, block_columns(plan, block).count);
  return round_up_to(widest, 16);
}

// Blocks at the front that hold exactly 64 columns in whole steps: the kernels' fast path.
inline int64_t full_blocks(const Plan &plan) {
  if (plan.group_size % kMaxBlock != 0) return 0;
  const int64_t blocks = static_cast<int64_t>(plan.blocks.size());
  return plan.k % kMaxBlock == 0 ? blocks : blocks - 1;
}

// Prepared int8 activations: for each token scales [blocks], sums [blocks] and the integers
// [blocks][stride] in the order of the columns.
struct Int8Token {
  float *scales;
  float *sums;
  int8_t *x;

  static int64_t bytes(const Plan &plan, int64_t stride) {
    return round_up_to(static_cast<int64_t>(plan.blocks.size()) * (8 + stride), 64);
  }
  Int8Token(const Plan &plan, const void *prepared, int64_t token, int64_t stride) {
    char *base = static_cast<char *>(const_cast<void *>(prepared)) + token * bytes(plan, stride);
    x = reinterpret_cast<int8_t *>(base);
    scales = reinterpret_cast<float *>(base + static_cast<int64_t>(plan.blocks.size()) * stride);
    sums = scales + plan.blocks.size();
  }
};

inline size_t int8_prepared_bytes(const Plan &plan) {
  return static_cast<size_t>(plan.m * Int8Token::bytes(plan, columns_stride(plan)));
}

inline void int8_prepare(const Plan &plan, void *prepared, int64_t token_begin, int64_t token_end) {
  const int64_t stride = columns_stride(plan);
  for (int64_t token = token_begin; token < token_end; ++token) {
    const Int8Token out(plan, prepared, token, stride);
    for (size_t b = 0; b < plan.blocks.size(); ++b) {
      const Block &block = plan.blocks[b];
      QuantisedBlock quantised;
      quantise_block(plan, token, block, 127, quantised);
      alignas(16) int8_t narrow[kMaxBlock];
      narrow_block(quantised, narrow);
      int8_t *x = out.x + static_cast<int64_t>(b) * stride;
      std::memset(x, 0, static_cast<size_t>(stride));
      std::memcpy(x + (block.k0 - block_columns(plan, block).first), narrow,
                  static_cast<size_t>(block.length));
      out.scales[b] = quantised.scale;
      out.sums[b] = static_cast<float>(quantised.sum);
    }
  }
}

// With weights stored as level - bias, or as the code itself at 1 bit, a block's part of y is
// scales * (slope * integers + shift).
struct Affine {
  float factor;
  float offset;  // of one activation
  Affine(const Levels &levels, int bits, int bias)
      : factor(levels.factor8), offset(levels.offset8 + static_cast<float>(bias) * levels.factor8) {
    if (bits > 1) return;
    const int zero = levels.level8[0];
    offset = levels.offset8 + static_cast<float>(zero) * levels.factor8;
    factor = levels.factor8 * static_cast<float>(levels.level8[1] - zero);
  }
  float slope(float x_scale) const { return x_scale * factor; }
  float shift(float x_scale, float x_sum) const { return x_scale * (offset * x_sum); }
};

// y = sums + bias for a tile of one token.
inline void store_tile4(const Plan &plan, int64_t token, int64_t tile, const Range &range,
                        const float32x4_t sums[4]) {
  float out[kTileRows];
  for (int j = 0; j < 4; ++j) vst1q_f32(out + 4 * j, sums[j]);
  store_tile(plan, token, tile, range, out);
}

// ---- Codes ---------------------------------------------------------------------------------

// Calls f(column, codes of the 16 rows at that column) for every column.
template <int kBits, typename F>
inline void for_each_column(const uint8_t *bytes, int64_t count, F f) {
  if constexpr (kBits == 1) {
    for (int64_t c = 0; c < count; c += 8, bytes += kTileRows) {
      uint8x16_t v = vld1q_u8(bytes);
      for (int i = 0; i < 8; ++i, v = vshrq_n_u8(v, 1)) f(c + i, vandq_u8(v, vdupq_n_u8(1)));
    }
  } else {
    constexpr uint8_t mask = static_cast<uint8_t>((1 << kBits) - 1);
    for (int64_t c = 0; c < count; c += step_k(kBits), bytes += kStepBytes) {
      const uint8x16x4_t rows = vld1q_u8_x4(bytes);  // [16 rows][4 columns]
      const uint8x16_t even0 = vuzp1q_u8(rows.val[0], rows.val[1]);
      const uint8x16_t even1 = vuzp1q_u8(rows.val[2], rows.val[3]);
      const uint8x16_t odd0 = vuzp2q_u8(rows.val[0], rows.val[1]);
      const uint8x16_t odd1 = vuzp2q_u8(rows.val[2], rows.val[3]);
      uint8x16_t columns[4] = {vuzp1q_u8(even0, even1), vuzp1q_u8(odd0, odd1),
                               vuzp2q_u8(even0, even1), vuzp2q_u8(odd0, odd1)};
      for (int part = 0; part < 8 / kBits; ++part)
        for (int i = 0; i < 4; ++i) {
          f(c + 4 * part + i, vandq_u8(columns[i], vdupq_n_u8(mask)));
          if constexpr (kBits < 8) columns[i] = vshrq_n_u8(columns[i], kBits);
        }
    }
  }
}

// Runs f with the number of bits as a constant.
template <typename F>
inline void with_bits(int bits, F f) {
  if (bits == 1) return f(std::integral_constant<int, 1>());
  if (bits == 2) return f(std::integral_constant<int, 2>());
  if (bits == 4) return f(std::integral_constant<int, 4>());
  f(std::integral_constant<int, 8>());
}

// Calls f(unit, quarter, codes) for every unit of four columns and every four rows: codes are
// [4 rows][4 columns].
template <int kBits, typename F>
inline void for_each_code_unit(const uint8_t *bytes, int64_t count, F f) {
  if constexpr (kBits == 1) {
    static constexpr uint8_t kSpread[16] = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
    static constexpr uint8_t kBitOf[16] = {1, 2, 4, 8, 1, 2, 4, 8, 1, 2, 4, 8, 1, 2, 4, 8};
    const uint8x16_t bit_low = vld1q_u8(kBitOf);
    const uint8x16_t bit_high = vshlq_n_u8(bit_low, 4);
    for (int64_t c = 0; c < count; c += 8, bytes += kTileRows) {
      const uint8x16_t v = vld1q_u8(bytes);
      uint8x16_t spread = vld1q_u8(kSpread);
      for (int j = 0; j < 4; ++j, spread = vaddq_u8(spread, vdupq_n_u8(4))) {
        const uint8x16_t rows = vqtbl1q_u8(v, spread);
        f(c / 4, j, vandq_u8(vtstq_u8(rows, bit_low), vdupq_n_u8(1)));
        f(c / 4 + 1, j, vandq_u8(vtstq_u8(rows, bit_high), vdupq_n_u8(1)));
      }
    }
  } else {
    constexpr uint8_t mask = static_cast<uint8_t>((1 << kBits) - 1);
    for (int64_t c = 0; c < count; c += step_k(kBits), bytes += kStepBytes)
      for (int j = 0; j < 4; ++j) {
        uint8x16_t v = vld1q_u8(bytes + 16 * j);
        for (int part = 0; part < 8 / kBits; ++part) {
          f(c / 4 + part, j, vandq_u8(v, vdupq_n_u8(mask)));
          if constexpr (kBits < 8) v = vshrq_n_u8(v, kBits);
        }
      }
  }
}

// ---- Weights of a block as int8 ------------------------------------------------------------

// Level - bias for every code (at 1 bit, where two values are always affine, the code); at 2 bits
// also for the two codes of a nibble. The levels of an affine codebook of few bits are small as
// they are, and lose least that way.
struct Int8Tables {
  bool uniform;
  int bias;
  int8x16_t low;   // of the code, at 2 bits of the nibble's low code
  int8x16_t high;  // at 2 bits of the nibble's high code
  const uint8_t *all;

  Int8Tables(const Levels &levels, int bits, bool is_uniform)
      : uniform(is_uniform),
        bias(bits == 1 || (is_uniform && bits < 8) ? 0 : 128),
        all(levels.level8) {
    const uint8x16_t subtract = vdupq_n_u8(static_cast<uint8_t>(bias));
    uint8_t low_bytes[16] = {};
    uint8_t high_bytes[16] = {};
    for (int i = 0; i < 16; ++i) {
      low_bytes[i] = levels.level8[i & ((1 << bits) - 1)];
      if (bits == 2) high_bytes[i] = levels.level8[i >> 2];
    }
    low = vreinterpretq_s8_u8(vsubq_u8(vld1q_u8(low_bytes), subtract));
    high = vreinterpretq_s8_u8(vsubq_u8(vld1q_u8(high_bytes), subtract));
  }

  // 256 levels: four tables of 64.
  int8x16_t look_up256(uint8x16_t codes) const {
    uint8x16_t out = vqtbl4q_u8(vld1q_u8_x4(all), codes);
    for (int i = 1; i < 4; ++i) {
      codes = vsubq_u8(codes, vdupq_n_u8(64));
      out = vqtbx4q_u8(out, vld1q_u8_x4(all + 64 * i), codes);
    }
    return vreinterpretq_s8_u8(veorq_u8(out, vdupq_n_u8(128)));
  }
};

// Calls f(unit, quarter, weights) for every unit of four columns and every four rows: weights are
// [4 rows][4 columns], level - bias.
template <int kBits, typename F>
inline void for_each_unit(const uint8_t *bytes, int64_t count, const Int8Tables &tables, F f) {
  if constexpr (kBits == 2) {  // a nibble at a time, with a table for either of its codes
    for (int64_t c = 0; c < count; c += step_k(kBits), bytes += kStepBytes)
      for (int j = 0; j < 4; ++j) {
        const uint8x16_t v = vld1q_u8(bytes + 16 * j);
        const uint8x16_t low = vandq_u8(v, vdupq_n_u8(15));
        const uint8x16_t high = vshrq_n_u8(v, 4);
        f(c / 4, j, vqtbl1q_s8(tables.low, low));
        f(c / 4 + 1, j, vqtbl1q_s8(tables.high, low));
        f(c / 4 + 2, j, vqtbl1q_s8(tables.low, high));
        f(c / 4 + 3, j, vqtbl1q_s8(tables.high, high));
      }
  } else {
    for_each_code_unit<kBits>(bytes, count, [&](int64_t unit, int j, uint8x16_t codes) {
      if constexpr (kBits == 4) {
        f(unit, j, vqtbl1q_s8(tables.low, codes));
      } else if constexpr (kBits == 1) {
        f(unit, j, vreinterpretq_s8_u8(codes));
      } else if (tables.uniform) {
        f(unit, j, vreinterpretq_s8_u8(veorq_u8(codes, vdupq_n_u8(128))));
      } else {
        f(unit, j, tables.look_up256(codes));
      }
    });
  }
}

}  // namespace
}  // namespace fdk
