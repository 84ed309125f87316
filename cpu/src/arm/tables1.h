// 1 bit, int8 activations, on any ARM machine: tables of sums of four activations (the idea of
// T-MAC, arXiv 2407.00088), here with exact sums.
//
// A byte of the layout holds eight columns of one row, so each nibble is an index into the 16
// possible sums of four activations, the same table for the 16 rows. A sum less the smallest of
// its table is in 0..508 and is kept as 16 * high + low, a byte each. Over a block of 64 columns
// the low parts add up to at most 16 * 15, and the high parts of 32 columns to at most
// 32 * 127 / 16 = 254: bytes suffice, and 16 rows cost four instructions for four columns.
#pragma once

#include "common.h"

namespace fdk {
namespace {

struct Tables1 {
  static constexpr int64_t kUnitBytes = 64;  // of eight columns: low, high; low, high
  static constexpr int64_t kBlockBytes = kMaxBlock / 8 * kUnitBytes;

  // Prepared: for each token the tables [blocks][8][64], then scales, sums of the activations and
  // sums of the tables' smallest entries, [blocks] each.
  struct Token {
    uint8_t *tables;
    float *scales;
    float *sums;
    float *smallest;
    Token(const Plan &plan, const void *prepared, int64_t token) {
      const int64_t blocks = static_cast<int64_t>(plan.blocks.size());
      tables = static_cast<uint8_t *>(const_cast<void *>(prepared)) + token * bytes(plan);
      scales = reinterpret_cast<float *>(tables + blocks * kBlockBytes);
      sums = scales + blocks;
      smallest = sums + blocks;
    }
    static int64_t bytes(const Plan &plan) {
      return round_up_to(static_cast<int64_t>(plan.blocks.size()) * (kBlockBytes + 12), 64);
    }
  };

  // For each block the slope and the shift that turn a sum into a part of y, four times each.
  static constexpr int64_t kAffineFloats = 8;

  static size_t prepared_bytes(const Plan &plan) {
    return static_cast<size_t>(plan.m * Token::bytes(plan));
  }
  static size_t scratch_bytes(const Plan &plan) {
    return plan.blocks.size() * kAffineFloats * sizeof(float);
  }

  // The 16 sums of subsets of four activations, less the smallest, split; returns the smallest.
  static int32_t make_table(const int16_t x[4], uint8_t out[32]) {
    static constexpr uint16_t kIndex[8] = {0, 1, 2, 3, 4, 5, 6, 7};
    const uint16x8_t index = vld1q_u16(kIndex);
    int16x8_t low = vdupq_n_s16(0);
    int smallest = 0;
    for (int i = 0; i < 3; ++i) {
      const uint16x8_t set = vtstq_u16(index, vdupq_n_u16(static_cast<uint16_t>(1U << i)));
      low = vaddq_s16(low, vandq_s16(vreinterpretq_s16_u16(set), vdupq_n_s16(x[i])));
    }
    for (int i = 0; i < 4; ++i) smallest += std::min<int>(x[i], 0);
    low = vsubq_s16(low, vdupq_n_s16(static_cast<int16_t>(smallest)));
    const uint16x8_t a = vreinterpretq_u16_s16(low);
    const uint16x8_t b = vreinterpretq_u16_s16(vaddq_s16(low, vdupq_n_s16(x[3])));
    vst1q_u8(out, vandq_u8(vcombine_u8(vmovn_u16(a), vmovn_u16(b)), vdupq_n_u8(15)));
    vst1q_u8(out + 16, vcombine_u8(vshrn_n_u16(a, 4), vshrn_n_u16(b, 4)));
    return smallest;
  }

  static void prepare(const Plan &plan, void *prepared, int64_t token_begin, int64_t token_end) {
    for (int64_t token = token_begin; token < token_end; ++token) {
      const Token out(plan, prepared, token);
      for (size_t b = 0; b < plan.blocks.size(); ++b) {
        QuantisedBlock block;
        quantise_block(plan, token, plan.blocks[b], 127, block);
        int32_t smallest = 0;
        uint8_t *tables = out.tables + static_cast<int64_t>(b) * kBlockBytes;
        for (int i = 0; i < kMaxBlock / 4; ++i)
          smallest += make_table(block.x + 4 * i, tables + i * 32);
        out.scales[b] = block.scale;
        out.sums[b] = static_cast<float>(block.sum);
        out.smallest[b] = static_cast<float>(smallest);
      }
    }
  }

