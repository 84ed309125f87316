// The tiled layout: one set of packed bytes for every machine.
//
//   packed  [tiles][steps][64] uint8     tiles = ceil(N / 16), steps = ceil(K / step_k(bits))
//   scales  [tiles][groups][16]          groups = ceil(K / group_size)
//
// A tile is 16 rows (output features). A step is 64 bytes of one tile: 16 rows of step_k
// consecutive weights, step_k = 32 / bits (8 bits: 4, 4 bits: 8, 2 bits: 16, 1 bit: 32).
// The code of row r and column k = step * step_k + i lies, for
//
//   8, 4, 2 bits   in byte r * 4 + i % 4, shifted left by bits * (i / 4): shifting a register by
//                  `bits` brings the next four columns of all 16 rows to the bottom of their bytes,
//                  four adjacent bytes being one row, as the 4-way dot products want them;
//   1 bit          in byte (i / 8) * 16 + r, bit i % 8: a byte is eight consecutive columns of one
//                  row and 16 rows lie side by side, as look-ups by nibble in a table of sums of
//                  four activations want them; one byte permutation gives the order of the others.
//
// Codes beyond N or K are 0, scales beyond N are 0. Kernels may read all of it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fdk {

inline constexpr int64_t kTileRows = 16;
inline constexpr int64_t kStepBytes = 64;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Columns in a step.
constexpr int64_t step_k(int bits) { return 32 / bits; }

constexpr int64_t num_tiles(int64_t n) { return ceil_div(n, kTileRows); }
constexpr int64_t num_steps(int64_t k, int bits) { return ceil_div(k, step_k(bits)); }

struct CodePosition {
  int64_t byte;  // within the 64 bytes of the step
  int shift;
};

constexpr CodePosition code_position(int bits, int64_t row, int64_t i) {
  if (bits == 1) return {(i / 8) * kTileRows + row, static_cast<int>(i % 8)};
  return {row * 4 + i % 4, static_cast<int>(i / 4) * bits};
}

}  // namespace fdk
