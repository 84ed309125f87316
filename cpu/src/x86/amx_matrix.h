// AMX kernels for many tokens: weights are decoded by AVX-512 into the shape of matrix registers.
//
// Decoded vectors are 16 rows x 32 bits, and prepared activations are words of 32 bits in the same
// order: sixteen vectors one below the other are a matrix register of weights, sixteen words of
// sixteen tokens one of activations. Two groups of 16 tokens by two tiles are multiplied at a time.
// A block has sums of its own, which leave the registers for the float32 totals because scales
// differ from block to block; those of a block are added between the products of the next one.
#pragma once

#include <algorithm>

#include "kernel.h"
#include "x86/amx_activations.h"
#include "x86/avx512_outputs.h"
#include "x86/avx512_streams.h"

namespace fdk {
namespace {

// Words that take more leave the L2 cache before they are read again.
inline constexpr size_t kMatrixCached = 1 << 20;
// Tiles that share what is read of the words: two while the words stay in the L2 cache,
// kMatrixTiles when they come from further away. They are multiplied by kMatrixTokens before the
// next ones are decoded: the totals of both stay in the L2 cache. Codes of 8 bits take longest to
// decode, which more tokens share.
template <typename A>
inline constexpr int64_t kMatrixTiles = A::kBits == 8 ? 16 : 32;
template <typename A>
inline constexpr int64_t kMatrixTokens = A::kBits == 8 ? 512 : 256;
template <typename A>
int64_t tiles_together(const MatrixPrepared<A> &layout) {
  return layout.bytes() <= kMatrixCached ? 2 : kMatrixTiles<A>;
}
// Tiles that a thread takes are a multiple of these: small enough for many threads.
inline constexpr int64_t kMatrixPiece = 8;
// Of a tile's registers so many are decoded at a time: the L1 cache holds two tiles' and 32
// tokens'.
inline constexpr int64_t kMatrixRegisters = 8;

// Blocks [begin, end) of a plan, the first one at the register `index`.
struct BlockRange {
  size_t begin, end;
  int64_t index;

  // Packed bytes of tile `tile` that are decoded after this range: its next blocks, or the first
  // ones of the tile `next`.
  const uint8_t *after(const Plan &plan, int64_t tile, int64_t next) const {
    if (end == plan.blocks.size()) return plan.tile_packed(next);
    return plan.tile_packed(tile) + plan.blocks[end].step_begin * kStepBytes;
  }
};

// scratch: totals [kMatrixTiles][tokens][16] float32; of two tiles weights [2][register], sums [4]
// and scales [2][block of a range][16] float32.
template <typename A>
struct MatrixScratch {
  float *totals;
  char *weights;
  char *sums;
  float *scales;
  static constexpr int64_t kTileBytes = (kMatrixRegisters + kMaxBlockRegisters<A>)*kMatrixBytes;
  static constexpr int64_t kTileScales =
      kMatrixRegisters * kTileRows;  // a block has a register or more

  MatrixScratch(void *scratch, int64_t tokens)
      : totals(static_cast<float *>(scratch)),
        weights(reinterpret_cast<char *>(totals + kMatrixTiles<A> * tokens * kTileRows)),
        sums(weights + 2 * kTileBytes),
        scales(reinterpret_cast<float *>(sums + 4 * kMatrixBytes)) {}
  static size_t bytes(const Plan &plan) {
    return static_cast<size_t>(kMatrixTiles<A> * std::min(plan.m, kMatrixTokens<A>) * kTileRows *
                                   4 +
                               2 * (kTileBytes + kTileScales * 4) + 4 * kMatrixBytes);
  }
};

// The blocks of [begin, ...) that fit: a tile's weights decoded, and its scales (times the step of
// integer levels).
template <typename A>
size_t decode_range(const Plan &plan, const A &tables, const Finish<A> &finish, size_t begin,
                    int64_t tile, char *weights, float *scales) {
  const A arithmetic = tables;  // a copy, which no store can change: it stays in registers
  auto *target = reinterpret_cast<__m512i *>(weights);
  int64_t vectors = 0;
  size_t end = begin;
  for (; end < plan.blocks.size() && vectors < kMatrixRegisters * kMatrixRows; ++end) {
    const Block &block = plan.blocks[end];
    _mm512_store_ps(scales, _mm512_mul_ps(load_tile_scales(plan, tile, block.group),
                                          _mm512_set1_ps(finish.factor)));
    scales += kTileRows;
    int64_t at = vectors;
    for (int64_t s = block.step_begin; s < block.step_end; ++s, at += A::kVectors) {
      __m512i decoded[A::kVectors];
      arithmetic.decode(plan.tile_packed(tile) + s * kStepBytes, decoded);
      for (int v = 0; v < A::kVectors; ++v) _mm512_store_si512(target + at + v, decoded[v]);
    }
    vectors += block_registers<A>(block) * kMatrixRows;
    for (; at < vectors; ++at) _mm512_store_si512(target + at, _mm512_setzero_si512());
  }
  return end;
}

// What a block's sums add to the totals of a token: sums x scales, and for integers the scale of
// the activations and the codebook's offset (see MatrixPrepared).
template <typename A>
inline void add_row(const MatrixFactor *factor, __m512 scales, const char *sums, float *total) {
  __m512 added;
  if constexpr (A::kInteger)
    added = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums)),
                            _mm512_set1_ps(factor->scale), _mm512_set1_ps(factor->offset));
  else added = _mm512_load_ps(reinterpret_cast<const float *>(sums));
  _mm512_store_ps(total, _mm512_fmadd_ps(added, scales, _mm512_load_ps(total)));
}

