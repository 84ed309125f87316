// Exact and int16 arithmetic on any ARM machine: the weights of a block become a panel of float or
// int16 in the cache, [column][16 rows], which all tokens multiply by lane.
#pragma once

#include "common.h"

namespace fdk {
namespace {

// Look-up of 16 codes at once in a table of E split into byte planes (bits <= 4), or one by one.
template <typename E>
class Lookup {
 public:
  // Low planes that are zero throughout are left out: a codebook in bfloat16 needs two of four.
  Lookup(const E *values, int bits) : values_(values) {
    if (bits == 8) return;
    uint8_t planes[sizeof(E)][16] = {};
    for (int i = 0; i < 16; ++i) {
      uint8_t bytes[sizeof(E)];
      std::memcpy(bytes, &values[i & ((1 << bits) - 1)], sizeof(E));
      for (size_t p = 0; p < sizeof(E); ++p) planes[p][i] = bytes[p];
    }
    uint8x16_t low = vdupq_n_u8(0);
    for (size_t p = 0; p < sizeof(E); ++p) {
      planes_[p] = vld1q_u8(planes[p]);
      if (p + 2 < sizeof(E)) low = vorrq_u8(low, planes_[p]);
    }
    high_half_only_ = sizeof(E) == 4 && vmaxvq_u8(low) == 0;
  }

  bool high_half_only() const { return high_half_only_; }

  template <int kBits, bool kHighHalfOnly>
  void store(uint8x16_t codes, E *out) const {
    if constexpr (kBits == 8) {
      uint8_t index[16];
      vst1q_u8(index, codes);
      for (int i = 0; i < 16; ++i) out[i] = values_[index[i]];
    } else {
      constexpr size_t top = sizeof(E) - 1;
      uint8_t *bytes = reinterpret_cast<uint8_t *>(out);
      const uint8x16_t b3 = vqtbl1q_u8(planes_[top], codes);
      const uint8x16_t b2 = vqtbl1q_u8(planes_[top - 1], codes);
      const uint8x16_t high0 = vzip1q_u8(b2, b3);
      const uint8x16_t high1 = vzip2q_u8(b2, b3);
      if constexpr (sizeof(E) == 2) {
        vst1q_u8(bytes, high0);
        vst1q_u8(bytes + 16, high1);
      } else {
        uint8x16_t low0 = vdupq_n_u8(0);
        uint8x16_t low1 = low0;
        if constexpr (!kHighHalfOnly) {
          const uint8x16_t b1 = vqtbl1q_u8(planes_[1], codes);
          const uint8x16_t b0 = vqtbl1q_u8(planes_[0], codes);
          low0 = vzip1q_u8(b0, b1);
          low1 = vzip2q_u8(b0, b1);
        }
        const auto store_half = [&](uint8x16_t low, uint8x16_t high, uint8_t *to) {
          const uint16x8_t l = vreinterpretq_u16_u8(low);
          const uint16x8_t h = vreinterpretq_u16_u8(high);
          vst1q_u8(to, vreinterpretq_u8_u16(vzip1q_u16(l, h)));
          vst1q_u8(to + 16, vreinterpretq_u8_u16(vzip2q_u16(l, h)));
        };
        store_half(low0, high0, bytes);
        store_half(low1, high1, bytes + 32);
      }
    }
  }

 private:
  const E *values_;
  uint8x16_t planes_[sizeof(E)];
  bool high_half_only_ = false;
};

// The activations of a token are padded with zeros to whole vectors of four.
template <typename E>
int64_t padded_k(const Plan &plan) {
  return round_up_to(plan.k, 16);
}

// Exact: prepared = x as float [m][padded_k].
struct ExactColumns {
  using Element = float;
  using Accumulator = float32x4_t;