  // A sum s is not converted: the bits 1.0f + s * 1024 are the float 1 + s / 8192.
  static void make_affine(const Plan &plan, const Token &token, const Levels &levels, float *out) {
    const Affine affine(levels, 1, 0);
    for (size_t b = 0; b < plan.blocks.size(); ++b, out += kAffineFloats) {
      const float slope = token.scales[b] * affine.factor * 8192.0F;
      const float shift =
          token.scales[b] * (affine.offset * token.sums[b] + affine.factor * token.smallest[b]);
      vst1q_f32(out, vdupq_n_f32(slope));
      vst1q_f32(out + 4, vdupq_n_f32(shift - slope));
    }
  }

  // Sums of a tile's 16 rows over a block.
  struct Sums {
    uint8x16_t low;
    uint8x16_t high[2];  // of 32 columns each: those of the first nibbles, of the second ones
  };

  static void add_units(const uint8_t *bytes, const uint8_t *tables, int64_t units, Sums &sums) {
    const uint8x16_t nibble = vdupq_n_u8(15);
    sums.low = sums.high[0] = sums.high[1] = vdupq_n_u8(0);
    for (int64_t unit = 0; unit < units; ++unit, tables += kUnitBytes) {
      const uint8x16_t codes = vld1q_u8(bytes + unit * kTileRows);
      const uint8x16_t first = vandq_u8(codes, nibble);
      const uint8x16_t second = vshrq_n_u8(codes, 4);
      sums.low = vaddq_u8(sums.low, vqtbl1q_u8(vld1q_u8(tables), first));
      sums.high[0] = vaddq_u8(sums.high[0], vqtbl1q_u8(vld1q_u8(tables + 16), first));
      sums.low = vaddq_u8(sums.low, vqtbl1q_u8(vld1q_u8(tables + 32), second));
      sums.high[1] = vaddq_u8(sums.high[1], vqtbl1q_u8(vld1q_u8(tables + 48), second));
    }
  }

// Two tiles, eight units. Written out because the order is what makes it fast on cores that issue
// and finish in order (a Cortex-A510: three instructions a cycle, two of them vector ones; look-ups
// finish after four cycles, other vector instructions after three, loads after two, so that a load
// right after a look-up waits). A unit takes ten cycles, two vector instructions in each: four of
// look-ups, then the additions, beside which the next unit's tables are loaded and its indices
// made. Compilers load far ahead instead, and spill.
// clang-format off: one line is what issues together.
#define FDK_LOAD(to, base, offset) "ldr %q[" to "], [%[" base "], #" #offset "]\n"
#define FDK_ADD(to, from) "add %[" to "].16b, %[" to "].16b, %[" from "].16b\n"
#define FDK_TBL(to, table, index) "tbl %[" to "].16b, {%[" table "].16b}, %[" index "].16b\n"
#define FDK_SHIFT(to, from) "ushr %[" to "].16b, %[" from "].16b, #4\n"
#define FDK_MASK(to, from) "and %[" to "].16b, %[" from "].16b, %[nibble].16b\n"
// Both tiles by the tables of the first nibbles (low: t0, high: t1) and of the second (t2, t3).
#define FDK_LOOK_UP(low0, high0, low1, high1)                     \
  FDK_TBL(low0, "t0", "f0") FDK_TBL(high0, "t1", "f0")            \
  FDK_TBL(low1, "t0", "f1") FDK_TBL(high1, "t1", "f1")            \
  FDK_TBL("r4", "t2", "s0") FDK_TBL("r6", "t3", "s0")             \
  FDK_TBL("r5", "t2", "s1") FDK_TBL("r7", "t3", "s1")
#define FDK_ADD_FIRST0 FDK_ADD("low0", "r0") FDK_ADD("g0", "r2")
#define FDK_ADD_FIRST1 FDK_ADD("low1", "r1") FDK_ADD("g1", "r3")
// The rest of a unit; offsets are those of the next one, whose codes of tile 0 are in c already.
#define FDK_REST(first0, first1, high0, high1, codes, o0, o1, o2, o3)                       \
  first0                                                                                    \
  FDK_LOAD("s1", "bytes1", codes) first1                                                    \
  FDK_LOAD("t0", "tables", o0) high0 FDK_MASK("f0", "c")                                    \
  FDK_LOAD("t1", "tables", o1) FDK_ADD("low0", "r4") high1                                  \
  FDK_LOAD("t2", "tables", o2) FDK_MASK("f1", "s1") FDK_SHIFT("s0", "c")                    \
  FDK_LOAD("t3", "tables", o3) FDK_ADD("low1", "r5") FDK_SHIFT("s1", "s1")
#define FDK_UNIT(codes, o0, o1, o2, o3)                                                     \
  FDK_LOAD("c", "bytes0", codes) FDK_LOOK_UP("r0", "r2", "r1", "r3")                        \
  FDK_REST(FDK_ADD_FIRST0, FDK_ADD_FIRST1, FDK_ADD("h0", "r6"), FDK_ADD("h1", "r7"), codes, \
           o0, o1, o2, o3)

