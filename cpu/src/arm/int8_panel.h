// int8 activations, any bits and any number of tokens: the weights of a block become a panel of
// int8 in the cache, [unit of 4 columns][16 rows][4 columns], which all tokens then multiply.
//
// Dot is the instruction set's way to multiply: kTokens, and
//   template <int T> static void multiply(const int8_t *panel, int64_t count, const int8_t *x,
//                                         int64_t x_stride, int32x4_t acc[T][4]);
// which adds to acc[token][rows / 4] for T tokens whose integers lie x_stride bytes apart.
#pragma once

#include "common.h"

namespace fdk {
namespace {

constexpr int64_t kPanelBytes = kMaxColumns * kTileRows;

inline size_t int8_panel_scratch_bytes(const Plan &plan) {
  return static_cast<size_t>(kPanelBytes + plan.m * kTileRows * 4);
}

template <int kBits>
inline void decode_int8_panel(const uint8_t *bytes, int64_t count, const Int8Tables &tables,
                              int8_t *panel) {
  for_each_unit<kBits>(bytes, count, tables, [&](int64_t unit, int j, int8x16_t w) {
    vst1q_s8(panel + unit * 64 + j * 16, w);
  });
}

template <typename Dot>
struct Int8Panel {
  struct Part {
    const Plan &plan;
    const void *prepared;
    int64_t stride;
    int64_t block;
    int64_t count;
    const int8_t *panel;
    float32x4_t scales[4];
    Affine affine;
  };

  // sums[token][16] += the block's part of y, for T tokens.
  template <int T>
  static void add_tokens(const Part &part, int64_t token, float *sums) {
    const Int8Token first(part.plan, part.prepared, token, part.stride);
    const int64_t token_bytes = Int8Token::bytes(part.plan, part.stride);
    int32x4_t acc[T][4] = {};
    Dot::template multiply<T>(part.panel, part.count, first.x + part.block * part.stride,
                              token_bytes, acc);
    for (int t = 0; t < T; ++t) {
      const Int8Token in(part.plan, part.prepared, token + t, part.stride);
      const float x_scale = in.scales[part.block];
      const float slope = part.affine.slope(x_scale);
      const float32x4_t shift = vdupq_n_f32(part.affine.shift(x_scale, in.sums[part.block]));
      for (int j = 0; j < 4; ++j) {
        float *sum = sums + t * kTileRows + 4 * j;
        const float32x4_t value = vfmaq_n_f32(shift, vcvtq_f32_s32(acc[t][j]), slope);
        vst1q_f32(sum, vfmaq_f32(vld1q_f32(sum), part.scales[j], value));
      }
    }
  }

  template <int kBits>
  static void run_bits(const Plan &plan, const void *prepared, void *scratch, const Range &range) {
    const Levels &levels = plan.levels[range.codebook];
    const Int8Tables tables(levels, kBits, plan.uniform);
    const int64_t stride = columns_stride(plan);
    int8_t *panel = static_cast<int8_t *>(scratch);
    float *sums = reinterpret_cast<float *>(panel + kPanelBytes);
    const int64_t tokens = range.token_end - range.token_begin;
    for (int64_t tile = range.tile_begin; tile < range.tile_end; ++tile) {
      std::memset(sums, 0, static_cast<size_t>(tokens * kTileRows) * sizeof(float));
      for (size_t b = 0; b < plan.blocks.size(); ++b) {
        const Columns columns = block_columns(plan, plan.blocks[b]);
        decode_int8_panel<kBits>(column_bytes(plan, tile, columns), columns.count, tables, panel);
        Part part{plan,          prepared, stride, static_cast<int64_t>(b),
                  columns.count, panel,    {},     Affine(levels, kBits, tables.bias)};
        load_scales4(plan, tile, plan.blocks[b].group, part.scales);
        int64_t t = 0;
        for (; t + Dot::kTokens <= tokens; t += Dot::kTokens)
          add_tokens<Dot::kTokens>(part, range.token_begin + t, sums + t * kTileRows);
        for (; t < tokens; ++t) add_tokens<1>(part, range.token_begin + t, sums + t * kTileRows);
      }
      for (int64_t t = 0; t < tokens; ++t)
        store_tile(plan, range.token_begin + t, tile, range, sums + t * kTileRows);
    }
  }

  static void run(const Plan &plan, const void *prepared, void *scratch, const Range &range) {
    with_bits(plan.bits,
              [&](auto bits) { run_bits<decltype(bits)::value>(plan, prepared, scratch, range); });
  }
};

}  // namespace
}  // namespace fdk
