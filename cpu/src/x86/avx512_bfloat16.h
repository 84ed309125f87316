// bfloat16 activations in their own precision (AVX-512 BF16).
#pragma once

#include <immintrin.h>

#include <bit>

#include "x86/avx512_decode.h"

namespace fdk {
namespace {

// bfloat16 activations: VDPBF16PS.
template <int kBits_>
struct BFloat16 : Words<kBits_> {
  static constexpr bool kInteger = false;
  using Sum = __m512;

  BFloat16(const Plan &plan, int64_t codebook) {
    uint16_t entries[256];
    for (int i = 0; i < 1 << kBits_; ++i)
      entries[i] = f32_to_bf16(plan.codebook[(codebook << kBits_) + i]);
    this->load(entries);
  }
  static void store_block(const __m512 x[4], int16_t *natural) {
    for (int i = 0; i < 4; ++i)
      _mm256_storeu_si256(reinterpret_cast<__m256i *>(natural + 16 * i),
                          _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(x[i]), 16)));
  }
  static Sum zero() { return _mm512_setzero_ps(); }
  static Sum multiply_add(Sum sum, __m512i weights, __m512i word) {
    return _mm512_dpbf16_ps(sum, std::bit_cast<__m512bh>(weights), std::bit_cast<__m512bh>(word));
  }
  static __m512 to_float(Sum sum) { return sum; }
};

// Both sides must be bfloat16 already: nothing is rounded here.
template <int kBits>
bool is_bfloat16(const Plan &plan) {
  return plan.arithmetic == FDK_EXACT && plan.bits == kBits && plan.x_dtype == FDK_BF16 &&
         plan.codebook_is_bfloat16;
}

}  // namespace
}  // namespace fdk
