// The matrix registers of AMX as the kernels use them: eight of 16 rows x 64 bytes.
//
//   0..3  sums: 16 tokens x 16 rows of weights, of two groups of tokens by two tiles
//   4, 5  activations: 16 tokens x 16 words of 32 bits
//   6, 7  weights: 16 words x 16 rows, as avx512_decode.h makes them
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "x86/avx512_decode.h"

namespace fdk {
namespace {

inline constexpr int64_t kMatrixRows = 16;  // tokens in a register, and words of 32 bits in its row
inline constexpr int64_t kMatrixBytes = kMatrixRows * 64;

// The operand of LDTILECFG.
struct alignas(64) MatrixShapes {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(MatrixShapes) == 64);

// `first` and `second` tokens in the two groups, 1..16; a second group of none is not used.
inline void configure_matrices(int64_t first, int64_t second) {
  MatrixShapes shapes;
  const auto rows_of = [&](int register_, int64_t rows) {
    shapes.row_bytes[register_] = 64;
    shapes.rows[register_] = static_cast<uint8_t>(rows);
  };
  for (const int i : {0, 1, 4}) rows_of(i, first);
  for (const int i : {2, 3, 5}) rows_of(i, second > 0 ? second : first);
  for (const int i : {6, 7}) rows_of(i, kMatrixRows);
  // GCC 12 believes that LDTILECFG reads eight bytes, and drops the stores of the others.
  __asm__ volatile("" : : "m"(shapes));
  _tile_loadconfig(&shapes);
}

// Some compilers do not know that a tile load reads memory: what was stored must be there.
inline void stores_before_tile_loads() { __asm__ volatile("" ::: "memory"); }

// An Arithmetic of avx512_decode.h whose products are those of matrix registers.
template <typename Decoder>
struct Matrix : Decoder {
  using Decoder::Decoder;
};

// Adds the products of activations `kGroup` (0, 1) and weights `kTile` (0, 1) to their sums.
template <typename A, int kGroup, int kTile>
inline void multiply_matrices() {
  if constexpr (A::kInteger) {
    if constexpr (kGroup == 0 && kTile == 0) _tile_dpbsud(0, 4, 6);
    if constexpr (kGroup == 0 && kTile == 1) _tile_dpbsud(1, 4, 7);
    if constexpr (kGroup == 1 && kTile == 0) _tile_dpbsud(2, 5, 6);
    if constexpr (kGroup == 1 && kTile == 1) _tile_dpbsud(3, 5, 7);
  } else {
    if constexpr (kGroup == 0 && kTile == 0) _tile_dpbf16ps(0, 4, 6);
    if constexpr (kGroup == 0 && kTile == 1) _tile_dpbf16ps(1, 4, 7);
    if constexpr (kGroup == 1 && kTile == 0) _tile_dpbf16ps(2, 5, 6);
    if constexpr (kGroup == 1 && kTile == 1) _tile_dpbf16ps(3, 5, 7);
  }
}

// Sums `kIndex` (0..3, see above) to their place in memory.
template <int kIndex>
inline void store_matrix(char *sums) {
  if constexpr (kIndex == 0) _tile_stored(0, sums, 64);
  if constexpr (kIndex == 1) _tile_stored(1, sums + kMatrixBytes, 64);
  if constexpr (kIndex == 2) _tile_stored(2, sums + 2 * kMatrixBytes, 64);
  if constexpr (kIndex == 3) _tile_stored(3, sums + 3 * kMatrixBytes, 64);
}

}  // namespace
}  // namespace fdk