  static size_t prepared_bytes(const Plan &plan) {
    return static_cast<size_t>(plan.m * padded_k<float>(plan)) * sizeof(float);
  }
  static void prepare(const Plan &plan, void *prepared, int64_t token_begin, int64_t token_end) {
    const int64_t stride = padded_k<float>(plan);
    for (int64_t token = token_begin; token < token_end; ++token) {
      float *x = static_cast<float *>(prepared) + token * stride;
      std::memset(x + plan.k, 0, static_cast<size_t>(stride - plan.k) * sizeof(float));
      copy_as_f32(plan.x, plan.x_dtype, token * plan.k, plan.k, x);
    }
  }
  static const float *values(const Plan &plan, int64_t codebook) {
    return plan.codebook + (codebook << plan.bits);
  }
  static const float *activations(const Plan &plan, const void *prepared, int64_t token) {
    return static_cast<const float *>(prepared) + token * padded_k<float>(plan);
  }

  template <int kLane>
  static void multiply(const float *w, float32x4_t x, float32x4_t acc[4]) {
    for (int j = 0; j < 4; ++j) acc[j] = vfmaq_laneq_f32(acc[j], vld1q_f32(w + 4 * j), x, kLane);
  }
  static float32x4_t load4(const float *x) { return vld1q_f32(x); }

  static void finish(const Plan &, const void *, int64_t, int64_t, int64_t,
                     const float32x4_t acc[4], float32x4_t out[4]) {
    for (int j = 0; j < 4; ++j) out[j] = acc[j];
  }
};

// int16: prepared = for each token the integers [padded_k], then scales [blocks], sums [blocks].
struct Int16Columns {
  using Element = int16_t;
  using Accumulator = int32x4_t;

  static int64_t stride(const Plan &plan) {
    const int64_t blocks = static_cast<int64_t>(plan.blocks.size());
    return round_up_to(padded_k<int16_t>(plan) * 2 + blocks * 8, 64);
  }
  static size_t prepared_bytes(const Plan &plan) {
    return static_cast<size_t>(plan.m * stride(plan));
  }
  static float *scales(const Plan &plan, const void *prepared, int64_t token) {
    char *base = static_cast<char *>(const_cast<void *>(prepared)) + token * stride(plan);
    return reinterpret_cast<float *>(base + padded_k<int16_t>(plan) * 2);
  }
  static void prepare(const Plan &plan, void *prepared, int64_t token_begin, int64_t token_end) {
    for (int64_t token = token_begin; token < token_end; ++token) {
      int16_t *x = const_cast<int16_t *>(activations(plan, prepared, token));
      float *scale = scales(plan, prepared, token);
      float *sum = scale + plan.blocks.size();
      std::memset(x + plan.k, 0, static_cast<size_t>(padded_k<int16_t>(plan) - plan.k) * 2);
      for (size_t b = 0; b < plan.blocks.size(); ++b) {
        const Block &block = plan.blocks[b];
        QuantisedBlock quantised;
        quantise_block(plan, token, block, plan.levels[0].x_limit16, quantised);
        std::memcpy(x + block.k0, quantised.x, static_cast<size_t>(block.length) * 2);
        scale[b] = quantised.scale;
        sum[b] = static_cast<float>(quantised.sum);
      }
    }
  }
  static const int16_t *values(const Plan &plan, int64_t codebook) {
    return plan.levels[codebook].level16;
  }
  static const int16_t *activations(const Plan &plan, const void *prepared, int64_t token) {
    return reinterpret_cast<const int16_t *>(static_cast<const char *>(prepared) +
                                             token * stride(plan));
  }

  template <int kLane>
  static void multiply(const int16_t *w, int16x4_t x, int32x4_t acc[4]) {
    const int16x8_t w0 = vld1q_s16(w);
    const int16x8_t w1 = vld1q_s16(w + 8);
    acc[0] = vmlal_lane_s16(acc[0], vget_low_s16(w0), x, kLane);
    acc[1] = vmlal_high_lane_s16(acc[1], w0, x, kLane);
    acc[2] = vmlal_lane_s16(acc[2], vget_low_s16(w1), x, kLane);
    acc[3] = vmlal_high_lane_s16(acc[3], w1, x, kLane);
  }
  static int16x4_t load4(const int16_t *x) { return vld1_s16(x); }