template <typename A>
[[gnu::always_inline]] inline void add_block(const MatrixFactor *factors, __m512 scales,
                                             int64_t rows, const char *sums, float *totals) {
  const auto add = [&](int64_t r) {
    add_row<A>(factors + r, scales, sums + r * 64, totals + r * kTileRows);
  };
  if (rows == kMatrixRows) {
    // Without a loop's own instructions more of this is in flight beside the products.
    for (int64_t r = 0; r < kMatrixRows; ++r) add(r);
  } else {
    for (int64_t r = 0; r < rows; ++r) add(r);
  }
}

// Words of activations to ask the L3 cache for: so many lines of each register; or null.
struct WordsAhead {
  const char *begin = nullptr;
  int64_t lines = 0;
};

// Two tiles by up to 32 tokens: what multiply_range() works on.
struct MatrixWork {
  int64_t token, tokens;  // the first one, and how many
  const char *weights;    // of the first tile
  const float *scales;    // of the first tile
  char *sums;
  float *totals;            // of the first tile and token
  int64_t total_stride;     // to those of the second tile
  const uint8_t *ahead[2];  // packed bytes to ask memory for meanwhile, or null
  WordsAhead words_ahead;
};

// A range of blocks of two tiles by up to 32 tokens; kSecond: more than 16 of them.
//
// A store of sums waits for their products, and what follows it waits with it. So where there are
// four, they are stored when the products of two others have begun: the last ones of a block beside
// the first of the next.
template <typename A, bool kSecond>
[[gnu::noinline]] void multiply_range(const Plan &plan, const MatrixPrepared<A> &layout,
                                      const void *prepared, int64_t codebook,
                                      const BlockRange &block_range, const MatrixWork &work) {
  // Adds up the sums of tokens `group` by tile `i` that the block before `end` left, if there is
  // one. As calls they took the whole product 7% longer.
  const MatrixFactor *factors = layout.factors(prepared, codebook, block_range.begin, work.token);
  const auto add_before = [&](size_t end, int64_t group, int64_t i) __attribute__((always_inline)) {
    if (end == block_range.begin) return;
    const auto b = static_cast<int64_t>(end - 1 - block_range.begin);
    const __m512 scales =
        _mm512_load_ps(work.scales + i * MatrixScratch<A>::kTileScales + b * kTileRows);
    add_block<A>(factors + b * layout.tokens + group * kMatrixRows, scales,
                 std::min(work.tokens - group * kMatrixRows, kMatrixRows),
                 work.sums + (2 * group + i) * kMatrixBytes,
                 work.totals + i * work.total_stride + group * kMatrixRows * kTileRows);
  };
  // Steps that one register of a tile was decoded from.
  constexpr int64_t lines = std::max<int64_t>(kMatrixRows / A::kVectors, 1);
  const char *words = layout.words(prepared, work.token, block_range.index);
  const char *second_words = words + (kSecond ? layout.registers * kMatrixBytes : 0);
  const char *weights = work.weights;
  const char *second_weights = weights + MatrixScratch<A>::kTileBytes;
  const char *words_ahead = work.words_ahead.begin;
  int64_t asked = 0;
  const auto next_register = [&] {
    if (work.ahead[0] != nullptr)
      for (int64_t end = asked + lines; asked < end; ++asked) {
        prefetch_far(work.ahead[0] + asked * kStepBytes);
        prefetch_far(work.ahead[1] + asked * kStepBytes);
      }
    if (words_ahead != nullptr) {
      for (int64_t i = 0; i < work.words_ahead.lines; ++i) prefetch_far(words_ahead + i * 64);
      words_ahead += kMatrixBytes;
    }
    words += kMatrixBytes;
    second_words += kMatrixBytes;
    weights += kMatrixBytes;
    second_weights += kMatrixBytes;
  };
  // The products of one register of block `b`, its first and its last one or not. Beside the last
  // one's the sums of the block before are added up.
  const auto multiply = [&](auto first, auto last, size_t b) {
    const bool left = first && b > block_range.begin;  // sums of the block before
    if constexpr (first) _tile_zero(0);
    if constexpr (first && !kSecond) _tile_zero(1);
    _tile_loadd(4, words, 64);
    _tile_loadd(6, weights, 64);
    multiply_matrices<A, 0, 0>();
    if constexpr (last) add_before(b, 0, 0);
    if constexpr (kSecond) {
      if (left) store_matrix<2>(work.sums);
    } else {
      if constexpr (last) store_matrix<0>(work.sums);
    }
    if constexpr (first && kSecond) _tile_zero(1);
    _tile_loadd(7, second_weights, 64);
    multiply_matrices<A, 0, 1>();
    if constexpr (last) add_before(b, 0, 1);
    if constexpr (kSecond) {
      if (left) store_matrix<3>(work.sums);
      if constexpr (first) _tile_zero(2);
      _tile_loadd(5, second_words, 64);
      multiply_matrices<A, 1, 0>();
      if constexpr (last) {
        store_matrix<0>(work.sums);
        add_before(b, 1, 0);
      }
      if constexpr (first) _tile_zero(3);
      multiply_matrices<A, 1, 1>();
      if constexpr (last) {
        store_matrix<1>(work.sums);
        add_before(b, 1, 1);
      }
    } else {
      if constexpr (last) store_matrix<1>(work.sums);
    }
    next_register();
  };
  constexpr std::true_type yes;
  constexpr std::false_type no;
  stores_before_tile_loads();
  for (size_t b = block_range.begin; b < block_range.end; ++b) {
    int64_t left = block_registers<A>(plan.blocks[b]);
    if (left == 1) {
      multiply(yes, yes, b);
      continue;
    }
    multiply(yes, no, b);
    for (; left > 2; --left) multiply(no, no, b);
    multiply(no, yes, b);
  }
  if constexpr (kSecond) {
    store_matrix<2>(work.sums);
    store_matrix<3>(work.sums);
  }
  for (int64_t group = 0; group < (kSecond ? 2 : 1); ++group)
    for (int64_t i = 0; i < 2; ++i) add_before(block_range.end, group, i);
}

