// Packed weights as streams of memory, asked for ahead of their use.
#pragma once

#include <immintrin.h>

#include "kernel.h"
#include "numeric.h"

namespace fdk {
namespace {

inline constexpr int64_t kPrefetchBytes = 2048;

inline void prefetch(const void *p) { _mm_prefetch(static_cast<const char *>(p), _MM_HINT_T0); }
// Into the L2 cache, where the L1 cache has better things to hold.
inline void prefetch_far(const void *p) { _mm_prefetch(static_cast<const char *>(p), _MM_HINT_T1); }

// The bytes of kTiles tiles side by side, asked for ahead of their use: past the end of these tiles
// the range's next ones begin; at its end there is nothing to fetch.
template <int kTiles>
class Streams {
 public:
  Streams(const Plan &plan, const Range &range, int64_t tile)
      : packed_(plan.tile_packed(tile)),
        tile_bytes_(plan.steps * kStepBytes),
        groups_(plan.groups),
        group_bytes_(kTileRows * static_cast<int64_t>(dtype_size(plan.scales_dtype))),
        scales_(static_cast<const char *>(plan.scales) + tile * groups_ * group_bytes_) {
    if (tile + kTiles >= range.tile_end) return;
    ahead_at_end_ = kPrefetchBytes + (kTiles - 1) * tile_bytes_;
    scales_ahead_ = kTiles * groups_ * group_bytes_;
  }
  // How far ahead to ask during step s.
  int64_t ahead(int64_t s) const {
    return kPrefetchBytes < tile_bytes_ - s * kStepBytes ? kPrefetchBytes : ahead_at_end_;
  }
  // Step s of tile i.
  const uint8_t *step(int64_t s, int64_t i, int64_t ahead) const {
    const uint8_t *here = packed_ + s * kStepBytes + i * tile_bytes_;
    prefetch(here + ahead);
    return here;
  }
  void fetch_scales(int64_t group, int64_t i) const {
    prefetch(scales_ + (i * groups_ + group) * group_bytes_ + scales_ahead_);
  }

 private:
  const uint8_t *packed_;
  int64_t tile_bytes_, groups_, group_bytes_;
  const char *scales_;
  int64_t ahead_at_end_ = 0, scales_ahead_ = 0;
};

}  // namespace
}  // namespace fdk
