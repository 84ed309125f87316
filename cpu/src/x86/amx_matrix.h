// AMX kernels for many tokens: weights are decoded by AVX-512 into the shape of matrix registers.
//
// Decoded vectors are 16 rows x 32 bits, and prepared activations are words of 32 bits in the same
// order: sixteen vectors one below the other are a matrix register of weights, sixteen words of
// sixteen tokens one of activations. Two groups of 16 tokens by two tiles are multiplied at a time.
// A block has sums of its own, which leave the registers for the float32 totals because scales differ
// from block to block; those of a block are added while the next one is multiplied.
#pragma once

#include <algorithm>

#include "kernel.h"
#include "x86/amx_activations.h"
#include "x86/avx512_outputs.h"
#include "x86/avx512_streams.h"

namespace fdk {
namespace {

inline constexpr int64_t kMatrixTiles = 8;  // tiles that are decoded together, for many tokens
// For up to this many, two: what is decoded stays in the L1 cache.
inline constexpr int64_t kFewMatrixTokens = 32;
// Of a tile's registers so many are decoded at a time: the L1 cache holds two tiles' and 32 tokens'.
inline constexpr int64_t kMatrixRegisters = 8;
inline constexpr int64_t kMatrixBytes = kMatrixRows * 64;

// Blocks [begin, end) of a plan, the first one at the register `index`.
struct Stretch {
  size_t begin, end;
  int64_t index;

  // Packed bytes of tile `tile` that are decoded after this stretch: its next blocks, or the first ones
  // of the tile `next`.
  const uint8_t *after(const Plan &plan, int64_t tile, int64_t next) const {
    if (end == plan.blocks.size()) return plan.tile_packed(next);
    return plan.tile_packed(tile) + plan.blocks[end].step_begin * kStepBytes;
  }
};

// scratch: totals [kMatrixTiles][tokens][16] float32; weights [kMatrixTiles][register]; sums [4].
template <typename A>
struct MatrixScratch {
  float *totals;
  char *weights;
  char *sums;
  static constexpr int64_t kTileBytes = (kMatrixRegisters + kMaxBlockRegisters<A>) * kMatrixBytes;

