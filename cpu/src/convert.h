// Conversion between the interchange and the tiled layout, for tiles [tile_begin, tile_end).
#pragma once

#include <cstdint>

#include "fdk.h"

namespace fdk {

// packed [N, ceil(K / E)], first code in the highest bits; tiled [tiles][steps][64].
void pack_tiles(const fdk_layout &layout, const uint8_t *packed, uint8_t *tiled, int64_t tile_begin,
                int64_t tile_end);
void unpack_tiles(const fdk_layout &layout, const uint8_t *tiled, uint8_t *packed,
                  int64_t tile_begin, int64_t tile_end);

// scales [N, groups]; tiled [tiles][groups][16].
void pack_scales(const fdk_layout &layout, const void *scales, void *tiled, int64_t tile_begin,
                 int64_t tile_end);
void unpack_scales(const fdk_layout &layout, const void *tiled, void *scales, int64_t tile_begin,
                   int64_t tile_end);

}  // namespace fdk
