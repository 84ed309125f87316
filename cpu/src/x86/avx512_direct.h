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
        totals[t][i] = _mm512_fmadd_ps(finish.block(sums[t][i], factors[t], b), scales, totals[t][i]);
    }
  }
  for (int t = 0; t < kTokens; ++t)
    for (int i = 0; i < kTiles; ++i) store_sums(plan, token + t, tile + i, range, totals[t][i]);
}

// All tokens of the range by the tiles from `tile` on, kTiles of them.
template <typename A, int kTiles>
void direct_tokens(const Plan &plan, const A &arithmetic, const Finish<A> &finish,
                   const Prepared<A> &layout, const void *prepared, const Range &range,
                   int64_t tile) {
  int64_t token = range.token_begin;
  if constexpr (kTiles == 1)
    for (; token + 8 <= range.token_end; token += 8)
      direct<A, 8, kTiles>(plan, arithmetic, finish, layout, prepared, range, token, tile);
  if constexpr (kTiles <= 2)
    for (; token + 4 <= range.token_end; token += 4)
      direct<A, 4, kTiles>(plan, arithmetic, finish, layout, prepared, range, token, tile);
  for (; token + 2 <= range.token_end; token += 2)
    direct<A, 2, kTiles>(plan, arithmetic, finish, layout, prepared, range, token, tile);
  for (; token < range.token_end; ++token)
    direct<A, 1, kTiles>(plan, arithmetic, finish, layout, prepared, range, token, tile);
}

template <typename A>
void run_direct(const Plan &plan, const A &arithmetic, const Finish<A> &finish,
                const void *prepared, const Range &range) {
  const Prepared<A> layout(plan);
  const int64_t tokens = range.token_end - range.token_begin;
  int64_t tile = range.tile_begin;
  // As many tiles as keep the sums of all tokens in registers.
  if (tokens < 4)
    for (; tile + 4 <= range.tile_end; tile += 4)
      direct_tokens<A, 4>(plan, arithmetic, finish, layout, prepared, range, tile);
  if (tokens < 8)
    for (; tile + 2 <= range.tile_end; tile += 2)
      direct_tokens<A, 2>(plan, arithmetic, finish, layout, prepared, range, tile);
  for (; tile < range.tile_end; ++tile)
    direct_tokens<A, 1>(plan, arithmetic, finish, layout, prepared, range, tile);
}

}  // namespace
}  // namespace fdk
