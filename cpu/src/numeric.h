// Scalar conversions and the store of results, shared by all instruction sets. Static, so that a
// translation unit for a new instruction set never lends its copy to one for an old machine.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "kernel.h"

namespace fdk {

constexpr size_t dtype_size(fdk_dtype dtype) { return dtype == FDK_F32 ? 4 : 2; }

static inline float bf16_to_f32(uint16_t x) { return std::bit_cast<float>(uint32_t{x} << 16); }

// Round to nearest even; NaN stays NaN.
static inline uint16_t f32_to_bf16(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  if ((u & 0x7fffffffU) > 0x7f800000U) return static_cast<uint16_t>((u >> 16) | 0x40U);
  return static_cast<uint16_t>((u + 0x7fffU + ((u >> 16) & 1U)) >> 16);
}

static inline float f16_to_f32(uint16_t x) {
  const uint32_t sign = (uint32_t{x} & 0x8000U) << 16;
  const uint32_t magnitude = uint32_t{x} & 0x7fffU;
  if (magnitude >= 0x7c00U) return std::bit_cast<float>(sign | 0x7f800000U | (magnitude << 13));
  if (magnitude >= 0x0400U) return std::bit_cast<float>(sign | ((magnitude << 13) + 0x38000000U));
  const float value = static_cast<float>(magnitude) * 0x1p-24F;
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(value));
}

// Round to nearest even, overflow to infinity; NaN stays NaN.
static inline uint16_t f32_to_f16(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  const uint32_t sign = (u >> 16) & 0x8000U;
  const uint32_t magnitude = u & 0x7fffffffU;
  if (magnitude > 0x7f800000U) return static_cast<uint16_t>(sign | 0x7e00U);
  if (magnitude >= 0x477ff000U) return static_cast<uint16_t>(sign | 0x7c00U);
  if (magnitude < 0x38800000U) {  // subnormal: adding 0.5 leaves the rounded multiple of 2**-24
    const float shifted = std::bit_cast<float>(magnitude) + 0.5F;
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000U));
  }
  const uint32_t rounded = magnitude + 0xfffU + ((magnitude >> 13) & 1U) - 0x38000000U;
  return static_cast<uint16_t>(sign | (rounded >> 13));
}

static inline float load_as_f32(const void *data, fdk_dtype dtype, int64_t index) {
  if (dtype == FDK_F32) return static_cast<const float *>(data)[index];
  const uint16_t bits = static_cast<const uint16_t *>(data)[index];
  return dtype == FDK_BF16 ? bf16_to_f32(bits) : f16_to_f32(bits);
}

static inline void store_from_f32(void *data, fdk_dtype dtype, int64_t index, float value) {
  if (dtype == FDK_F32) static_cast<float *>(data)[index] = value;
  else
    static_cast<uint16_t *>(data)[index] =
        dtype == FDK_BF16 ? f32_to_bf16(value) : f32_to_f16(value);
}

static inline float round_to(float value, fdk_dtype dtype) {
  if (dtype == FDK_F32) return value;
  return dtype == FDK_BF16 ? bf16_to_f32(f32_to_bf16(value)) : f16_to_f32(f32_to_f16(value));
}

// The 16 scales of a group of a tile as float32.
static inline void load_scales(const Plan &plan, int64_t tile, int64_t group,
                               float out[kTileRows]) {
  const int64_t first = (tile * plan.groups + group) * kTileRows;
  for (int64_t r = 0; r < kTileRows; ++r)
    out[r] = load_as_f32(plan.scales, plan.scales_dtype, first + r);
}

// y[token, the rows of the tile within the range] = sums + bias.
static inline void store_tile(const Plan &plan, int64_t token, int64_t tile, const Range &range,
                              const float sums[kTileRows]) {
  const int64_t first = tile * kTileRows;
  const int64_t begin = range.row_begin > first ? range.row_begin : first;
  const int64_t end = range.row_end < first + kTileRows ? range.row_end : first + kTileRows;
  for (int64_t n = begin; n < end; ++n) {
    float value = sums[n - first];
    if (plan.bias != nullptr) value += load_as_f32(plan.bias, plan.bias_dtype, n);
    store_from_f32(plan.y, plan.y_dtype, token * plan.n + n, value);
  }
}

// The scale of a block of activations and its reciprocal, limit = the largest integer in use.
// The magnitude is compared as an integer so that a NaN or an infinity wins and reaches y.
struct BlockScale {
  float scale;    // activation = scale * integer
  float inverse;  // 0 for a block of zeros
};

static inline BlockScale block_scale(uint32_t magnitude_bits, int32_t limit) {
  const float largest = std::bit_cast<float>(magnitude_bits);
  if (magnitude_bits >= 0x7f800000U) return {std::bit_cast<float>(0x7fc00000U), 0.0F};
  const float scale = largest / static_cast<float>(limit);
  // Below the normal range the reciprocal overflows: such activations count as zero.
  if (scale < 0x1p-126F) return {0.0F, 0.0F};
  return {scale, 1.0F / scale};
}

}  // namespace fdk
