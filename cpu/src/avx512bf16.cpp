// AVX-512 BF16 (Intel from Cooper Lake, AMD from Zen 4): bfloat16 activations in their own precision.
#if defined(__x86_64__)

#include "avx512.h"
#include "avx512_dense.h"
#include "levels.h"

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
      _mm256_storeu_si256(
          reinterpret_cast<__m256i *>(natural + 16 * i),
          _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(x[i]), 16)));
  }
  static Sum zero() { return _mm512_setzero_ps(); }
  static Sum multiply_add(Sum sum, __m512i weights, __m512i word) {
    return _mm512_dpbf16_ps(sum, std::bit_cast<__m512bh>(weights), std::bit_cast<__m512bh>(word));
  }
  static __m512 to_float(Sum sum) { return sum; }
};

// Both sides must be bfloat16 already: the codebook was rounded to the dtype of the scales.
template <int kBits>
bool supports(const Plan &plan) {
  return plan.arithmetic == FDK_EXACT && plan.bits == kBits && plan.x_dtype == FDK_BF16 &&
         plan.scales_dtype == FDK_BF16;
}

struct DenseProducts {
  using Pair = __m512i;
  static Pair load(__m512i words) { return words; }
  static __m512 multiply_add(__m512 sum, const Pair &a, const Pair &b) {
    return _mm512_dpbf16_ps(sum, std::bit_cast<__m512bh>(a), std::bit_cast<__m512bh>(b));
  }
};

constexpr Kernel kKernels[] = {
    make_kernel<BFloat16<8>>("avx512bf16.bfloat16_8bit", supports<8>),
    make_kernel<BFloat16<4>>("avx512bf16.bfloat16_4bit", supports<4>),
    make_kernel<BFloat16<2>>("avx512bf16.bfloat16_2bit", supports<2>),
    make_kernel<BFloat16<1>>("avx512bf16.bfloat16_1bit", supports<1>),
};

bool available() {
  return kAvx512VnniLevel.available() && __builtin_cpu_supports("avx512bf16");
}

// Intel's processors take 2.2 cycles for VDPBF16PS on 512 bits, that is 14.5 products a cycle, and do
// 32 in float32 (Emerald Rapids, 2026-11).
bool preferred() { return !__builtin_cpu_is("intel"); }

}  // namespace

const Level kAvx512Bf16Level = {"avx512bf16", available, kKernels, dense_rows<DenseProducts>,
                                nullptr,      nullptr,   nullptr,  preferred};

}  // namespace fdk

#endif