  MatrixScratch(void *scratch, int64_t tokens)
      : totals(static_cast<float *>(scratch)),
        weights(reinterpret_cast<char *>(totals + kMatrixTiles * tokens * kTileRows)),
        sums(weights + kMatrixTiles * kTileBytes) {}
  static size_t bytes(const Plan &plan) {
    return static_cast<size_t>(kMatrixTiles * (plan.m * kTileRows * 4 + kTileBytes) +
                               4 * kMatrixBytes);
  }
};

// The blocks of [stretch.begin, ...) that fit, decoded for the tiles from `tile` on.
template <typename A>
size_t decode_stretch(const Plan &plan, const A &tables, int64_t tile, int64_t tiles,
                      size_t begin, char *weights) {
  const A arithmetic = tables;  // a copy, which no store can change: it stays in registers
  size_t end = begin;
  for (int64_t i = 0; i < tiles; ++i) {
    auto *target = reinterpret_cast<__m512i *>(weights + i * MatrixScratch<A>::kTileBytes);
    int64_t vectors = 0;
    for (end = begin; end < plan.blocks.size() && vectors < kMatrixRegisters * kMatrixRows; ++end) {
      const Block &block = plan.blocks[end];
      int64_t at = vectors;
      for (int64_t s = block.step_begin; s < block.step_end; ++s, at += A::kVectors) {
        const uint8_t *step = plan.tile_packed(tile + i) + s * kStepBytes;
        __m512i decoded[A::kVectors];
        arithmetic.decode(step, decoded);
        for (int v = 0; v < A::kVectors; ++v) _mm512_store_si512(target + at + v, decoded[v]);
      }
      vectors += block_registers<A>(block) * kMatrixRows;
      for (; at < vectors; ++at) _mm512_store_si512(target + at, _mm512_setzero_si512());
    }
  }
  return end;
}

// What a block's sums add to the totals of `rows` tokens: sums x scales, and for integers the scale
// of the activations and the codebook's offset (see Finish).
template <typename A>
void add_block(const Finish<A> &finish, const BlockFactor *factors, __m512 scales, int64_t rows,
               const char *sums, float *totals) {
  if constexpr (A::kInteger) scales = _mm512_mul_ps(scales, _mm512_set1_ps(finish.factor));
  const __m512 ratio = _mm512_set1_ps(finish.ratio);
  for (int64_t r = 0; r < rows; ++r) {
    __m512 added;
    if constexpr (A::kInteger) {
      const __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(sums + r * 64));
      added = _mm512_mul_ps(_mm512_fmadd_ps(_mm512_set1_ps(factors[r].sum), ratio, sum),
                            _mm512_set1_ps(factors[r].scale));
    } else {
      added = _mm512_load_ps(reinterpret_cast<const float *>(sums + r * 64));
    }
    float *total = totals + r * kTileRows;
    _mm512_store_ps(total, _mm512_fmadd_ps(added, scales, _mm512_load_ps(total)));
  }
}

// Two tiles by up to 32 tokens: what multiply_stretch() works on.
struct MatrixWork {
  int64_t token, tokens;     // the first one, and how many
  int64_t tile, last_tile;   // the first of the two, and the last one that there is
  const char *weights;       // of the first tile
  char *sums;
  float *totals;             // of the first tile and token
  int64_t total_stride;      // to those of the second tile
  const uint8_t *ahead[2];   // packed bytes to ask memory for meanwhile, or null
};

// A stretch of two tiles by up to 32 tokens; kSecond: more than 16 of them.
template <typename A, bool kSecond>
void multiply_stretch(const Plan &plan, const Finish<A> &finish, const MatrixPrepared<A> &layout,
                      const void *prepared, const Stretch &stretch, const MatrixWork &work) {
  const int64_t first = std::min(work.tokens, kMatrixRows);
  const auto add = [&](size_t b) {
    for (int64_t i = 0; i < 2; ++i) {
      const __m512 scales = load_tile_scales(plan, std::min(work.tile + i, work.last_tile),
                                             plan.blocks[b].group);
      float *own = work.totals + i * work.total_stride;
      const char *sums = work.sums + i * kMatrixBytes;
      const BlockFactor *factors = layout.factors(prepared, b, work.token);
      add_block<A>(finish, factors, scales, first, sums, own);
      if constexpr (kSecond)
        add_block<A>(finish, factors + kMatrixRows, scales, work.tokens - kMatrixRows,
                     sums + 2 * kMatrixBytes, own + kMatrixRows * kTileRows);
    }
  };
  // Steps that one register of a tile was decoded from.
  constexpr int64_t lines = std::max<int64_t>(kMatrixRows / A::kVectors, 1);
  const char *words = layout.words(prepared, work.token, stretch.index);
  const char *second_words = words + (kSecond ? layout.registers * kMatrixBytes : 0);
  const char *weights = work.weights;
  const char *second_weights = weights + MatrixScratch<A>::kTileBytes;
  int64_t asked = 0;
  stores_before_tile_loads();
  for (size_t b = stretch.begin; b < stretch.end; ++b) {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kSecond) {
      _tile_zero(2);
      _tile_zero(3);
    }
    const int64_t count = block_registers<A>(plan.blocks[b]);
    for (int64_t i = 0; i < count; ++i) {
      _tile_loadd(4, words, 64);
      _tile_loadd(6, weights, 64);
      multiply_matrices<A, 0, 0>();
      _tile_loadd(7, second_weights, 64);
      multiply_matrices<A, 0, 1>();
      if constexpr (kSecond) {
        _tile_loadd(5, second_words, 64);
        multiply_matrices<A, 1, 0>();
        multiply_matrices<A, 1, 1>();
      }
      if (work.ahead[0] != nullptr)
        for (int64_t end = asked + lines; asked < end; ++asked) {
          prefetch(work.ahead[0] + asked * kStepBytes);
          prefetch(work.ahead[1] + asked * kStepBytes);
        }
      words += kMatrixBytes;
      second_words += kMatrixBytes;
      weights += kMatrixBytes;
      second_weights += kMatrixBytes;
    }
    if (b > stretch.begin) add(b - 1);
    _tile_stored(0, work.sums, 64);
    _tile_stored(1, work.sums + kMatrixBytes, 64);
    if constexpr (kSecond) {
      _tile_stored(2, work.sums + 2 * kMatrixBytes, 64);
      _tile_stored(3, work.sums + 3 * kMatrixBytes, 64);
    }
  }
  add(stretch.end - 1);
}

