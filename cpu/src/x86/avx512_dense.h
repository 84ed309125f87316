// Dense bfloat16 products in AVX-512, over the way in which 32 pairs are multiplied.
#pragma once

#include <immintrin.h>

#include "x86/avx512_streams.h"

namespace fdk {
namespace {

// Dense rows [n, k] lie along k: four rows and up to four tokens share their loads, 32 columns at
// a time; a masked load ends a row whose length is not a multiple of 32.
template <typename Products, int kRows, int kTokens>
void dense_block(const fdk_dense_args &args, int64_t row, int64_t token) {
  const int64_t k = args.in_features;
  __m512 sums[kRows][kTokens];
  for (auto &of_row : sums)
    for (__m512 &sum : of_row) sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < k; i += 32) {
    const __mmask32 mask =
        k - i >= 32 ? ~__mmask32{0} : static_cast<__mmask32>((uint64_t{1} << (k - i)) - 1);
    typename Products::Pair x[kTokens];
    for (int t = 0; t < kTokens; ++t)
      x[t] = Products::load(_mm512_maskz_loadu_epi16(mask, args.x + (token + t) * k + i));
    for (int r = 0; r < kRows; ++r) {
      const uint16_t *weight = args.weight + (row + r) * k + i;
      prefetch(reinterpret_cast<const char *>(weight) + kPrefetchBytes);
      const typename Products::Pair w = Products::load(_mm512_maskz_loadu_epi16(mask, weight));
      for (int t = 0; t < kTokens; ++t) sums[r][t] = Products::multiply_add(sums[r][t], w, x[t]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < kTokens; ++t)
      args.y[(token + t) * args.out_features + row + r] =
          f32_to_bf16(_mm512_reduce_add_ps(sums[r][t]));
}

template <typename Products, int kRows>
void dense_tokens(const fdk_dense_args &args, int64_t row) {
  int64_t token = 0;
  for (; token + 4 <= args.m; token += 4) dense_block<Products, kRows, 4>(args, row, token);
  for (; token < args.m; ++token) dense_block<Products, kRows, 1>(args, row, token);
}

template <typename Products>
void dense_rows(const fdk_dense_args &args, int64_t row_begin, int64_t row_end) {
  int64_t row = row_begin;
  for (; row + 4 <= row_end; row += 4) dense_tokens<Products, 4>(args, row);
  for (; row < row_end; ++row) dense_tokens<Products, 1>(args, row);
}

}  // namespace
}  // namespace fdk
