// Matrix products of 2 rows by 2 tokens (SMMLA, BFMMLA): several tokens at once.
//
// Both instructions take two registers of [2][8 bytes] and add [2 rows][2 tokens] of 32 bits. Kind
// says what eight bytes are:
//   kColumns                      columns in eight bytes
//   Accumulator, multiply()       the instruction
//   Tables(plan, codebook)        what decode() needs
//   decode<bits>()                a block's weights as [columns / kColumns][8 pairs][2 rows][8
//   bytes] write_row()                   a block of one token's activations, in order, with scale
//   and sum value(acc, slope, shift)      a block's products as float
#pragma once

#include "common.h"

namespace fdk {
namespace {

template <typename Kind>
struct Mmla {
  static constexpr int64_t kTokens = 8;  // prepared together
  static constexpr int kPairs = 4;
  static constexpr int64_t kRowBytes = 8;
  static constexpr int64_t kTokenUnitBytes = kTokens * kRowBytes;
  static constexpr int64_t kPanelUnitBytes = kTileRows * kRowBytes;
  static constexpr int64_t kPanelBytes = kMaxColumns / Kind::kColumns * kPanelUnitBytes;
  static constexpr int64_t kSumsFloats = kTileRows * kTokens;

  // Prepared: for each group of eight tokens [blocks][units][8 tokens][8 bytes], then scales and
  // sums [blocks][8 tokens]. Tokens beyond m are zero. To find the strides takes a look at every
  // block: once a call.
  struct Layout {
    int64_t blocks, block_bytes;
    explicit Layout(const Plan &plan)
        : blocks(static_cast<int64_t>(plan.blocks.size())),
          block_bytes(columns_stride(plan) / Kind::kColumns * kTokenUnitBytes) {}
    int64_t bytes() const { return blocks * (block_bytes + kTokens * 8); }
  };
  struct Group {
    int8_t *x;
    float *scales;
    float *sums;

    Group(const Layout &layout, const void *prepared, int64_t group) {
      char *base = static_cast<char *>(const_cast<void *>(prepared)) + group * layout.bytes();
      x = reinterpret_cast<int8_t *>(base);
      scales = reinterpret_cast<float *>(base + layout.blocks * layout.block_bytes);
      sums = scales + layout.blocks * kTokens;
    }
  };

  static size_t prepared_bytes(const Plan &plan) {
    return static_cast<size_t>(ceil_div(plan.m, kTokens) * Layout(plan).bytes());
  }

  // A token beyond m is written as zeros.
  static void prepare_token(const Plan &plan, const Layout &layout, void *prepared, int64_t token) {
    const Group out(layout, prepared, token / kTokens);
    const int64_t slot = token % kTokens;
    const int64_t block_bytes = layout.block_bytes;
    for (size_t b = 0; b < plan.blocks.size(); ++b) {
      const int64_t index = static_cast<int64_t>(b);
      alignas(16) int8_t row[(kMaxColumns + 16) * kRowBytes / Kind::kColumns] = {};
      float scale = 0.0F;
      float sum = 0.0F;
      if (token < plan.m) Kind::write_row(plan, token, plan.blocks[b], row, scale, sum);
      int8_t *x = out.x + index * block_bytes + slot * kRowBytes;
      for (int64_t i = 0; i < block_bytes / kTokens; i += kRowBytes, x += kTokenUnitBytes)
        std::memcpy(x, row + i, kRowBytes);
      out.scales[index * kTokens + slot] = scale;
      out.sums[index * kTokens + slot] = sum;
    }
  }

  static void prepare(const Plan &plan, void *prepared, int64_t token_begin, int64_t token_end) {
    const int64_t end = token_end == plan.m ? round_up_to(plan.m, kTokens) : token_end;
    const Layout layout(plan);
    for (int64_t token = token_begin; token < end; ++token)
      prepare_token(plan, layout, prepared, token);
  }

  // Scratch: the panel, then for each group the sums [8 pairs of rows][4 pairs][2 rows][2 tokens].
  static size_t scratch_bytes(const Plan &plan) {
    return static_cast<size_t>(kPanelBytes + (ceil_div(plan.m, kTokens) + 1) * kSumsFloats * 4);
  }

  struct Part {
    const Plan &plan;
    const Layout &layout;
    int64_t block;
    int64_t units;
    const int8_t *panel;
    float factor, offset;
    float32x4_t scales[4];
  };

