// Many tokens in AVX-512: weights are decoded once into a panel, which all tokens are multiplied
// by.
#pragma once

#include <immintrin.h>

#include <algorithm>

#include "kernel.h"
#include "x86/avx512_direct.h"

namespace fdk {
namespace {

inline constexpr int64_t kPanelTiles = 4;          // the register block of the panel path:
inline constexpr int64_t kPanelTokens = 6;         // 24 sums, 4 weights, 1 activation word
inline constexpr int64_t kPanelBytes = 192 << 10;  // decoded weights that stay in the L2 cache

// Many tokens: kPanelTiles tiles are decoded once for a range of blocks, then multiplied by all
// tokens. panel [vector][kPanelTiles][16 x 32 bits]; totals [token][kPanelTiles][16] float32.
template <typename A>
size_t panel_scratch_bytes(const Plan &plan) {
  if (plan.m <= kDirectTokens) return 0;
  const int64_t totals = plan.m * kPanelTiles * kTileRows * 4;
  const int64_t block_bytes = (kMaxBlock / step_k(A::kBits) + 2) * A::kVectors * kPanelTiles * 64;
  return static_cast<size_t>(totals + kPanelBytes + block_bytes);
}

// Blocks [block_begin, block_end), whose first word is `word`, for kTokens tokens.
template <typename A, int kTokens>
void panel_tokens(const Plan &plan, const Finish<A> &finish, const Prepared<A> &layout,
                  const void *prepared, const __m512i *panel, float *totals, int64_t tile,
                  int64_t tiles, int64_t token, size_t block_begin, size_t block_end,
                  int64_t word) {
  for (size_t b = block_begin; b < block_end; ++b) {
    const Block &block = plan.blocks[b];
    const int64_t vectors = (block.step_end - block.step_begin) * A::kVectors;
    const int32_t *words[kTokens];
    for (int t = 0; t < kTokens; ++t) words[t] = layout.token_words(prepared, token + t) + word;
    typename A::Sum sums[kTokens][kPanelTiles];  // never by address: they must stay in registers
    for (auto &of_token : sums)
      for (auto &sum : of_token) sum = A::zero();
    for (int64_t v = 0; v < vectors; ++v) {
      __m512i weights[kPanelTiles];
      for (int i = 0; i < kPanelTiles; ++i)
        weights[i] = _mm512_load_si512(panel + v * kPanelTiles + i);
      for (int t = 0; t < kTokens; ++t) {
        const __m512i word = _mm512_set1_epi32(words[t][v]);
        for (int i = 0; i < kPanelTiles; ++i)
          sums[t][i] = A::multiply_add(sums[t][i], weights[i], word);
      }
    }
    for (int i = 0; i < kPanelTiles; ++i) {
      // Tiles beyond the panel's end hold zeros; they borrow the first one's scales.
      const __m512 scales = load_tile_scales(plan, i < tiles ? tile + i : tile, block.group);
      for (int t = 0; t < kTokens; ++t) {
        float *total = totals + (t * kPanelTiles + i) * kTileRows;
        const __m512 added = finish.block(sums[t][i], layout.factors(prepared, token + t), b);
        _mm512_store_ps(total, _mm512_fmadd_ps(added, scales, _mm512_load_ps(total)));
      }
    }
    panel += vectors * kPanelTiles;
    word += vectors;
  }
}

template <typename A>
void run_panel(const Plan &plan, const A &tables, const Finish<A> &finish,
               const Prepared<A> &layout, const void *prepared, void *scratch, const Range &range,
               int64_t tile) {
  const A arithmetic = tables;  // a copy, which no store can change: it stays in registers
  const int64_t tiles = std::min(kPanelTiles, range.tile_end - tile);
  const int64_t tokens = range.token_end - range.token_begin;
  float *totals = static_cast<float *>(scratch);
  __m512i *panel = reinterpret_cast<__m512i *>(totals + tokens * kPanelTiles * kTileRows);
  std::fill(totals, totals + tokens * kPanelTiles * kTileRows, 0.0F);
  int64_t word = 0;
  for (size_t begin = 0; begin < plan.blocks.size();) {
    int64_t vectors = 0;
    size_t end = begin;
    for (; end < plan.blocks.size() && vectors * kPanelTiles * 64 < kPanelBytes; ++end) {
      const Block &block = plan.blocks[end];
      for (int64_t s = block.step_begin; s < block.step_end; ++s, vectors += A::kVectors)
        for (int64_t i = 0; i < kPanelTiles; ++i) {
          __m512i weights[A::kVectors];
          if (i < tiles) arithmetic.decode(plan.tile_packed(tile + i) + s * kStepBytes, weights);
          else
            for (auto &w : weights) w = _mm512_setzero_si512();
          for (int v = 0; v < A::kVectors; ++v)
            _mm512_store_si512(panel + (vectors + v) * kPanelTiles + i, weights[v]);
        }
    }
    int64_t t = 0;
    const auto at = [&](int64_t token) { return totals + token * kPanelTiles * kTileRows; };
    for (; t + kPanelTokens <= tokens; t += kPanelTokens)
      panel_tokens<A, kPanelTokens>(plan, finish, layout, prepared, panel, at(t), tile, tiles,
                                    range.token_begin + t, begin, end, word);
    for (; t + 3 <= tokens; t += 3)
      panel_tokens<A, 3>(plan, finish, layout, prepared, panel, at(t), tile, tiles,
                         range.token_begin + t, begin, end, word);
    for (; t < tokens; ++t)
      panel_tokens<A, 1>(plan, finish, layout, prepared, panel, at(t), tile, tiles,
                         range.token_begin + t, begin, end, word);
    word += vectors;
    begin = end;
  }
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t i = 0; i < tiles; ++i)
      store_sums(plan, range.token_begin + t, tile + i, range,
                 _mm512_load_ps(totals + (t * kPanelTiles + i) * kTileRows));
}

template <typename A>
void run(const Plan &plan, const void *prepared, void *scratch, const Range &range) {
  const A arithmetic(plan, range.codebook);
  const Finish<A> finish(plan, range.codebook);
  if (range.token_end - range.token_begin > kDirectTokens) {
    const Prepared<A> layout(plan);
    for (int64_t tile = range.tile_begin; tile < range.tile_end; tile += kPanelTiles)
      run_panel(plan, arithmetic, finish, layout, prepared, scratch, range, tile);
    return;
  }
  run_direct(plan, arithmetic, finish, prepared, range);
}

template <typename A>
constexpr Kernel make_kernel(const char *name, bool (*supports)(const Plan &)) {
  return {name,   supports,   prepared_bytes<A>, prepare<A>, panel_scratch_bytes<A>,
          run<A>, kPanelTiles};
}

}  // namespace
}  // namespace fdk
