// AVX2 kernels for a few tokens at 1 bit: sums of activations from tables.
//
// Three bits of a row are three codes, of 8 kinds. For each of their positions along K, prepare()
// writes what the 8 kinds add to y: a table is a register, and a permutation by 8 rows' bits finds
// three products a row. The integer arithmetics do the same with int32.
#pragma once

#include "x86/avx2_products.h"

namespace fdk {
namespace {

template <bool kInteger>
struct SumVector {
  using Type = __m256;
};
template <>
struct SumVector<true> {
  using Type = __m256i;
};

// `kArithmetic`: FDK_EXACT, or FDK_INT16 for both integer ones.
template <fdk_arithmetic kArithmetic>
struct Sums {
  static constexpr bool kInteger = kArithmetic != FDK_EXACT;
  static constexpr int64_t kColumns = 3;    // of a table
  static constexpr int64_t kTables = 11;    // of a step; the last one has two columns
  static constexpr int64_t kMaxTokens = 4;  // with more, decoding once for all of them pays
  static constexpr int64_t kMaxBytes = 64 << 20;
  static constexpr int64_t kMaxCodebooks = 4;  // more take too long to prepare for
  using Element = std::conditional_t<kInteger, int32_t, float>;
  // What finish_block() wants to know.
  struct Arithmetic {
    static constexpr bool kInteger = Sums::kInteger;
    using Sum = typename SumVector<kInteger>::Type;
  };
  using Sum = typename Arithmetic::Sum;

  // prepared: BlockFactor [token][blocks], then tables [token][codebook][block, step of
  // it][kTables][8].
  struct Layout {
    int64_t factors, tables;  // of a token; tables of a codebook
    const Plan &plan;
    explicit Layout(const Plan &plan_) : plan(plan_) {
      factors = ceil_div(static_cast<int64_t>(plan.blocks.size()), 8) * 8;
      int64_t steps = 0;
      for (const Block &block : plan.blocks) steps += block.step_end - block.step_begin;
      tables = steps * kTables * 8;
    }
    int64_t bytes() const {
      return plan.m * (factors * static_cast<int64_t>(sizeof(BlockFactor)) +
                       plan.num_codebooks * tables * 4);
    }
    BlockFactor *token_factors(const void *prepared, int64_t token) const {
      return static_cast<BlockFactor *>(const_cast<void *>(prepared)) + token * factors;
    }
    Element *token_tables(const void *prepared, int64_t token, int64_t codebook) const {
      auto *first = reinterpret_cast<Element *>(token_factors(prepared, plan.m));
      return first + (token * plan.num_codebooks + codebook) * tables;
    }
  };

  static bool supports(const Plan &plan) {
    return (plan.arithmetic != FDK_EXACT) == kInteger && plan.bits == 1 && plan.m <= kMaxTokens &&
           plan.num_codebooks <= kMaxCodebooks && Layout(plan).bytes() <= kMaxBytes;
  }

  static size_t prepared_bytes(const Plan &plan) {
    return static_cast<size_t>(Layout(plan).bytes());
  }

  // The values of the two codes.
  static void load_values(const Plan &plan, int64_t codebook, Element values[2]) {
    for (int q = 0; q < 2; ++q) {
      if constexpr (!kInteger) values[q] = plan.codebook[2 * codebook + q];
      else if (plan.arithmetic == FDK_INT8) values[q] = plan.levels[codebook].level8[q];
      else values[q] = plan.levels[codebook].level16[q];
    }
  }

  static void prepare(const Plan &plan, void *prepared, int64_t token_begin, int64_t token_end) {
    const Layout layout(plan);
    for (int64_t token = token_begin; token < token_end; ++token) {
      BlockFactor *factors = layout.token_factors(prepared, token);
      int64_t offset = 0;
      for (size_t b = 0; b < plan.blocks.size(); ++b) {
        const Block &block = plan.blocks[b];
        float x[kMaxBlock] = {};
        for (int64_t i = 0; i < block.length; ++i)
          x[i] = load_as_f32(plan.x, plan.x_dtype, token * plan.k + block.k0 + i);
        Element natural[2 * kMaxBlock + 64] = {};
        factors[b] =
            convert_block<Arithmetic>(plan, x, natural + (block.k0 - block.step_begin * step_k(1)));
        const int64_t steps = block.step_end - block.step_begin;
        for (int64_t c = 0; c < plan.num_codebooks; ++c) {
          Element values[2];
          load_values(plan, c, values);
          Element *table = layout.token_tables(prepared, token, c) + offset;
          for (int64_t s = 0; s < steps; ++s)
            for (int64_t t = 0; t < kTables; ++t, table += 8)
              fill_table(natural + s * step_k(1) + t * kColumns, t, values, table);
        }
        offset += steps * kTables * 8;
      }
    }
  }

