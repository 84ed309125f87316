// Sums to outputs in AVX-512: the scales of a block, the bias, the dtype of y.
#pragma once

#include <immintrin.h>

#include "kernel.h"
#include "numeric.h"
#include "x86/avx512_activations.h"

namespace fdk {
namespace {

inline __m512 load_tile_scales(const Plan &plan, int64_t tile, int64_t group) {
  return load_floats(plan.scales, plan.scales_dtype, (tile * plan.groups + group) * kTileRows,
                     0xffff);
}

// Sixteen float32 to elements of any dtype, rounded like store_from_f32.
inline void store_floats(void *data, fdk_dtype dtype, int64_t index, __m512 values) {
  if (dtype == FDK_F32) {
    _mm512_storeu_ps(static_cast<float *>(data) + index, values);
    return;
  }
  __m256i bits;
  if (dtype == FDK_F16) {
    bits = _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  } else {
    const __m512i u = _mm512_castps_si512(values);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    bits = _mm512_cvtepi32_epi16(
        _mm512_srli_epi32(_mm512_mask_or_epi32(rounded, nan, u, _mm512_set1_epi32(0x400000)), 16));
  }
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(static_cast<uint16_t *>(data) + index), bits);
}

// sums -> y.
inline void store_sums(const Plan &plan, int64_t token, int64_t tile, const Range &range,
                       __m512 sums) {
  const int64_t first = tile * kTileRows;
  if (range.row_begin <= first && first + kTileRows <= range.row_end) {
    if (plan.bias != nullptr)
      sums = _mm512_add_ps(sums, load_floats(plan.bias, plan.bias_dtype, first, 0xffff));
    store_floats(plan.y, plan.y_dtype, token * plan.n + first, sums);
    return;
  }
  alignas(64) float rows[kTileRows];
  _mm512_store_ps(rows, sums);
  store_tile(plan, token, tile, range, rows);
}

// What a block adds to a row: float sums as they are; integers with the scale of the activations
// and the codebook's offset: (sum + sum_x * offset / factor) * (scale * factor).
template <typename A>
struct Finish {
  float ratio = 0.0F, factor = 1.0F;
  explicit Finish(const Plan &plan, int64_t codebook) {
    if constexpr (A::kInteger) {
      const Levels &levels = plan.levels[codebook];
      factor = A::kColumns == 4 ? levels.factor8 : levels.factor16;
      ratio = (A::kColumns == 4 ? levels.offset8 : levels.offset16) / factor;
    }
  }
  __m512 block(typename A::Sum sum, const BlockFactor *factors, size_t b) const {
    if constexpr (!A::kInteger) {
      return sum;
    } else {
      const __m512 shifted =
          _mm512_add_ps(A::to_float(sum), _mm512_set1_ps(factors[b].sum * ratio));
      return _mm512_mul_ps(shifted, _mm512_set1_ps(factors[b].scale * factor));
    }
  }
};

}  // namespace
}  // namespace fdk