// `tiles` tiles from `tile` on, at most kMatrixTiles, for all tokens of the range.
template <typename A>
void run_matrix_tiles(const Plan &plan, const A &arithmetic, const Finish<A> &finish,
                      const MatrixPrepared<A> &layout, const void *prepared, void *scratch,
                      const Range &range, int64_t tile, int64_t tiles) {
  const int64_t tokens = range.token_end - range.token_begin;
  const int64_t total_stride = tokens * kTileRows;
  const MatrixScratch<A> own(scratch, tokens);
  std::fill(own.totals, own.totals + kMatrixTiles * total_stride, 0.0F);
  if (tiles % 2 != 0)  // the last pair's second tile: its sums are dropped
    std::memset(own.weights + tiles * MatrixScratch<A>::kTileBytes, 0, MatrixScratch<A>::kTileBytes);
  const int64_t last_tile = tile + tiles - 1;
  const auto next = [&](int64_t i) { return std::min(tile + tiles + i, range.tile_end - 1); };
  Stretch stretch{0, 0, 0};
  for (; stretch.begin < plan.blocks.size(); stretch.begin = stretch.end) {
    stretch.end = decode_stretch(plan, arithmetic, tile, tiles, stretch.begin, own.weights);
    for (int64_t t = 0; t < tokens; t += 2 * kMatrixRows)
      for (int64_t i = 0; i < tiles; i += 2) {
        MatrixWork work{range.token_begin + t,
                        std::min(tokens - t, 2 * kMatrixRows),
                        tile + i,
                        last_tile,
                        own.weights + i * MatrixScratch<A>::kTileBytes,
                        own.sums,
                        own.totals + i * total_stride + t * kTileRows,
                        total_stride,
                        {nullptr, nullptr}};
        for (int64_t j = 0; j < 2 && t == 0; ++j)
          work.ahead[j] =
              stretch.after(plan, std::min(tile + i + j, last_tile), next(i + j));
        if (work.tokens > kMatrixRows)
          multiply_stretch<A, true>(plan, finish, layout, prepared, stretch, work);
        else
          multiply_stretch<A, false>(plan, finish, layout, prepared, stretch, work);
      }
    for (size_t b = stretch.begin; b < stretch.end; ++b)
      stretch.index += block_registers<A>(plan.blocks[b]);
  }
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t i = 0; i < tiles; ++i)
      store_sums(plan, range.token_begin + t, tile + i, range,
                 _mm512_load_ps(own.totals + i * total_stride + t * kTileRows));
}

template <typename A>
size_t matrix_scratch_bytes(const Plan &plan) {
  return MatrixScratch<A>::bytes(plan);
}

template <typename A>
void run_matrix(const Plan &plan, const void *prepared, void *scratch, const Range &range) {
  const A arithmetic(plan, range.codebook);
  const Finish<A> finish(plan, range.codebook);
  const MatrixPrepared<A> layout(plan);
  const int64_t tokens = range.token_end - range.token_begin;
  const int64_t together = tokens > kFewMatrixTokens ? kMatrixTiles : 2;
  // Once a call: it takes as long as dozens of products. Rows beyond the last token hold zeros.
  configure_matrices(std::min(tokens, kMatrixRows),
                     tokens > kFewMatrixTokens ? kMatrixRows : tokens - kMatrixRows);
  for (int64_t tile = range.tile_begin; tile < range.tile_end; tile += together)
    run_matrix_tiles(plan, arithmetic, finish, layout, prepared, scratch, range, tile,
                     std::min(together, range.tile_end - tile));
  _tile_release();
}

// Blocks that fill less than half of their registers are as fast in AVX-512.
template <typename A>
bool fills_registers(const Plan &plan) {
  int64_t words = 0;
  int64_t registers = 0;
  for (const Block &block : plan.blocks) {
    words += (block.step_end - block.step_begin) * A::kVectors;
    registers += block_registers<A>(block);
  }
  return registers * kMatrixRows <= 2 * words;
}

template <typename A>
constexpr Kernel make_matrix_kernel(const char *name, bool (*supports)(const Plan &)) {
  return {name,           supports,      matrix_prepared_bytes<A>,
          prepare_matrix<A>, matrix_scratch_bytes<A>, run_matrix<A>, kMatrixTiles / 2};
}

}  // namespace
}  // namespace fdk
