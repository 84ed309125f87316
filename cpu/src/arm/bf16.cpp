// NEON with matrix products of bfloat16 (Neoverse V1 and N2, Cortex-A510, A710 and X2 on): exact
// arithmetic for bfloat16 activations and codebooks, and the dense baseline.
#if defined(__aarch64__)
#include "../isas.h"
#include "features.h"
#include "mmla.h"

namespace fdk {
namespace {

bfloat16x8_t as_bf16(int8x16_t v) { return vreinterpretq_bf16_s8(v); }

struct Bf16Pairs {
  static constexpr int64_t kColumns = 4;
  using Accumulator = float32x4_t;

  // The codebook's bytes, low and high; all of it at 8 bits.
  struct Tables {
    uint8x16_t low;
    uint8x16_t high;
    uint16_t all[256];

    Tables(const Plan &plan, int64_t codebook) {
      const int64_t count = int64_t{1} << plan.bits;
      uint8_t low_bytes[16];
      uint8_t high_bytes[16];
      for (int64_t i = 0; i < std::max<int64_t>(count, 16); ++i) {
        all[i] = f32_to_bf16(plan.codebook[codebook * count + i % count]);
        if (i >= 16) continue;
        low_bytes[i] = static_cast<uint8_t>(all[i] & 255U);
        high_bytes[i] = static_cast<uint8_t>(all[i] >> 8U);
      }
      low = vld1q_u8(low_bytes);
      high = vld1q_u8(high_bytes);
    }
    static float factor() { return 1.0F; }
    static float offset() { return 0.0F; }
  };

  static float32x4_t multiply(float32x4_t acc, int8x16_t rows, int8x16_t tokens) {
    return vbfmmlaq_f32(acc, as_bf16(rows), as_bf16(tokens));
  }
  static float32x4_t value(float32x4_t acc, float32x4_t, float32x4_t) { return acc; }

  static void write_row(const Plan &plan, int64_t token, const Block &block, int8_t *row, float &,
                        float &) {
    const int64_t skipped = block.k0 - block_columns(plan, block).first;
    std::memcpy(row + skipped * 2,
                static_cast<const uint16_t *>(plan.x) + token * plan.k + block.k0,
                static_cast<size_t>(block.length) * 2);
  }

  static void store(const Tables &tables, int8_t *to, uint8x16_t codes) {
    const uint8x16_t low = vqtbl1q_u8(tables.low, codes);
    const uint8x16_t high = vqtbl1q_u8(tables.high, codes);
    vst1q_s8(to, vreinterpretq_s8_u8(vzip1q_u8(low, high)));
    vst1q_s8(to + 16, vreinterpretq_s8_u8(vzip2q_u8(low, high)));
  }

  template <int kBits>
  static void decode(const uint8_t *bytes, int64_t count, const Tables &tables, int8_t *panel) {
    if constexpr (kBits == 8) {
      uint16_t *out = reinterpret_cast<uint16_t *>(panel);
      for (int64_t i = 0; i < count * kTileRows; ++i) out[i] = tables.all[bytes[i]];
    } else {
      for_each_code_unit<kBits>(bytes, count, [&](int64_t unit, int j, uint8x16_t codes) {
        store(tables, panel + unit * 128 + j * 32, codes);
      });
    }
  }
};

using Panel = Mmla<Bf16Pairs>;

// Codebooks in another precision are not exact in bfloat16.
bool supports_exact(const Plan &plan) {
  return plan.arithmetic == FDK_EXACT && plan.x_dtype == FDK_BF16 && plan.scales_dtype == FDK_BF16;
}

constexpr Kernel kKernels[] = {
    {"bf16.panel_exact", supports_exact, Panel::prepared_bytes, Panel::prepare,
     Panel::scratch_bytes, Panel::run, 1},
};

// ---- Dense bfloat16: kRows rows of w by kTokens rows of x, eight columns at a time ------------

// [2][4 columns]: columns c..c+3 of two rows, or c+4..c+7.
struct PairOfRows {
  int8x16_t first;
  int8x16_t second;
  PairOfRows(const uint16_t *a, const uint16_t *b) {
    const int64x2_t va = vreinterpretq_s64_u16(vld1q_u16(a));
    const int64x2_t vb = vreinterpretq_s64_u16(vld1q_u16(b));
    first = vreinterpretq_s8_s64(vzip1q_s64(va, vb));
    second = vreinterpretq_s8_s64(vzip2q_s64(va, vb));
  }
};

// Pairs beyond the end repeat the last row and are not stored.
template <int kRowPairs, int kTokenPairs>
void dense_block(const fdk_dense_args &args, int64_t n, int64_t rows, int64_t m, int64_t tokens) {
  const int64_t k = args.in_features;
  float32x4_t acc[kRowPairs][kTokenPairs] = {};
  const auto row = [&](int64_t r) { return args.weight + (n + std::min(r, rows - 1)) * k; };
  const auto token = [&](int64_t t) { return args.x + (m + std::min(t, tokens - 1)) * k; };
  int64_t c = 0;
  for (; c + 8 <= k; c += 8) {
    float32x4_t *sums = acc[0];
    const auto tokens_at = [&](int p) {
      return PairOfRows(token(2 * p) + c, token(2 * p + 1) + c);
    };
    for (int r = 0; r < kRowPairs; ++r, sums += kTokenPairs) {
      const PairOfRows w(row(2 * r) + c, row(2 * r + 1) + c);
      for (int p = 0; p < kTokenPairs; ++p) {
        const PairOfRows x = tokens_at(p);
        sums[p] = vbfmmlaq_f32(sums[p], as_bf16(w.first), as_bf16(x.first));
        sums[p] = vbfmmlaq_f32(sums[p], as_bf16(w.second), as_bf16(x.second));
      }
    }
  }
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t r = 0; r < rows; ++r) {
      float out[4];
      vst1q_f32(out, acc[r / 2][t / 2]);
      float sum = out[r % 2 * 2 + t % 2];
      for (int64_t i = c; i < k; ++i) sum += bf16_to_f32(row(r)[i]) * bf16_to_f32(token(t)[i]);
      args.y[(m + t) * args.out_features + n + r] = f32_to_bf16(sum);
    }
}

void dense_rows(const fdk_dense_args &args, int64_t row_begin, int64_t row_end) {
  for (int64_t n = row_begin; n < row_end; n += 8) {
    const int64_t rows = std::min<int64_t>(8, row_end - n);
    int64_t m = 0;
    for (; m + 2 < args.m; m += 8)
      dense_block<4, 4>(args, n, rows, m, std::min<int64_t>(8, args.m - m));
    if (m < args.m) dense_block<4, 1>(args, n, rows, m, args.m - m);
  }
}

bool available() { return arm_features().dotprod && arm_features().i8mm && arm_features().bf16; }

}  // namespace

const Isa kBf16Isa = {"bf16", available, kKernels, dense_rows, nullptr, nullptr};

}  // namespace fdk
#endif