  [[gnu::always_inline]] static void add_eight_units(const uint8_t *bytes0, const uint8_t *bytes1,
                                                     const uint8_t *tables, Sums sums[2]) {
    const uint8x16_t nibble = vdupq_n_u8(15);
    uint8x16_t c, f0, f1, s0, s1, t0, t1, t2, t3, r0, r1, r2, r3, r4, r5, r6, r7;
    __asm__(
        FDK_LOAD("c", "bytes0", 0) FDK_LOAD("s1", "bytes1", 0) FDK_LOAD("t0", "tables", 0)
        FDK_LOAD("t1", "tables", 16) FDK_LOAD("t2", "tables", 32) FDK_LOAD("t3", "tables", 48)
        FDK_MASK("f0", "c") FDK_MASK("f1", "s1") FDK_SHIFT("s0", "c") FDK_SHIFT("s1", "s1")
        // The look-ups of unit 0 start the sums.
        FDK_LOAD("c", "bytes0", 16)
        FDK_TBL("low0", "t0", "f0") FDK_TBL("g0", "t1", "f0")
        FDK_TBL("low1", "t0", "f1") FDK_TBL("g1", "t1", "f1")
        FDK_TBL("r4", "t2", "s0") FDK_TBL("h0", "t3", "s0")
        FDK_TBL("r5", "t2", "s1") FDK_TBL("h1", "t3", "s1")
        FDK_REST("", "", "", "", 16, 64, 80, 96, 112)
        FDK_UNIT(32, 128, 144, 160, 176)
        FDK_UNIT(48, 192, 208, 224, 240)
        FDK_UNIT(64, 256, 272, 288, 304)
        FDK_UNIT(80, 320, 336, 352, 368)
        FDK_UNIT(96, 384, 400, 416, 432)
        FDK_UNIT(112, 448, 464, 480, 496)
        FDK_LOOK_UP("r0", "r2", "r1", "r3")
        FDK_ADD_FIRST0 FDK_ADD_FIRST1 FDK_ADD("h0", "r6") FDK_ADD("h1", "r7")
        FDK_ADD("low0", "r4") FDK_ADD("low1", "r5")
        : [low0] "=&w"(sums[0].low), [low1] "=&w"(sums[1].low), [g0] "=&w"(sums[0].high[0]),
          [g1] "=&w"(sums[1].high[0]), [h0] "=&w"(sums[0].high[1]), [h1] "=&w"(sums[1].high[1]),
          [c] "=&w"(c), [f0] "=&w"(f0), [f1] "=&w"(f1), [s0] "=&w"(s0), [s1] "=&w"(s1),
          [t0] "=&w"(t0), [t1] "=&w"(t1), [t2] "=&w"(t2), [t3] "=&w"(t3), [r0] "=&w"(r0),
          [r1] "=&w"(r1), [r2] "=&w"(r2), [r3] "=&w"(r3), [r4] "=&w"(r4), [r5] "=&w"(r5),
          [r6] "=&w"(r6), [r7] "=&w"(r7)
        : [nibble] "w"(nibble), [bytes0] "r"(bytes0), [bytes1] "r"(bytes1), [tables] "r"(tables)
        : "memory");
  }
  // clang-format on

#undef FDK_LOAD
#undef FDK_ADD
#undef FDK_TBL
#undef FDK_SHIFT
#undef FDK_MASK
#undef FDK_LOOK_UP
#undef FDK_ADD_FIRST0
#undef FDK_ADD_FIRST1
#undef FDK_REST
#undef FDK_UNIT

  // Loads that the compiler may not merge: constants come from the cache, where there are ports to
  // spare, not from a move, which takes a vector port and finishes later than a load.
  static float32x4_t load_again(const float *p) {
    float32x4_t out;
    __asm__ volatile("ldr %q0, %1" : "=w"(out) : "m"(*reinterpret_cast<const float32x4_t *>(p)));
    return out;
  }
  static uint32x4_t load_again(const uint32_t *p) {
    uint32x4_t out;
    __asm__ volatile("ldr %q0, %1" : "=w"(out) : "m"(*reinterpret_cast<const uint32x4_t *>(p)));
    return out;
  }

