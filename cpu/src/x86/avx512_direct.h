// Few tokens in AVX-512: weights are decoded in registers, and read once.
#pragma once

#include <immintrin.h>

#include "kernel.h"
#include "x86/avx512_outputs.h"
#include "x86/avx512_streams.h"

namespace fdk {
namespace {

// Few tokens: kTiles tiles side by side, weights decoded in registers. Several tiles are several
// streams of memory and several independent chains of sums, and share the words of x.
template <typename A, int kTokens, int kTiles>
void direct(const Plan &plan, const A &arithmetic, const Finish<A> &finish,
            const Prepared<A> &layout, const void *prepared, const Range &range, int64_t token,
            int64_t tile) {
  const int32_t *words[kTokens];
  const BlockFactor *factors[kTokens];
  __m512 totals[kTokens][kTiles];
  for (int t = 0; t < kTokens; ++t) {
    words[t] = layout.token_words(prepared, token + t);
    factors[t] = layout.factors(prepared, token + t);
    for (__m512 &total : totals[t]) total = _mm512_setzero_ps();
  }
  const Streams<kTiles> streams(plan, range, tile);
  int64_t word = 0;
  for (size_t b = 0; b < plan.blocks.size(); ++b) {
    const Block &block = plan.blocks[b];
    typename A::Sum sums[kTokens][kTiles];
    for (auto &of_token : sums)
      for (auto &sum : of_token) sum = A::zero();
    for (int64_t s = block.step_begin; s < block.step_end; ++s, word += A::kVectors) {
      const int64_t ahead = streams.ahead(s);
      for (int i = 0; i < kTiles; ++i) {
        __m512i weights[A::kVectors];
        arithmetic.decode(streams.step(s, i, ahead), weights);
        for (int v = 0; v < A::kVectors; ++v)
          for (int t = 0; t < kTokens; ++t)
            sums[t][i] =
                A::multiply_add(sums[t][i], weights[v], _mm512_set1_epi32(words[t][word + v]));
      }
    }
    for (int i = 0; i < kTiles; ++i) {
      streams.fetch_scales(block.group, i);
      const __m512 scales = load_tile_scales(plan, tile + i, block.group);
      for (int t = 0; t < kTokens; ++t)
        totals[t][i] =
            _mm512_fmadd_ps(finish.block(sums[t][i], factors[t], b), scales, totals[t][i]);
    }
  }
  for (int t = 0; t < kTokens; ++t)
    for (int i = 0; i < kTiles; ++i) store_sums(plan, token + t, tile + i, range, totals[t][i]);
}

// All kTokens tokens of the range: every number has code of its own, so that weights are decoded
// once.
template <typename A, int kTokens>
void direct_tokens(const Plan &plan, const A &arithmetic, const Finish<A> &finish,
                   const void *prepared, const Range &range) {
  // As many tiles side by side as keep the sums of all tokens in registers.
  constexpr int kTiles = kTokens <= 3 ? 4 : kTokens <= 6 ? 2 : 1;
  const Prepared<A> layout(plan);
  const int64_t token = range.token_begin;
  int64_t tile = range.tile_begin;
  for (; tile + kTiles <= range.tile_end; tile += kTiles)
    direct<A, kTokens, kTiles>(plan, arithmetic, finish, layout, prepared, range, token, tile);
  for (; tile < range.tile_end; ++tile)
    direct<A, kTokens, 1>(plan, arithmetic, finish, layout, prepared, range, token, tile);
}

inline constexpr int64_t kDirectTokens = 8;  // at most

template <typename A>
void run_direct(const Plan &plan, const A &arithmetic, const Finish<A> &finish,
                const void *prepared, const Range &range) {
  switch (range.token_end - range.token_begin) {
    case 1: return direct_tokens<A, 1>(plan, arithmetic, finish, prepared, range);
    case 2: return direct_tokens<A, 2>(plan, arithmetic, finish, prepared, range);
    case 3: return direct_tokens<A, 3>(plan, arithmetic, finish, prepared, range);
    case 4: return direct_tokens<A, 4>(plan, arithmetic, finish, prepared, range);
    case 5: return direct_tokens<A, 5>(plan, arithmetic, finish, prepared, range);
    case 6: return direct_tokens<A, 6>(plan, arithmetic, finish, prepared, range);
    case 7: return direct_tokens<A, 7>(plan, arithmetic, finish, prepared, range);
    default: return direct_tokens<A, 8>(plan, arithmetic, finish, prepared, range);
  }
}

}  // namespace
}  // namespace fdk
