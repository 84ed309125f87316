#include "convert.h"

#include <algorithm>
#include <cstring>

#include "layout.h"
#include "numeric.h"

namespace fdk {
namespace {

// Four bytes of a row hold the same codes in both layouts: a step of the row. These move them
// between the two orders; the loops have constant bounds and unroll.
template <int kBits>
void row_to_step(const uint8_t source[4], uint8_t *step, int64_t row) {
  constexpr int per_byte = 8 / kBits;
  constexpr int mask = (1 << kBits) - 1;
  uint32_t bytes[4] = {};
  for (int i = 0; i < 4 * per_byte; ++i) {
    const int shift = 8 - kBits * (i % per_byte + 1);
    const uint32_t code = static_cast<uint32_t>((source[i / per_byte] >> shift) & mask);
    const int j = kBits == 1 ? i / 8 : i % 4;
    bytes[j] |= code << code_position(kBits, 0, i).shift;
  }
  for (int j = 0; j < 4; ++j)
    step[kBits == 1 ? j * kTileRows + row : row * 4 + j] = static_cast<uint8_t>(bytes[j]);
}

template <int kBits>
void step_to_row(const uint8_t *step, int64_t row, uint8_t target[4]) {
  constexpr int per_byte = 8 / kBits;
  constexpr int mask = (1 << kBits) - 1;
  uint32_t bytes[4] = {};
  for (int i = 0; i < 4 * per_byte; ++i) {
    const CodePosition at = code_position(kBits, row, i);
    const uint32_t code = static_cast<uint32_t>((step[at.byte] >> at.shift) & mask);
    bytes[i / per_byte] |= code << (8 - kBits * (i % per_byte + 1));
  }
  for (int j = 0; j < 4; ++j) target[j] = static_cast<uint8_t>(bytes[j]);
}

// Bytes of an interchange row, and the bits of its last byte that hold codes.
struct RowBytes {
  int64_t count;
  uint8_t last_mask;
  RowBytes(int64_t k, int bits) : count(ceil_div(k * bits, 8)) {
    const int64_t used = k * bits - (count - 1) * 8;
    last_mask = static_cast<uint8_t>(0xff00 >> used);
  }
};

template <int kBits>
void pack_one(const fdk_layout &layout, const uint8_t *packed, uint8_t *tile, int64_t first_row) {
  const RowBytes bytes(layout.in_features, kBits);
  const int64_t steps = num_steps(layout.in_features, kBits);
  const int64_t rows = std::min(kTileRows, layout.out_features - first_row);
  std::memset(tile, 0, static_cast<size_t>(steps * kStepBytes));
  for (int64_t r = 0; r < rows; ++r) {
    const uint8_t *row = packed + (first_row + r) * bytes.count;
    for (int64_t s = 0; s + 1 < steps; ++s)
      row_to_step<kBits>(row + s * 4, tile + s * kStepBytes, r);
    uint8_t tail[4] = {};
    const int64_t left = bytes.count - (steps - 1) * 4;
    std::memcpy(tail, row + (steps - 1) * 4, static_cast<size_t>(left));
    tail[left - 1] &= bytes.last_mask;
    row_to_step<kBits>(tail, tile + (steps - 1) * kStepBytes, r);
  }
}

template <int kBits>
void unpack_one(const fdk_layout &layout, const uint8_t *tile, uint8_t *packed, int64_t first_row) {
  const RowBytes bytes(layout.in_features, kBits);
  const int64_t steps = num_steps(layout.in_features, kBits);
  const int64_t rows = std::min(kTileRows, layout.out_features - first_row);
  for (int64_t r = 0; r < rows; ++r) {
    uint8_t *row = packed + (first_row + r) * bytes.count;
    for (int64_t s = 0; s + 1 < steps; ++s)
      step_to_row<kBits>(tile + s * kStepBytes, r, row + s * 4);
    uint8_t tail[4];
    step_to_row<kBits>(tile + (steps - 1) * kStepBytes, r, tail);
    const int64_t left = bytes.count - (steps - 1) * 4;
    tail[left - 1] &= bytes.last_mask;
    std::memcpy(row + (steps - 1) * 4, tail, static_cast<size_t>(left));
  }
}

template <typename T>
void copy_scales_in(const fdk_layout &layout, const T *scales, T *tiled, int64_t tile) {
  const int64_t groups = ceil_div(layout.in_features, layout.group_size);
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t r = 0; r < kTileRows; ++r) {
      const int64_t n = tile * kTileRows + r;
      tiled[(tile * groups + g) * kTileRows + r] =
          n < layout.out_features ? scales[n * groups + g] : T{0};
    }
}

template <typename T>
void copy_scales_out(const fdk_layout &layout, const T *tiled, T *scales, int64_t tile) {
  const int64_t groups = ceil_div(layout.in_features, layout.group_size);
  const int64_t rows = std::min(kTileRows, layout.out_features - tile * kTileRows);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t g = 0; g < groups; ++g)
      scales[(tile * kTileRows + r) * groups + g] = tiled[(tile * groups + g) * kTileRows + r];
}

}  // namespace

void pack_tiles(const fdk_layout &layout, const uint8_t *packed, uint8_t *tiled, int64_t tile_begin,
                int64_t tile_end) {
  const int64_t tile_bytes = num_steps(layout.in_features, layout.bits) * kStepBytes;
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    uint8_t *target = tiled + tile * tile_bytes;
    switch (layout.bits) {
      case 1: pack_one<1>(layout, packed, target, tile * kTileRows); break;
      case 2: pack_one<2>(layout, packed, target, tile * kTileRows); break;
      case 4: pack_one<4>(layout, packed, target, tile * kTileRows); break;
      default: pack_one<8>(layout, packed, target, tile * kTileRows); break;
    }
  }
}

void unpack_tiles(const fdk_layout &layout, const uint8_t *tiled, uint8_t *packed,
                  int64_t tile_begin, int64_t tile_end) {
  const int64_t tile_bytes = num_steps(layout.in_features, layout.bits) * kStepBytes;
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const uint8_t *source = tiled + tile * tile_bytes;
    switch (layout.bits) {
      case 1: unpack_one<1>(layout, source, packed, tile * kTileRows); break;
      case 2: unpack_one<2>(layout, source, packed, tile * kTileRows); break;
      case 4: unpack_one<4>(layout, source, packed, tile * kTileRows); break;
      default: unpack_one<8>(layout, source, packed, tile * kTileRows); break;
    }
  }
}

void pack_scales(const fdk_layout &layout, const void *scales, void *tiled, int64_t tile_begin,
                 int64_t tile_end) {
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    if (layout.scales_dtype == FDK_F32)
      copy_scales_in(layout, static_cast<const uint32_t *>(scales), static_cast<uint32_t *>(tiled),
                     tile);
    else
      copy_scales_in(layout, static_cast<const uint16_t *>(scales), static_cast<uint16_t *>(tiled),
                     tile);
  }
}

void unpack_scales(const fdk_layout &layout, const void *tiled, void *scales, int64_t tile_begin,
                   int64_t tile_end) {
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    if (layout.scales_dtype == FDK_F32)
      copy_scales_out(layout, static_cast<const uint32_t *>(tiled), static_cast<uint32_t *>(scales),
                      tile);
    else
      copy_scales_out(layout, static_cast<const uint16_t *>(tiled), static_cast<uint16_t *>(scales),
                      tile);
  }
}

}  // namespace fdk