  // Eight rows (half a tile) by P pairs of tokens.
  template <int P>
  static void add_half(const Part &part, const Group &in, int half, float *sums) {
    typename Kind::Accumulator acc[4][P] = {};
    const int8_t *x = in.x + part.block * part.layout.block_bytes;
    const int8_t *w = part.panel + half * kPanelUnitBytes / 2;
    for (int64_t u = 0; u < part.units; ++u, x += kTokenUnitBytes, w += kPanelUnitBytes) {
      int8x16_t tokens[P];
      for (int p = 0; p < P; ++p) tokens[p] = vld1q_s8(x + 16 * p);
      for (int r = 0; r < 4; ++r) {
        const int8x16_t rows = vld1q_s8(w + 16 * r);
        for (int p = 0; p < P; ++p) acc[r][p] = Kind::multiply(acc[r][p], rows, tokens[p]);
      }
    }
    // Read before the first store, which might change them for all that the compiler knows.
    const float factor = part.factor;
    const float offset = part.offset;
    float32x4_t scales[4];
    for (int r = 0; r < 4; ++r) {
      const float32x4_t four = part.scales[2 * half + r / 2];
      scales[r] = r % 2 == 0 ? vzip1q_f32(four, four) : vzip2q_f32(four, four);
    }
    float32x2_t x_scales[P], x_sums[P];
    for (int p = 0; p < P; ++p) {
      x_scales[p] = vld1_f32(in.scales + part.block * kTokens + 2 * p);
      x_sums[p] = vld1_f32(in.sums + part.block * kTokens + 2 * p);
    }
    for (int p = 0; p < P; ++p) {
      const float32x2_t slope = vmul_n_f32(x_scales[p], factor);
      const float32x2_t shift = vmul_f32(x_scales[p], vmul_n_f32(x_sums[p], offset));
      for (int r = 0; r < 4; ++r) {
        const float32x4_t value =
            Kind::value(acc[r][p], vcombine_f32(slope, slope), vcombine_f32(shift, shift));
        float *sum = sums + ((4 * half + r) * kPairs + p) * 4;
        vst1q_f32(sum, vfmaq_f32(vld1q_f32(sum), scales[r], value));
      }
    }
  }

  template <int P>
  static void add_pairs(const Part &part, const Group &in, float *sums) {
    add_half<P>(part, in, 0, sums);
    add_half<P>(part, in, 1, sums);
  }

  static void add_group(const Part &part, const void *prepared, int64_t group, float *sums) {
    const Group in(part.layout, prepared, group);
    const int64_t tokens = part.plan.m - group * kTokens;
    if (tokens > 6) return add_pairs<4>(part, in, sums);
    if (tokens > 4) return add_pairs<3>(part, in, sums);
    if (tokens > 2) return add_pairs<2>(part, in, sums);
    add_pairs<1>(part, in, sums);
  }

  static void store_group(const Plan &plan, const Range &range, int64_t tile, int64_t group,
                          const float *sums) {
    const int64_t begin = std::max(group * kTokens, range.token_begin);
    const int64_t end = std::min((group + 1) * kTokens, range.token_end);
    for (int64_t token = begin; token < end; ++token) {
      float out[kTileRows];
      const int64_t slot = token % kTokens;
      for (int64_t r = 0; r < kTileRows; ++r)
        out[r] = sums[(r / 2 * kPairs + slot / 2) * 4 + r % 2 * 2 + slot % 2];
      store_tile(plan, token, tile, range, out);
    }
  }

  template <int kBits>
  static void run_bits(const Plan &plan, const void *prepared, void *scratch, const Range &range) {
    const typename Kind::Tables tables(plan, range.codebook);
    const Layout layout(plan);
    int8_t *panel = static_cast<int8_t *>(scratch);
    float *sums = reinterpret_cast<float *>(panel + kPanelBytes);
    const int64_t first = range.token_begin / kTokens;
    const int64_t groups = ceil_div(range.token_end, kTokens) - first;
    for (int64_t tile = range.tile_begin; tile < range.tile_end; ++tile) {
      std::memset(sums, 0, static_cast<size_t>(groups * kSumsFloats) * sizeof(float));
      for (size_t b = 0; b < plan.blocks.size(); ++b) {
        const Columns columns = block_columns(plan, plan.blocks[b]);
        Kind::template decode<kBits>(column_bytes(plan, tile, columns), columns.count, tables,
                                     panel);
        Part part{plan,
                  layout,
                  static_cast<int64_t>(b),
                  ceil_div(columns.count, Kind::kColumns),
                  panel,
                  tables.factor(),
                  tables.offset(),
                  {}};
        load_scales4(plan, tile, plan.blocks[b].group, part.scales);
        for (int64_t g = 0; g < groups; ++g)
          add_group(part, prepared, first + g, sums + g * kSumsFloats);
      }
      for (int64_t g = 0; g < groups; ++g)
        store_group(plan, range, tile, first + g, sums + g * kSumsFloats);
    }
  }

  static void run(const Plan &plan, const void *prepared, void *scratch, const Range &range) {
    with_bits(plan.bits,
              [&](auto bits) { run_bits<decltype(bits)::value>(plan, prepared, scratch, range); });
  }
};

}  // namespace
}  // namespace fdk
