// AVX-512 BF16 (Intel from Cooper Lake, AMD from Zen 4): bfloat16 activations in their own precision.
#if defined(__x86_64__)

#include "avx512.h"
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

// Dense rows [n, k] lie along k: four rows and up to four tokens share their loads, 32 columns at
// a time; a masked load ends a row whose length is not a multiple of 32.
template <int kRows, int kTokens>
void dense_block(const fdk_dense_args &args, int64_t row, int64_t token) {
  const int64_t k = args.in_features;
  __m512 sums[kRows][kTokens];
  for (auto &of_row : sums)
    for (__m512 &sum : of_row) sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < k; i += 32) {
    const __mmask32 mask =
        k - i >= 32 ? ~__mmask32{0} : static_cast<__mmask32>((uint64_t{1} << (k - i)) - 1);
    __m512i x[kTokens];
    for (int t = 0; t < kTokens; ++t)
      x[t] = _mm512_maskz_loadu_epi16(mask, args.x + (token + t) * k + i);
    for (int r = 0; r < kRows; ++r) {
      const uint16_t *weight = args.weight + (row + r) * k + i;
      _mm_prefetch(reinterpret_cast<const char *>(weight) + kPrefetchBytes, _MM_HINT_T0);
      const __m512i w = _mm512_maskz_loadu_epi16(mask, weight);
      for (int t = 0; t < kTokens; ++t)
        sums[r][t] = _mm512_dpbf16_ps(sums[r][t], std::bit_cast<__m512bh>(w),
                                      std::bit_cast<__m512bh>(x[t]));
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < kTokens; ++t)
      args.y[(token + t) * args.out_features + row + r] =
          f32_to_bf16(_mm512_reduce_add_ps(sums[r][t]));
}

template <int kRows>
void dense_tokens(const fdk_dense_args &args, int64_t row) {
  int64_t token = 0;
  for (; token + 4 <= args.m; token += 4) dense_block<kRows, 4>(args, row, token);
  for (; token < args.m; ++token) dense_block<kRows, 1>(args, row, token);
}

void dense_rows(const fdk_dense_args &args, int64_t row_begin, int64_t row_end) {
  int64_t row = row_begin;
  for (; row + 4 <= row_end; row += 4) dense_tokens<4>(args, row);
  for (; row < row_end; ++row) dense_tokens<1>(args, row);
}

constexpr Kernel kKernels[] = {
    make_kernel<BFloat16<8>>("avx512bf16.bfloat16_8bit", supports<8>),
    make_kernel<BFloat16<4>>("avx512bf16.bfloat16_4bit", supports<4>),
    make_kernel<BFloat16<2>>("avx512bf16.bfloat16_2bit", supports<2>),
    make_kernel<BFloat16<1>>("avx512bf16.bfloat16_1bit", supports<1>),
};

bool available() {
  return kAvx512VnniLevel.available() && __builtin_cpu_supports("avx512bf16");
}

}  // namespace

const Level kAvx512Bf16Level = {"avx512bf16", available, kKernels, dense_rows, nullptr, nullptr};

}  // namespace fdk

#endif
