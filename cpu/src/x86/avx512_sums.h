// AVX-512 kernels for a few tokens at 1 and 2 bits: float32 sums of activations from tables.
//
// Four bits of a row are four (or two) codes, of 16 kinds. For each of their positions along K,
// prepare() writes what the 16 kinds add to y, one float32 each: a table is a register, and a
// permutation by 16 rows' bits finds four (two) products a row. One by one they cost a permutation
// and a multiply-add each.
#pragma once

#include "x86/avx512_direct.h"

namespace fdk {
namespace {

inline constexpr int64_t kSumTables = 8;           // of a step: a row of it has 32 bits
inline constexpr int64_t kSumWorkBytes = 1 << 20;  // of the tokens at work: within the L2 cache
inline constexpr int64_t kSumMaxBytes = 64 << 20;  // of all
inline constexpr int64_t kSumCodebooks = 4;        // more take too long to prepare for

// Vectors of what tables hold: float32, or int32 for the sums of 16-bit activations and levels.
template <bool kInteger>
struct SumVectors {
  using Element = float;
  using Vector = __m512;
  static Vector zero() { return _mm512_setzero_ps(); }
  static Vector multiply_add(Vector a, Element b, Vector sum) {
    return _mm512_fmadd_ps(a, _mm512_set1_ps(b), sum);
  }
  static Vector load(const Element *from) { return _mm512_load_ps(from); }
  static void store(Element *to, Vector v) { _mm512_store_ps(to, v); }
  static Vector add_looked_up(Vector sum, __m512i index, const Element *table) {
    return _mm512_add_ps(sum, _mm512_permutexvar_ps(index, _mm512_load_ps(table)));
  }
};
template <>
struct SumVectors<true> {
  using Element = int32_t;
  using Vector = __m512i;
  static Vector zero() { return _mm512_setzero_si512(); }
  static Vector multiply_add(Vector a, Element b, Vector sum) {
    return _mm512_add_epi32(sum, _mm512_mullo_epi32(a, _mm512_set1_epi32(b)));
  }
  static Vector load(const Element *from) { return _mm512_load_si512(from); }
  static void store(Element *to, Vector v) { _mm512_store_si512(to, v); }
  static Vector add_looked_up(Vector sum, __m512i index, const Element *table) {
    return _mm512_add_epi32(sum, _mm512_permutexvar_epi32(index, _mm512_load_si512(table)));
  }
};

// kInteger: the arithmetic int16, else exact.
template <int kBits, bool kInteger>
struct Sums {
  using Vectors = SumVectors<kInteger>;
  using Element = typename Vectors::Element;
  using Vector = typename Vectors::Vector;
  // How a block ends: as in the other kernels.
  using Ending = std::conditional_t<kInteger, Int16<kBits>, Float32<kBits>>;
  static constexpr int kCodes = 4 / kBits;  // of a table
  // With more, decoding once for all of them pays.
  static constexpr int64_t kMaxTokens = kBits == 1 ? 32 : 8;

  // Column within a step of code `i` of table `t`.
  static constexpr int64_t column(int t, int i) {
    return column_at(kBits, t / 2, t % 2 * 4 + i * kBits);
  }

  // prepared: tables [token][codebook][block, step of it][kSumTables][16], then BlockFactor
  // [token][blocks] for integers.
  struct Layout {
    int64_t tables;  // elements of a token and a codebook
    const Plan &plan;
    explicit Layout(const Plan &plan_) : plan(plan_) {
      int64_t steps = 0;
      for (const Block &block : plan.blocks) steps += block.step_end - block.step_begin;
      tables = steps * kSumTables * 16;
    }
    int64_t stride() const { return plan.num_codebooks * tables; }  // of tokens
    int64_t factors() const { return kInteger ? static_cast<int64_t>(plan.blocks.size()) : 0; }
    int64_t bytes() const {
      return plan.m * (stride() * 4 + factors() * static_cast<int64_t>(sizeof(BlockFactor)));
    }
    const Element *token_tables(const void *prepared, int64_t token, int64_t codebook) const {
      return static_cast<const Element *>(prepared) + token * stride() + codebook * tables;
    }
    const BlockFactor *token_factors(const void *prepared, int64_t token) const {
      return reinterpret_cast<const BlockFactor *>(token_tables(prepared, plan.m, 0)) +
             token * factors();
    }
  };

  static bool supports(const Plan &plan) {
    return plan.arithmetic == (kInteger ? FDK_INT16 : FDK_EXACT) && plan.bits == kBits &&
           plan.m <= kMaxTokens && plan.num_codebooks <= kSumCodebooks &&
           Layout(plan).bytes() <= kSumMaxBytes;
  }

  static size_t prepared_bytes(const Plan &plan) {
    return static_cast<size_t>(Layout(plan).bytes());
  }

  // Element l: the value of code `i` among the four bits l.
  static void load_values(const Plan &plan, int64_t codebook, Vector values[kCodes]) {
    alignas(64) Element lanes[16];
    for (unsigned i = 0; i < kCodes; ++i) {
      for (unsigned l = 0; l < 16; ++l) {
        const unsigned q = l >> (i * kBits) & ((1U << kBits) - 1U);
        if constexpr (kInteger) lanes[l] = plan.levels[codebook].level16[q];
        else lanes[l] = plan.codebook[(codebook << kBits) + q];
      }
      values[i] = Vectors::load(lanes);
    }
  }