  static void finish(const Plan &plan, const void *prepared, int64_t codebook, int64_t token,
                     int64_t block, const int32x4_t acc[4], float32x4_t out[4]) {
    const Levels &levels = plan.levels[codebook];
    const float *scale = scales(plan, prepared, token) + block;
    const float slope = *scale * levels.factor16;
    const float32x4_t shift = vdupq_n_f32(*scale * (levels.offset16 * scale[plan.blocks.size()]));
    for (int j = 0; j < 4; ++j) out[j] = vfmaq_n_f32(shift, vcvtq_f32_s32(acc[j]), slope);
  }
};

template <typename Kind>
struct ColumnPanel {
  using E = typename Kind::Element;
  static constexpr int64_t kPanelBytes = kMaxColumns * kTileRows * static_cast<int64_t>(sizeof(E));
  static constexpr int kTokens = 4;

  static size_t scratch_bytes(const Plan &plan) {
    return static_cast<size_t>(kPanelBytes + plan.m * kTileRows * 4);
  }

  template <int kBits>
  static void decode(const uint8_t *bytes, int64_t count, const Lookup<E> &lookup, E *panel) {
    const auto decode_as = [&](auto high_half_only) {
      for_each_column<kBits>(bytes, count, [&](int64_t column, uint8x16_t codes) {
        lookup.template store<kBits, decltype(high_half_only)::value>(codes,
                                                                      panel + column * kTileRows);
      });
    };
    if (lookup.high_half_only()) return decode_as(std::true_type());
    decode_as(std::false_type());
  }

  template <int T>
  static void add_tokens(const Plan &plan, const void *prepared, const Range &range, int64_t token,
                         int64_t b, const E *panel, const float32x4_t scales[4], float *sums) {
    const Block &block = plan.blocks[static_cast<size_t>(b)];
    const E *x[T];
    for (int t = 0; t < T; ++t) x[t] = Kind::activations(plan, prepared, token + t) + block.k0;
    typename Kind::Accumulator acc[T][4] = {};
    // Four columns at a time: beyond K the activations are zero, and so are the codes.
    for (int64_t c = 0; c < block.length; c += 4) {
      const E *w = panel + c * kTileRows;
      for (int t = 0; t < T; ++t) {
        const auto x4 = Kind::load4(x[t] + c);
        Kind::template multiply<0>(w, x4, acc[t]);
        Kind::template multiply<1>(w + kTileRows, x4, acc[t]);
        Kind::template multiply<2>(w + 2 * kTileRows, x4, acc[t]);
        Kind::template multiply<3>(w + 3 * kTileRows, x4, acc[t]);
      }
    }
    for (int t = 0; t < T; ++t) {
      float32x4_t values[4];
      Kind::finish(plan, prepared, range.codebook, token + t, b, acc[t], values);
      for (int j = 0; j < 4; ++j) {
        float *sum = sums + t * kTileRows + 4 * j;
        vst1q_f32(sum, vfmaq_f32(vld1q_f32(sum), scales[j], values[j]));
      }
    }
  }

  template <int kBits>
  static void run_bits(const Plan &plan, const void *prepared, void *scratch, const Range &range) {
    const Lookup<E> lookup(Kind::values(plan, range.codebook), kBits);
    E *panel = static_cast<E *>(scratch);
    float *sums = reinterpret_cast<float *>(static_cast<char *>(scratch) + kPanelBytes);
    const int64_t tokens = range.token_end - range.token_begin;
    for (int64_t tile = range.tile_begin; tile < range.tile_end; ++tile) {
      std::memset(sums, 0, static_cast<size_t>(tokens * kTileRows) * sizeof(float));
      for (int64_t b = 0; b < static_cast<int64_t>(plan.blocks.size()); ++b) {
        const Block &block = plan.blocks[static_cast<size_t>(b)];
        const Columns columns = block_columns(plan, block);
        decode<kBits>(column_bytes(plan, tile, columns), columns.count, lookup, panel);
        const E *first = panel + (block.k0 - columns.first) * kTileRows;
        float32x4_t scales[4];
        load_scales4(plan, tile, block.group, scales);
        int64_t t = 0;
        for (; t + kTokens <= tokens; t += kTokens)
          add_tokens<kTokens>(plan, prepared, range, range.token_begin + t, b, first, scales,
                              sums + t * kTileRows);
        for (; t < tokens; ++t)
          add_tokens<1>(plan, prepared, range, range.token_begin + t, b, first, scales,
                        sums + t * kTileRows);
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