// `tiles` tiles from `tile` on, at most kMatrixTiles, for all tokens of the range.
template <typename A>
void run_matrix_tiles(const Plan &plan, const A &arithmetic, const Finish<A> &finish,
                      const MatrixPrepared<A> &layout, const void *prepared, void *scratch,
                      const Range &range, int64_t tile, int64_t tiles) {
  const int64_t tokens = range.token_end - range.token_begin;
  const int64_t total_stride = tokens * kTileRows;
  const MatrixScratch<A> own(scratch, tokens);
  std::fill(own.totals, own.totals + ceil_div(tiles, int64_t{2}) * 2 * total_stride, 0.0F);
  const int64_t last_tile = tile + tiles - 1;
  const auto next = [&](int64_t i) { return std::min(tile + tiles + i, range.tile_end - 1); };
  // Words that come from the L3 cache are asked for while the range before is multiplied, a part of
  // each register's 32 lines beside every pair of tiles.
  const int64_t pairs = ceil_div(tiles, int64_t{2});
  const int64_t lines = layout.bytes() > kMatrixCached ? ceil_div(2 * kMatrixRows, pairs) : 0;
  const auto words_ahead = [&](int64_t t, int64_t pair, int64_t index) -> WordsAhead {
    const int64_t line = pair * lines;
    const int64_t token = t + line / kMatrixRows * kMatrixRows;
    if (lines == 0 || token >= tokens) return {};
    return {layout.words(prepared, range.token_begin + token, index) + line % kMatrixRows * 64,
            lines};
  };
  BlockRange block_range{0, 0, 0};
  for (; block_range.begin < plan.blocks.size(); block_range.begin = block_range.end) {
    int64_t registers = 0;
    for (int64_t i = 0; i < tiles; i += 2) {
      // Two tiles, which stay in the L1 cache until all tokens have been multiplied by them.
      for (int64_t j = 0; j < 2; ++j) {
        char *weights = own.weights + j * MatrixScratch<A>::kTileBytes;
        float *scales = own.scales + j * MatrixScratch<A>::kTileScales;
        if (i + j < tiles) {
          block_range.end = decode_range(plan, arithmetic, finish, block_range.begin, tile + i + j,
                                         weights, scales);
        } else {  // there is one: the other's sums are dropped
          std::memset(weights, 0, MatrixScratch<A>::kTileBytes);
          std::fill(scales, scales + MatrixScratch<A>::kTileScales, 0.0F);
        }
      }
      if (i == 0)
        for (size_t b = block_range.begin; b < block_range.end; ++b)
          registers += block_registers<A>(plan.blocks[b]);
      const int64_t next_index =
          block_range.end == plan.blocks.size() ? 0 : block_range.index + registers;
      for (int64_t t = 0; t < tokens; t += 2 * kMatrixRows) {
        MatrixWork work{range.token_begin + t,
                        std::min(tokens - t, 2 * kMatrixRows),
                        own.weights,
                        own.scales,
                        own.sums,
                        own.totals + i * total_stride + t * kTileRows,
                        total_stride,
                        {nullptr, nullptr},
                        words_ahead(t, i / 2, next_index)};
        for (int64_t j = 0; j < 2 && t == 0; ++j)
          work.ahead[j] = block_range.after(plan, std::min(tile + i + j, last_tile), next(i + j));
        if (work.tokens > kMatrixRows)
          multiply_range<A, true>(plan, layout, prepared, range.codebook, block_range, work);
        else multiply_range<A, false>(plan, layout, prepared, range.codebook, block_range, work);
      }
    }
    block_range.index += registers;
  }
  // The rows of y lie far apart: each is asked for some stores ahead.
  constexpr int64_t rows_ahead = 16;
  const int64_t y_size = static_cast<int64_t>(dtype_size(plan.y_dtype));
  const auto ask_for = [&](int64_t t) {
    const char *begin = static_cast<const char *>(plan.y) +
                        ((range.token_begin + t) * plan.n + tile * kTileRows) * y_size;
    for (int64_t at = 0; at < tiles * kTileRows * y_size; at += 64) prefetch(begin + at);
  };
  for (int64_t t = 0; t < tokens; ++t) {
    if (t + rows_ahead < tokens) ask_for(t + rows_ahead);
    for (int64_t i = 0; i < tiles; ++i)
      store_sums(plan, range.token_begin + t, tile + i, range,
                 _mm512_load_ps(own.totals + i * total_stride + t * kTileRows));
  }
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
  const int64_t together = tiles_together(layout);
  const int64_t part =
      ceil_div(tokens, ceil_div(tokens, kMatrixTokens<A>) * 2 * kMatrixRows) * 2 * kMatrixRows;
  // Once a call: it takes as long as dozens of products. Rows beyond the last token hold zeros.
  configure_matrices(std::min(tokens, kMatrixRows),
                     tokens > 2 * kMatrixRows ? kMatrixRows : tokens - kMatrixRows);
  for (int64_t tile = range.tile_begin; tile < range.tile_end; tile += together)
    for (int64_t token = range.token_begin; token < range.token_end; token += part) {
      Range own = range;
      own.token_begin = token;
      own.token_end = std::min(token + part, range.token_end);
      run_matrix_tiles(plan, arithmetic, finish, layout, prepared, scratch, own, tile,
                       std::min(together, range.tile_end - tile));
    }
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
  return {name,
          supports,
          matrix_prepared_bytes<A>,
          prepare_matrix<A>,
          matrix_scratch_bytes<A>,
          run_matrix<A>,
          kMatrixPiece};
}

}  // namespace
}  // namespace fdk