  static void prepare(const Plan &plan, void *prepared, int64_t token_begin, int64_t token_end) {
    using Natural = std::conditional_t<kInteger, int16_t, float>;
    const Layout layout(plan);
    for (int64_t token = token_begin; token < token_end; ++token) {
      int64_t offset = 0;
      for (size_t b = 0; b < plan.blocks.size(); ++b) {
        const Block &block = plan.blocks[b];
        alignas(64) Natural natural[kNaturalElements] = {};
        Natural *target = natural + (block.k0 - block.step_begin * step_k(kBits));
        __m512 x[4];
        load_block(plan, token, block, x);
        if constexpr (kInteger)
          const_cast<BlockFactor *>(layout.token_factors(prepared, token))[b] =
              quantise_block<Ending>(x, plan.levels[0].x_limit16, target);
        else Float32<kBits>::store_block(x, target);
        const int64_t steps = block.step_end - block.step_begin;
        for (int64_t c = 0; c < plan.num_codebooks; ++c) {
          Vector values[kCodes];
          load_values(plan, c, values);
          auto *table = const_cast<Element *>(layout.token_tables(prepared, token, c)) + offset;
          const Natural *step = natural;
          for (int64_t s = 0; s < steps; ++s, step += step_k(kBits))
            for (int t = 0; t < kSumTables; ++t, table += 16) {
              Vector sums = Vectors::zero();
              for (int i = 0; i < kCodes; ++i)
                sums = Vectors::multiply_add(values[i], step[column(t, i)], sums);
              Vectors::store(table, sums);
            }
        }
        offset += steps * kSumTables * 16;
      }
    }
  }

  // kTokens tokens by kTiles tiles side by side: they share the tables, and the tokens the bits.
  template <int kTokens, int kTiles>
  static void multiply(const Plan &plan, const Layout &layout, const Finish<Ending> &finish,
                       const void *prepared, const Range &range, int64_t token, int64_t tile) {
    const Streams<kTiles> streams(plan, range, tile);
    const Element *tables[kTokens];
    __m512 totals[kTokens][kTiles];
    for (int j = 0; j < kTokens; ++j) {
      tables[j] = layout.token_tables(prepared, token + j, range.codebook);
      for (__m512 &total : totals[j]) total = _mm512_setzero_ps();
    }
    int64_t offset = 0;
    for (size_t b = 0; b < plan.blocks.size(); ++b) {
      const Block &block = plan.blocks[b];
      Vector sums[kTokens][kTiles];
      for (auto &of_token : sums)
        for (Vector &sum : of_token) sum = Vectors::zero();
      for (int64_t s = block.step_begin; s < block.step_end; ++s) {
        const int64_t ahead = streams.ahead(s);
        __m512i bits[kTiles];
        for (int i = 0; i < kTiles; ++i) bits[i] = load_step<kBits>(streams.step(s, i, ahead));
        for (int t = 0; t < kSumTables; ++t, offset += 16)
          for (int i = 0; i < kTiles; ++i) {
            const auto shift = static_cast<unsigned>(4 * t);
            const __m512i kind = t == 0 ? bits[i] : _mm512_srli_epi32(bits[i], shift);
            for (int j = 0; j < kTokens; ++j)
              sums[j][i] = Vectors::add_looked_up(sums[j][i], kind, tables[j] + offset);
          }
      }
      for (int i = 0; i < kTiles; ++i) {
        streams.fetch_scales(block.group, i);
        const __m512 scales = load_tile_scales(plan, tile + i, block.group);
        for (int j = 0; j < kTokens; ++j) {
          const BlockFactor *factors =
              kInteger ? layout.token_factors(prepared, token + j) : nullptr;
          totals[j][i] =
              _mm512_fmadd_ps(finish.block(sums[j][i], factors, b), scales, totals[j][i]);
        }
      }
    }
    for (int j = 0; j < kTokens; ++j)
      for (int i = 0; i < kTiles; ++i) store_sums(plan, token + j, tile + i, range, totals[j][i]);
  }

  // Tokens [begin, end) by kTiles tiles.
  template <int kTiles>
  static void multiply_tokens(const Plan &plan, const Layout &layout, const Finish<Ending> &finish,
                              const void *prepared, const Range &range, int64_t begin, int64_t end,
                              int64_t tile) {
    for (; begin + 2 <= end; begin += 2)
      multiply<2, kTiles>(plan, layout, finish, prepared, range, begin, tile);
    if (begin < end) multiply<1, kTiles>(plan, layout, finish, prepared, range, begin, tile);
  }

  static void run(const Plan &plan, const void *prepared, void *, const Range &range) {
    const Layout layout(plan);
    const Finish<Ending> finish(plan, range.codebook);
    const int64_t together = std::max(kSumWorkBytes / (layout.tables * 8) * 2, int64_t{2});
    for (int64_t begin = range.token_begin; begin < range.token_end; begin += together) {
      const int64_t end = std::min(begin + together, range.token_end);
      int64_t tile = range.tile_begin;
      for (; tile + 4 <= range.tile_end; tile += 4)
        multiply_tokens<4>(plan, layout, finish, prepared, range, begin, end, tile);
      for (; tile < range.tile_end; ++tile)
        multiply_tokens<1>(plan, layout, finish, prepared, range, begin, end, tile);
    }
  }

  static constexpr Kernel kernel(const char *name) {
    return {name, supports, prepared_bytes, prepare, nullptr, run, 4};
  }
};

}  // namespace
}  // namespace fdk