  // Entry i: the sum of x[j] * values[bit j of i] over the columns of table `t`.
  static void fill_table(const Element *x, int64_t t, const Element values[2], Element table[8]) {
    const int64_t columns = t + 1 < kTables ? kColumns : step_k(1) - (kTables - 1) * kColumns;
    for (unsigned i = 0; i < 8; ++i) table[i] = x[0] * values[i & 1U];
    for (unsigned j = 1; j < columns; ++j)
      for (unsigned i = 0; i < 8; ++i) table[i] += x[j] * values[i >> j & 1U];
  }

  static Sum zero() {
    if constexpr (kInteger) return _mm256_setzero_si256();
    else return _mm256_setzero_ps();
  }

  static Sum add(Sum sum, __m256i index, const Element *table) {
    if constexpr (kInteger)
      return _mm256_add_epi32(
          sum, _mm256_permutevar8x32_epi32(
                   _mm256_load_si256(reinterpret_cast<const __m256i *>(table)), index));
    else return _mm256_add_ps(sum, _mm256_permutevar8x32_ps(_mm256_load_ps(table), index));
  }

  // kTokens tokens by kTiles tiles side by side: they share the tables, and the tokens the bits.
  template <int kTokens, int kTiles>
  static void multiply(const Plan &plan, const Layout &layout, const void *prepared,
                       const Range &range, int64_t token, int64_t tile) {
    const Levels *levels = kInteger ? plan.levels + range.codebook : nullptr;
    const Element *tables[kTokens];
    __m256 totals[kTokens][kTiles][2];
    for (int j = 0; j < kTokens; ++j) {
      tables[j] = layout.token_tables(prepared, token + j, range.codebook);
      for (auto &of_tile : totals[j]) of_tile[0] = of_tile[1] = _mm256_setzero_ps();
    }
    int64_t offset = 0;
    for (size_t b = 0; b < plan.blocks.size(); ++b) {
      const Block &block = plan.blocks[b];
      Sum sums[kTokens][kTiles][2];
      for (auto &of_token : sums)
        for (auto &of_tile : of_token) of_tile[0] = of_tile[1] = zero();
      for (int64_t s = block.step_begin; s < block.step_end; ++s) {
        __m256i bits[kTiles][2];
        for (int i = 0; i < kTiles; ++i) {
          const uint8_t *step = plan.tile_packed(tile + i) + s * kStepBytes;
          _mm_prefetch(reinterpret_cast<const char *>(step + kAhead), _MM_HINT_T0);
          for (int half = 0; half < 2; ++half) bits[i][half] = load_half<1>(step, half);
        }
        for (int t = 0; t < kTables; ++t, offset += 8)
          for (int i = 0; i < kTiles; ++i)
            for (int half = 0; half < 2; ++half) {
              const __m256i index = shift_right(bits[i][half], static_cast<int>(kColumns) * t);
              for (int j = 0; j < kTokens; ++j)
                sums[j][i][half] = add(sums[j][i][half], index, tables[j] + offset);
            }
      }
      for (int i = 0; i < kTiles; ++i)
        for (int half = 0; half < 2; ++half) {
          const __m256 scales = load_half_scales(plan, tile + i, block.group, half);
          for (int j = 0; j < kTokens; ++j)
            totals[j][i][half] = _mm256_fmadd_ps(
                finish_block<Arithmetic>(levels, plan.arithmetic == FDK_INT8, sums[j][i][half],
                                         layout.token_factors(prepared, token + j)[b]),
                scales, totals[j][i][half]);
        }
    }
    for (int j = 0; j < kTokens; ++j)
      for (int i = 0; i < kTiles; ++i) store_half(plan, token + j, tile + i, range, totals[j][i]);
  }

  template <int kTiles>
  static void multiply_tokens(const Plan &plan, const Layout &layout, const void *prepared,
                              const Range &range, int64_t tile) {
    int64_t token = range.token_begin;
    for (; token + 2 <= range.token_end; token += 2)
      multiply<2, kTiles>(plan, layout, prepared, range, token, tile);
    if (token < range.token_end) multiply<1, kTiles>(plan, layout, prepared, range, token, tile);
  }

  static void run(const Plan &plan, const void *prepared, void *, const Range &range) {
    const Layout layout(plan);
    int64_t tile = range.tile_begin;
    for (; tile + 2 <= range.tile_end; tile += 2)
      multiply_tokens<2>(plan, layout, prepared, range, tile);
    if (tile < range.tile_end) multiply_tokens<1>(plan, layout, prepared, range, tile);
  }

  static constexpr Kernel kernel(const char *name) {
    return {name, supports, prepared_bytes, prepare, nullptr, run, 2};
  }
};

}  // namespace
}  // namespace fdk
