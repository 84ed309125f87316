// Activations in AVX2: quantised, and written in the order of decoded weights; what a block adds to
// y.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "kernel.h"
#include "numeric.h"
#include "x86/avx2_decode.h"

namespace fdk {
namespace {

struct BlockFactor {
  float scale, sum;
};

// Prepared activations of a token: BlockFactor [blocks], then the words of all blocks.
template <typename A>
struct Prepared {
  int64_t factor_bytes, stride;
  explicit Prepared(const Plan &plan) {
    int64_t words = 0;
    for (const Block &block : plan.blocks)
      words += (block.step_end - block.step_begin) * A::kVectors;
    factor_bytes = static_cast<int64_t>(plan.blocks.size() * sizeof(BlockFactor));
    stride = ceil_div(factor_bytes + words * 4, 64) * 64;
  }
  BlockFactor *factors(const void *prepared, int64_t token) const {
    char *base = static_cast<char *>(const_cast<void *>(prepared)) + token * stride;
    return reinterpret_cast<BlockFactor *>(base);
  }
  int32_t *words(const void *prepared, int64_t token) const {
    return reinterpret_cast<int32_t *>(reinterpret_cast<char *>(factors(prepared, token)) +
                                       factor_bytes);
  }
};

template <typename A>
size_t prepared_bytes(const Plan &plan) {
  return static_cast<size_t>(plan.m * Prepared<A>(plan).stride);
}

// Columns of a block, quantised for the integer arithmetics.
template <typename A, typename Element>
BlockFactor convert_block(const Plan &plan, const float x[kMaxBlock], Element *natural) {
  if constexpr (!A::kInteger) {
    std::copy(x, x + kMaxBlock, natural);
    return {1.0F, 0.0F};
  } else {
    uint32_t magnitude = 0;
    for (int64_t i = 0; i < kMaxBlock; ++i)
      magnitude = std::max(magnitude, std::bit_cast<uint32_t>(x[i]) & 0x7fffffffU);
    const BlockScale scale =
        block_scale(magnitude, plan.arithmetic == FDK_INT8 ? 127 : plan.levels[0].x_limit16);
    int32_t sum = 0;
    for (int64_t i = 0; i < kMaxBlock && scale.inverse != 0.0F; ++i) {
      const auto q = static_cast<int32_t>(std::nearbyint(x[i] * scale.inverse));
      natural[i] = static_cast<Element>(q);
      sum += q;
    }
    return {scale.scale, static_cast<float>(sum)};
  }
}

template <typename A>
void prepare(const Plan &plan, void *prepared, int64_t token_begin, int64_t token_end) {
  // A gathered level is multiplied by one activation: the other half of its word stays 0.
  using Element = std::conditional_t<A::kInteger, int16_t, float>;
  constexpr int64_t columns = step_k(A::kBits);
  constexpr int64_t spread = A::kInteger && A::kColumns == 1 ? 2 : 1;
  const Prepared<A> layout(plan);
  for (int64_t token = token_begin; token < token_end; ++token) {
    int32_t *words = layout.words(prepared, token);
    for (size_t b = 0; b < plan.blocks.size(); ++b) {
      const Block &block = plan.blocks[b];
      const int64_t steps = block.step_end - block.step_begin;
      float x[kMaxBlock] = {};
      for (int64_t i = 0; i < block.length; ++i)
        x[i] = load_as_f32(plan.x, plan.x_dtype, token * plan.k + block.k0 + i);
      Element natural[2 * kMaxBlock + 64] = {};
      layout.factors(prepared, token)[b] =
          convert_block<A>(plan, x, natural + (block.k0 - block.step_begin * columns));
      std::memset(words, 0, static_cast<size_t>(steps * A::kVectors) * sizeof(int32_t));
      Element *out = reinterpret_cast<Element *>(words);
      for (int64_t s = 0; s < steps; ++s)
        for (int v = 0; v < A::kVectors; ++v)
          for (int i = 0; i < A::kColumns; ++i)
            out[(s * columns + v * A::kColumns + i) * spread] =
                natural[s * columns + A::word_column(v, i)];
      words += steps * A::kVectors;
    }
  }
}

inline __m256 load_half_scales(const Plan &plan, int64_t tile, int64_t group, int half) {
  const int64_t first = (tile * plan.groups + group) * kTileRows + half * kHalfRows;
  if (plan.scales_dtype == FDK_F32)
    return _mm256_loadu_ps(static_cast<const float *>(plan.scales) + first);
  const __m128i bits = _mm_loadu_si128(
      reinterpret_cast<const __m128i *>(static_cast<const uint16_t *>(plan.scales) + first));
  if (plan.scales_dtype == FDK_F16) return _mm256_cvtph_ps(bits);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

// What a block adds to a row, without the scale of its weights.
template <typename A>
inline __m256 finish_block(const Levels *levels, bool int8, typename A::Sum sum,
                           const BlockFactor &x) {
  if constexpr (!A::kInteger) {
    return sum;
  } else {
    const float factor = int8 ? levels->factor8 : levels->factor16;
    const float offset = int8 ? levels->offset8 : levels->offset16;
    const __m256 shifted =
        _mm256_add_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(x.sum * (offset / factor)));
    return _mm256_mul_ps(shifted, _mm256_set1_ps(x.scale * factor));
  }
}

}  // namespace
}  // namespace fdk