  template <int kTiles, fdk_dtype kDtype>
  [[gnu::always_inline]] static void add_block(const Tile &at, const Block &block, int64_t units,
                                               const uint8_t *tables, const float *affine,
                                               float32x4_t y[kTiles][4]) {
    alignas(16) static constexpr uint32_t kOne[4] = {0x3f800000U, 0x3f800000U, 0x3f800000U,
                                                     0x3f800000U};
    alignas(16) static constexpr uint32_t kStep[4] = {0x04000400U, 0x04000400U, 0x04000400U,
                                                      0x04000400U};  // 1024, eight times
    alignas(16) static constexpr uint32_t kZero[4] = {};
    const uint8_t *bytes = at.packed + block.k0 * (kTileRows / 8);
    // Found before the look-ups, which the compiler takes for a change of memory.
    const void *scales_at[kTiles];
    for (int t = 0; t < kTiles; ++t) scales_at[t] = at.scales_of<kDtype>(t, block.group);
    Sums sums[kTiles];
    if (kTiles == 2 && units == 8) add_eight_units(bytes, bytes + at.packed_stride, tables, sums);
    else
      for (int t = 0; t < kTiles; ++t)
        add_units(bytes + t * at.packed_stride, tables, units, sums[t]);
    const float32x4_t slope = vld1q_f32(affine);
    const uint16x8_t step = vreinterpretq_u16_u32(load_again(kStep));
    const uint16x8_t zero = vreinterpretq_u16_u32(load_again(kZero));
    for (int t = 0; t < kTiles; ++t) {
      float32x4_t scales[4];
      load_scales4<kDtype>(scales_at[t], scales, zero);
      const uint8x16_t *high = sums[t].high;
      const uint16x8_t sum0 =
          vaddw_u8(vshlq_n_u16(vaddl_u8(vget_low_u8(high[0]), vget_low_u8(high[1])), 4),
                   vget_low_u8(sums[t].low));
      const uint16x8_t sum1 =
          vaddw_high_u8(vshlq_n_u16(vaddl_high_u8(high[0], high[1]), 4), sums[t].low);
      const uint32x4_t bits[4] = {
          vmlal_u16(load_again(kOne), vget_low_u16(sum0), vget_low_u16(step)),
          vmlal_high_u16(load_again(kOne), sum0, step),
          vmlal_u16(load_again(kOne), vget_low_u16(sum1), vget_low_u16(step)),
          vmlal_high_u16(load_again(kOne), sum1, step)};
      for (int j = 0; j < 4; ++j) {
        const float32x4_t value =
            vfmaq_f32(load_again(affine + 4), vreinterpretq_f32_u32(bits[j]), slope);
        y[t][j] = vfmaq_f32(y[t][j], scales[j], value);
      }
    }
  }

  // Not inlined: the sums stay in registers, and its loop is the one that cpu/model looks for.
  template <int kTiles, fdk_dtype kDtype>
  [[gnu::noinline]] static void run_tiles(const Plan &plan, const Token &token, int64_t token_index,
                                          const float *affine, int64_t tile, const Range &range) {
    float32x4_t y[kTiles][4] = {};
    const Tile at(plan, tile);
    const Block *blocks = plan.blocks.data();
    const int64_t count = static_cast<int64_t>(plan.blocks.size());
    const int64_t full = full_blocks(plan);
    const uint8_t *tables = token.tables;
    for (int64_t b = 0; b < full; ++b, tables += kBlockBytes, affine += kAffineFloats)
      add_block<kTiles, kDtype>(at, blocks[b], 8, tables, affine, y);
    for (int64_t b = full; b < count; ++b, tables += kBlockBytes, affine += kAffineFloats)
      add_block<kTiles, kDtype>(at, blocks[b], ceil_div(blocks[b].length, 8), tables, affine, y);
    for (int t = 0; t < kTiles; ++t) store_tile4(plan, token_index, tile + t, range, y[t]);
  }

  template <fdk_dtype kDtype>
  static void run_dtype(const Plan &plan, const void *prepared, void *scratch, const Range &range) {
    float *affine = static_cast<float *>(scratch);
    for (int64_t t = range.token_begin; t < range.token_end; ++t) {
      const Token token(plan, prepared, t);
      make_affine(plan, token, plan.levels[range.codebook], affine);
      int64_t tile = range.tile_begin;
      for (; tile + 2 <= range.tile_end; tile += 2)
        run_tiles<2, kDtype>(plan, token, t, affine, tile, range);
      if (tile < range.tile_end) run_tiles<1, kDtype>(plan, token, t, affine, tile, range);
    }
  }

  static void run(const Plan &plan, const void *prepared, void *scratch, const Range &range) {
    if (plan.scales_dtype == FDK_BF16) return run_dtype<FDK_BF16>(plan, prepared, scratch, range);
    if (plan.scales_dtype == FDK_F16) return run_dtype<FDK_F16>(plan, prepared, scratch, range);
    run_dtype<FDK_F32>(plan, prepared, scratch, range);
  }
};

}  // namespace
}  // namespace fdk
