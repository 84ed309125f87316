// AVX-512 kernels for a few tokens at 1 and 2 bits: float32 sums of activations from tables.
//
// Four bits of a row are four (or two) codes, of 16 kinds. For each of their places along K,
// prepare() writes what the 16 kinds add to y, one float32 each: a table is a register, and a
// permutation by 16 rows' bits finds four (two) products a row. One by one they cost a permutation
// and a multiply-add each.
#pragma once

#include "avx512.h"

namespace fdk {
namespace {

inline constexpr int64_t kSumTables = 8;             // of a step: a row of it has 32 bits
inline constexpr int64_t kSumWorkBytes = 1 << 20;    // of the tokens at work: within the L2 cache
inline constexpr int64_t kSumMostBytes = 64 << 20;   // of all
inline constexpr int64_t kSumCodebooks = 4;          // more take too long to prepare for

// prepared: [token][codebook][block, step of it][kSumTables][16] float32.
template <int kBits>
struct Sums {
  static constexpr int kCodes = 4 / kBits;  // of a table
  // With more, decoding once for all of them pays.
  static constexpr int64_t kMostTokens = kBits == 1 ? 32 : 8;

  // Column within a step of code `i` of table `t`.
  static constexpr int64_t column(int t, int i) {
    return column_at(kBits, t / 2, t % 2 * 4 + i * kBits);
  }

  static int64_t floats(const Plan &plan) {
    int64_t steps = 0;
    for (const Block &block : plan.blocks) steps += block.step_end - block.step_begin;
    return steps * kSumTables * 16;
  }

  static bool supports(const Plan &plan) {
    return plan.arithmetic == FDK_EXACT && plan.bits == kBits && plan.m <= kMostTokens &&
           plan.num_codebooks <= kSumCodebooks && bytes(plan) <= kSumMostBytes;
  }

  static int64_t bytes(const Plan &plan) { return plan.m * plan.num_codebooks * floats(plan) * 4; }

  static size_t prepared_bytes(const Plan &plan) { return static_cast<size_t>(bytes(plan)); }

  // Element l: the value of code `i` among the four bits l.
  static void load_values(const float *codebook, __m512 values[kCodes]) {
    alignas(64) float lanes[16];
    for (unsigned i = 0; i < kCodes; ++i) {
      for (unsigned l = 0; l < 16; ++l)
        lanes[l] = codebook[l >> (i * kBits) & ((1U << kBits) - 1U)];
      values[i] = _mm512_load_ps(lanes);
    }
  }

  static void prepare(const Plan &plan, void *prepared, int64_t token_begin, int64_t token_end) {
    const int64_t size = floats(plan);
    for (int64_t token = token_begin; token < token_end; ++token)
      for (int64_t c = 0; c < plan.num_codebooks; ++c) {
        __m512 values[kCodes];
        load_values(plan.codebook + (c << kBits), values);
        float *table = static_cast<float *>(prepared) + (token * plan.num_codebooks + c) * size;
        for (const Block &block : plan.blocks) {
          alignas(64) float natural[kNaturalElements] = {};
          __m512 x[4];
          load_block(plan, token, block, x);
          const int64_t lead = block.k0 - block.step_begin * step_k(kBits);
          Float32<kBits>::store_block(x, natural + lead);
          const float *step = natural;
          for (int64_t s = block.step_begin; s < block.step_end; ++s, step += step_k(kBits))
            for (int t = 0; t < kSumTables; ++t, table += 16) {
              __m512 sums = _mm512_mul_ps(values[0], _mm512_set1_ps(step[column(t, 0)]));
              for (int i = 1; i < kCodes; ++i)
                sums = _mm512_fmadd_ps(values[i], _mm512_set1_ps(step[column(t, i)]), sums);
              _mm512_store_ps(table, sums);
            }
        }
      }
  }

  // kTokens tokens by kTiles tiles side by side: they share the tables, and the tokens the bits.
  template <int kTokens, int kTiles>
  static void multiply(const Plan &plan, const float *const tables[kTokens], const Range &range,
                       int64_t token, int64_t tile) {
    const Streams<kTiles> streams(plan, range, tile);
    __m512 totals[kTokens][kTiles];
    for (auto &of_token : totals)
      for (__m512 &total : of_token) total = _mm512_setzero_ps();
    int64_t place = 0;
    for (const Block &block : plan.blocks) {
      __m512 sums[kTokens][kTiles];
      for (auto &of_token : sums)
        for (__m512 &sum : of_token) sum = _mm512_setzero_ps();
      for (int64_t s = block.step_begin; s < block.step_end; ++s) {
        const int64_t ahead = streams.ahead(s);
        __m512i bits[kTiles];
        for (int i = 0; i < kTiles; ++i) bits[i] = load_step<kBits>(streams.step(s, i, ahead));
        for (int t = 0; t < kSumTables; ++t, place += 16)
          for (int i = 0; i < kTiles; ++i) {
            const auto shift = static_cast<unsigned>(4 * t);
            const __m512i kind = t == 0 ? bits[i] : _mm512_srli_epi32(bits[i], shift);
            for (int j = 0; j < kTokens; ++j)
              sums[j][i] = _mm512_add_ps(
                  sums[j][i], _mm512_permutexvar_ps(kind, _mm512_load_ps(tables[j] + place)));
          }
      }
      for (int i = 0; i < kTiles; ++i) {
        streams.fetch_scales(block.group, i);
        const __m512 scales = load_tile_scales(plan, tile + i, block.group);
        for (int j = 0; j < kTokens; ++j)
          totals[j][i] = _mm512_fmadd_ps(sums[j][i], scales, totals[j][i]);
      }
    }
    for (int j = 0; j < kTokens; ++j)
      for (int i = 0; i < kTiles; ++i) store_sums(plan, token + j, tile + i, range, totals[j][i]);
  }

  // Tokens [begin, end) by kTiles tiles; a token's tables are `stride` floats behind the last one's.
  template <int kTiles>
  static void multiply_tokens(const Plan &plan, const float *tables, int64_t stride,
                              const Range &range, int64_t begin, int64_t end, int64_t tile) {
    for (; begin + 2 <= end; begin += 2) {
      const float *two[] = {tables + begin * stride, tables + (begin + 1) * stride};
      multiply<2, kTiles>(plan, two, range, begin, tile);
    }
    if (begin < end) {
      const float *one[] = {tables + begin * stride};
      multiply<1, kTiles>(plan, one, range, begin, tile);
    }
  }

  static void run(const Plan &plan, const void *prepared, void *, const Range &range) {
    const int64_t size = floats(plan);
    const float *tables = static_cast<const float *>(prepared) + range.codebook * size;
    const int64_t stride = plan.num_codebooks * size;
    const int64_t together = std::max(kSumWorkBytes / (size * 8) * 2, int64_t{2});
    for (int64_t begin = range.token_begin; begin < range.token_end; begin += together) {
      const int64_t end = std::min(begin + together, range.token_end);
      int64_t tile = range.tile_begin;
      for (; tile + 4 <= range.tile_end; tile += 4)
        multiply_tokens<4>(plan, tables, stride, range, begin, end, tile);
      for (; tile < range.tile_end; ++tile)
        multiply_tokens<1>(plan, tables, stride, range, begin, end, tile);
    }
  }

  static constexpr Kernel kernel(const char *name) {
    return {name, supports, prepared_bytes, prepare, nullptr, run, 4};
  }
};

}  // namespace
}  // namespace fdk
