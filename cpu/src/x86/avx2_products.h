// Products in AVX2: few tokens with weights decoded in registers, many with weights decoded once.
#pragma once

#include <immintrin.h>

#include <algorithm>

#include "kernel.h"
#include "numeric.h"
#include "x86/avx2_activations.h"

namespace fdk {
namespace {

constexpr int64_t kDirectTokens = 3;
constexpr int64_t kPanelTokens = 6;  // 12 sums, 2 weights, 1 activation word
constexpr int64_t kAhead = 1024;     // bytes of packed weights that are asked for before their use

inline void store_half(const Plan &plan, int64_t token, int64_t tile, const Range &range,
                       const __m256 halves[2]) {
  alignas(32) float rows[kTileRows];
  _mm256_store_ps(rows, halves[0]);
  _mm256_store_ps(rows + kHalfRows, halves[1]);
  store_tile(plan, token, tile, range, rows);
}

// kTokens tokens by kTiles tiles side by side.
template <typename A, int kTokens, int kTiles>
void direct(const Plan &plan, const A &arithmetic, const Levels *levels, const Prepared<A> &layout,
            const void *prepared, const Range &range, int64_t token, int64_t tile) {
  const bool int8 = plan.arithmetic == FDK_INT8;
  const int32_t *words[kTokens];
  __m256 totals[kTokens][kTiles][2];
  for (int t = 0; t < kTokens; ++t) {
    words[t] = layout.words(prepared, token + t);
    for (auto &of_tile : totals[t]) of_tile[0] = of_tile[1] = _mm256_setzero_ps();
  }
  for (size_t b = 0; b < plan.blocks.size(); ++b) {
    const Block &block = plan.blocks[b];
    typename A::Sum sums[kTokens][kTiles][2];
    for (auto &of_token : sums)
      for (auto &of_tile : of_token) of_tile[0] = of_tile[1] = A::zero();
    for (int64_t s = block.step_begin; s < block.step_end; ++s) {
      for (int i = 0; i < kTiles; ++i) {
        const uint8_t *step = plan.tile_packed(tile + i) + s * kStepBytes;
        _mm_prefetch(reinterpret_cast<const char *>(step + kAhead), _MM_HINT_T0);
        for (int half = 0; half < 2; ++half)
          arithmetic.decode(step, half, [&](int v, __m256i weights) {
            for (int t = 0; t < kTokens; ++t)
              sums[t][i][half] =
                  A::multiply_add(sums[t][i][half], weights, _mm256_set1_epi32(words[t][v]));
          });
      }
      for (auto &of_token : words) of_token += A::kVectors;
    }
    for (int i = 0; i < kTiles; ++i)
      for (int half = 0; half < 2; ++half) {
        const __m256 scales = load_half_scales(plan, tile + i, block.group, half);
        for (int t = 0; t < kTokens; ++t)
          totals[t][i][half] =
              _mm256_fmadd_ps(finish_block<A>(levels, int8, sums[t][i][half],
                                              layout.factors(prepared, token + t)[b]),
                              scales, totals[t][i][half]);
      }
  }
  for (int t = 0; t < kTokens; ++t)
    for (int i = 0; i < kTiles; ++i) store_half(plan, token + t, tile + i, range, totals[t][i]);
}

// One block of a tile times kTokens tokens, from decoded weights [vector][half].
template <typename A, int kTokens>
void panel_block(const Plan &plan, const Levels *levels, const Prepared<A> &layout,
                 const void *prepared, const __m256i *weights, int64_t vectors, int64_t word,
                 int64_t tile, size_t b, int64_t token, float *totals) {
  typename A::Sum sums[kTokens][2];
  const int32_t *words[kTokens];
  for (int t = 0; t < kTokens; ++t) {
    words[t] = layout.words(prepared, token + t) + word;
    sums[t][0] = sums[t][1] = A::zero();
  }
  for (int64_t v = 0; v < vectors; ++v)
    for (int t = 0; t < kTokens; ++t) {
      const __m256i x = _mm256_set1_epi32(words[t][v]);
      sums[t][0] = A::multiply_add(sums[t][0], weights[2 * v], x);
      sums[t][1] = A::multiply_add(sums[t][1], weights[2 * v + 1], x);
    }
  for (int half = 0; half < 2; ++half) {
    const __m256 scales = load_half_scales(plan, tile, plan.blocks[b].group, half);
    for (int t = 0; t < kTokens; ++t) {
      float *total = totals + t * kTileRows + half * kHalfRows;
      const __m256 added = finish_block<A>(levels, plan.arithmetic == FDK_INT8, sums[t][half],
                                           layout.factors(prepared, token + t)[b]);
      _mm256_store_ps(total, _mm256_fmadd_ps(added, scales, _mm256_load_ps(total)));
    }
  }
}

// scratch: totals [tokens][16].
template <typename A>
size_t scratch_bytes(const Plan &plan) {
  return static_cast<size_t>(plan.m * kTileRows) * sizeof(float);
}

// A tile by all tokens of the range, block by block.
template <typename A>
void run_panel(const Plan &plan, const A &arithmetic, const Levels *levels,
               const Prepared<A> &layout, const void *prepared, float *totals, const Range &range,
               int64_t tile) {
  const int64_t tokens = range.token_end - range.token_begin;
  std::fill(totals, totals + tokens * kTileRows, 0.0F);
  int64_t word = 0;
  for (size_t b = 0; b < plan.blocks.size(); ++b) {
    const Block &block = plan.blocks[b];
    alignas(32) __m256i weights[kMaxBlockSteps * kMaxVectors];
    int64_t vectors = 0;
    for (int64_t s = block.step_begin; s < block.step_end; ++s, vectors += A::kVectors) {
      const uint8_t *step = plan.tile_packed(tile) + s * kStepBytes;
      _mm_prefetch(reinterpret_cast<const char *>(step + kAhead), _MM_HINT_T0);
      for (int half = 0; half < 2; ++half)
        arithmetic.decode(step, half, [&](int v, __m256i decoded) {
          _mm256_store_si256(weights + (vectors + v) * 2 + half, decoded);
        });
    }
    const auto multiply = [&]<int kTokens>(int64_t t) {
      panel_block<A, kTokens>(plan, levels, layout, prepared, weights, vectors, word, tile, b,
                              range.token_begin + t, totals + t * kTileRows);
    };
    int64_t t = 0;
    for (; t + kPanelTokens <= tokens; t += kPanelTokens)
      multiply.template operator()<kPanelTokens>(t);
    switch (tokens - t) {
      case 5: multiply.template operator()<5>(t); break;
      case 4: multiply.template operator()<4>(t); break;
      case 3: multiply.template operator()<3>(t); break;
      case 2: multiply.template operator()<2>(t); break;
      case 1: multiply.template operator()<1>(t); break;
      default: break;
    }
    word += vectors;
  }
  for (int64_t t = 0; t < tokens; ++t)
    store_tile(plan, range.token_begin + t, tile, range, totals + t * kTileRows);
}

template <typename A>
void run(const Plan &plan, const void *prepared, void *scratch, const Range &range) {
  static_assert(A::kVectors <= kMaxVectors);
  const A arithmetic(plan, range.codebook);
  const Levels *levels = A::kInteger ? plan.levels + range.codebook : nullptr;
  const Prepared<A> layout(plan);
  const int64_t tokens = range.token_end - range.token_begin;
  int64_t tile = range.tile_begin;
  if (tokens > kDirectTokens) {
    for (; tile < range.tile_end; ++tile)
      run_panel(plan, arithmetic, levels, layout, prepared, static_cast<float *>(scratch), range,
                tile);
    return;
  }
  const auto few = [&]<int kTiles>() {
    const auto multiply = [&]<int kTokens>() {
      direct<A, kTokens, kTiles>(plan, arithmetic, levels, layout, prepared, range,
                                 range.token_begin, tile);
    };
    if (tokens == 1) multiply.template operator()<1>();
    if (tokens == 2) multiply.template operator()<2>();
    if (tokens == 3) multiply.template operator()<3>();
  };
  for (; tile + 2 <= range.tile_end; tile += 2) few.template operator()<2>();
  if (tile < range.tile_end) few.template operator()<1>();
}

template <typename A>
constexpr Kernel make_kernel(const char *name, bool (*supports)(const Plan &)) {
  return {name, supports, prepared_bytes<A>, prepare<A>, scratch_bytes<A>, run<A>, 2};
}

}  // namespace
}  // namespace fdk
