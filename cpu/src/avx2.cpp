// AVX2, FMA and F16C (Intel from Haswell, AMD from Zen 1).
//
// A step decodes, for each half of a tile (8 rows), to kVectors vectors of 8 rows x 32 bits. Each
// meets one 32-bit word of activations that all rows share: two int16 or one float32. The byte dot
// product of this level would saturate, so int8 levels and activations are widened to int16.
#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "decoding.h"
#include "levels.h"
#include "numeric.h"

namespace fdk {
namespace {

constexpr int64_t kHalfRows = 8;
constexpr int kMaxVectors = 32;        // of a half and a step, over all arithmetics
constexpr int64_t kMaxBlockSteps = 20;  // 64 columns at 4 a step, and the ragged ends
constexpr int64_t kTokens = 4;

// The four bytes of rows 8 * half .. 8 * half + 7.
template <int kBits>
inline __m256i load_half(const uint8_t *step, int half) {
  if constexpr (kBits != 1) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(step + 32 * half));
  } else {
    // [4 bytes][16 rows] -> [8 rows][4 bytes]
    __m128i plane[4];
    for (int j = 0; j < 4; ++j)
      plane[j] = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(step + 16 * j + 8 * half));
    const __m128i low = _mm_unpacklo_epi8(plane[0], plane[1]);
    const __m128i high = _mm_unpacklo_epi8(plane[2], plane[3]);
    return _mm256_set_m128i(_mm_unpackhi_epi16(low, high), _mm_unpacklo_epi16(low, high));
  }
}

// Column within a step of the code at bit `offset` of byte j of a row.
constexpr int column_at(int bits, int j, int offset) {
  return bits == 1 ? 8 * j + offset : 4 * (offset / bits) + j;
}

inline __m256i shift_right(__m256i v, int bits) { return _mm256_srl_epi32(v, _mm_cvtsi32_si128(bits)); }

// Integer arithmetic on 16-bit levels. Below 8 bits a nibble looks up the low and the high byte of
// a level; at 8 bits levels are gathered, or are the codes themselves when the codebook is affine.
template <int kBits_, bool kUniform8>
struct Integer {
  static constexpr int kBits = kBits_;
  static constexpr bool kInteger = true;
  static constexpr bool kGather = kBits == 8 && !kUniform8;
  static constexpr int kTables = kBits == 8 ? 1 : 4 / kBits;
  static constexpr int kColumns = kGather ? 1 : 2;
  static constexpr int kVectors = static_cast<int>(step_k(kBits)) / kColumns;
  using Sum = __m256i;

  __m256i low[kTables], high[kTables];
  int32_t gathered[kGather ? 256 : 1];

  Integer(const Plan &plan, int64_t codebook) {
    const Levels &levels = plan.levels[codebook];
    int32_t level[256];
    for (int q = 0; q < 1 << kBits; ++q)
      level[q] = plan.arithmetic == FDK_INT8 ? int32_t{levels.level8[q]} : int32_t{levels.level16[q]};
    if constexpr (kGather) {
      std::memcpy(gathered, level, sizeof gathered);
    } else if constexpr (kBits < 8) {
      for (int t = 0; t < kTables; ++t) {
        alignas(16) uint8_t bytes[2][16];
        for (int i = 0; i < 16; ++i) {
          const int32_t value = level[(i >> (t * kBits)) & ((1 << kBits) - 1)];
          bytes[0][i] = static_cast<uint8_t>(value & 255);
          bytes[1][i] = static_cast<uint8_t>((value >> 8) & 255);
        }
        low[t] = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<__m128i *>(bytes[0])));
        high[t] = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<__m128i *>(bytes[1])));
      }
    }
  }

  void decode(const uint8_t *step, int half, __m256i out[kVectors]) const {
    const __m256i v = load_half<kBits>(step, half);
    const __m256i even_bytes = _mm256_set1_epi16(255);
    if constexpr (kGather) {
      for (int j = 0; j < 4; ++j)
        out[j] = _mm256_i32gather_epi32(
            gathered, _mm256_and_si256(shift_right(v, 8 * j), _mm256_set1_epi32(255)), 4);
    } else if constexpr (kBits == 8) {
      out[0] = _mm256_and_si256(v, even_bytes);
      out[1] = _mm256_srli_epi16(v, 8);
    } else {
      const __m256i nibble = _mm256_set1_epi8(15);
      const __m256i index[2] = {_mm256_and_si256(v, nibble),
                                _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble)};
      for (int s = 0; s < 2; ++s)
        for (int t = 0; t < kTables; ++t) {
          const __m256i l = _mm256_shuffle_epi8(low[t], index[s]);
          const __m256i h = _mm256_shuffle_epi8(high[t], index[s]);
          __m256i *pair = out + (s * kTables + t) * 2;
          pair[0] = _mm256_or_si256(_mm256_and_si256(l, even_bytes), _mm256_slli_epi16(h, 8));
          pair[1] = _mm256_or_si256(_mm256_srli_epi16(l, 8), _mm256_andnot_si256(even_bytes, h));
        }
    }
  }

  // Column of element i of word `vector`.
  static constexpr int word_column(int vector, int i) {
    if (kGather) return vector;
    return column_at(kBits, vector % 2 + 2 * i, vector / 2 * kBits);
  }
  static Sum zero() { return _mm256_setzero_si256(); }
  static Sum multiply_add(Sum sum, __m256i weights, __m256i word) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(weights, word));
  }
};

// float32 arithmetic.
template <int kBits_>
struct Float32 {
  static constexpr int kBits = kBits_;
  static constexpr bool kInteger = false;
  static constexpr int kColumns = 1;
  static constexpr int kVectors = static_cast<int>(step_k(kBits));
  using Sum = __m256;

  const float *values;
  __m256 low, high;  // entries 0..7 and 8..15

  Float32(const Plan &plan, int64_t codebook) : values(plan.codebook + (codebook << kBits)) {
    if constexpr (kBits < 8) {
      alignas(32) float entries[16];
      for (int i = 0; i < 16; ++i) entries[i] = values[i & ((1 << kBits) - 1)];
      low = _mm256_load_ps(entries);
      high = _mm256_load_ps(entries + 8);
    }
  }

  void decode(const uint8_t *step, int half, __m256i out[kVectors]) const {
    const __m256i v = load_half<kBits>(step, half);
    for (int f = 0; f < kVectors; ++f) {
      const __m256i index = shift_right(v, f * kBits);
      if constexpr (kBits == 8) {
        const __m256i byte = _mm256_and_si256(index, _mm256_set1_epi32(255));
        out[f] = _mm256_castps_si256(_mm256_i32gather_ps(values, byte, 4));
      } else if constexpr (kBits == 4) {
        const __m256 top = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
        out[f] = _mm256_castps_si256(_mm256_blendv_ps(
            _mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), top));
      } else {
        out[f] = _mm256_castps_si256(_mm256_permutevar8x32_ps(low, index));
      }
    }
  }

  static constexpr int word_column(int vector, int) {
    return column_at(kBits, vector * kBits / 8, vector * kBits % 8);
  }
  static Sum zero() { return _mm256_setzero_ps(); }
  static Sum multiply_add(Sum sum, __m256i weights, __m256i word) {
    return _mm256_fmadd_ps(_mm256_castsi256_ps(weights), _mm256_castsi256_ps(word), sum);
  }
};

struct BlockFactor {
  float scale, sum;
};

// Prepared activations of a token: BlockFactor [blocks], then the words of all blocks.
template <typename A>
struct Prepared {
  int64_t factor_bytes, stride;
  explicit Prepared(const Plan &plan) {
    int64_t words = 0;
    for (const Block &block : plan.blocks)
      words += (block.step_end - block.step_begin) * A::kVectors;
    factor_bytes = static_cast<int64_t>(plan.blocks.size() * sizeof(BlockFactor));
    stride = ceil_div(factor_bytes + words * 4, 64) * 64;
  }
  BlockFactor *factors(const void *prepared, int64_t token) const {
    char *base = static_cast<char *>(const_cast<void *>(prepared)) + token * stride;
    return reinterpret_cast<BlockFactor *>(base);
  }
  int32_t *words(const void *prepared, int64_t token) const {
    return reinterpret_cast<int32_t *>(reinterpret_cast<char *>(factors(prepared, token)) +
                                       factor_bytes);
  }
};

template <typename A>
size_t prepared_bytes(const Plan &plan) {
  return static_cast<size_t>(plan.m * Prepared<A>(plan).stride);
}

// Columns of a block, quantised for the integer arithmetics.
template <typename A, typename Element>
BlockFactor convert_block(const Plan &plan, const float x[kMaxBlock], Element *natural) {
  if constexpr (!A::kInteger) {
    std::copy(x, x + kMaxBlock, natural);
    return {1.0F, 0.0F};
  } else {
    uint32_t magnitude = 0;
    for (int64_t i = 0; i < kMaxBlock; ++i)
      magnitude = std::max(magnitude, std::bit_cast<uint32_t>(x[i]) & 0x7fffffffU);
    const BlockScale scale =
        block_scale(magnitude, plan.arithmetic == FDK_INT8 ? 127 : plan.levels[0].x_limit16);
    int32_t sum = 0;
    for (int64_t i = 0; i < kMaxBlock && scale.inverse != 0.0F; ++i) {
      const auto q = static_cast<int32_t>(std::nearbyint(x[i] * scale.inverse));
      natural[i] = static_cast<Element>(q);
      sum += q;
    }
    return {scale.scale, static_cast<float>(sum)};
  }
}

template <typename A>
void prepare(const Plan &plan, void *prepared, int64_t token_begin, int64_t token_end) {
  // A gathered level meets one activation: the other half of its word stays 0.
  using Element = std::conditional_t<A::kInteger, int16_t, float>;
  constexpr int64_t columns = step_k(A::kBits);
  constexpr int64_t spread = A::kInteger && A::kColumns == 1 ? 2 : 1;
  const Prepared<A> layout(plan);
  for (int64_t token = token_begin; token < token_end; ++token) {
    int32_t *words = layout.words(prepared, token);
    for (size_t b = 0; b < plan.blocks.size(); ++b) {
      const Block &block = plan.blocks[b];
      const int64_t steps = block.step_end - block.step_begin;
      float x[kMaxBlock] = {};
      for (int64_t i = 0; i < block.length; ++i)
        x[i] = load_as_f32(plan.x, plan.x_dtype, token * plan.k + block.k0 + i);
      Element natural[2 * kMaxBlock + 64] = {};
      layout.factors(prepared, token)[b] =
          convert_block<A>(plan, x, natural + (block.k0 - block.step_begin * columns));
      std::memset(words, 0, static_cast<size_t>(steps * A::kVectors) * sizeof(int32_t));
      Element *out = reinterpret_cast<Element *>(words);
      for (int64_t s = 0; s < steps; ++s)
        for (int v = 0; v < A::kVectors; ++v)
          for (int i = 0; i < A::kColumns; ++i)
            out[(s * columns + v * A::kColumns + i) * spread] =
                natural[s * columns + A::word_column(v, i)];
      words += steps * A::kVectors;
    }
  }
}

inline __m256 load_half_scales(const Plan &plan, int64_t tile, int64_t group, int half) {
  const int64_t first = (tile * plan.groups + group) * kTileRows + half * kHalfRows;
  if (plan.scales_dtype == FDK_F32)
    return _mm256_loadu_ps(static_cast<const float *>(plan.scales) + first);
  const __m128i bits = _mm_loadu_si128(
      reinterpret_cast<const __m128i *>(static_cast<const uint16_t *>(plan.scales) + first));
  if (plan.scales_dtype == FDK_F16) return _mm256_cvtph_ps(bits);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

// What a block adds to a row, without the scale of its weights.
template <typename A>
inline __m256 finish_block(const Levels *levels, bool int8, typename A::Sum sum,
                           const BlockFactor &x) {
  if constexpr (!A::kInteger) {
    return sum;
  } else {
    const float factor = int8 ? levels->factor8 : levels->factor16;
    const float offset = int8 ? levels->offset8 : levels->offset16;
    const __m256 shifted =
        _mm256_add_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(x.sum * (offset / factor)));
    return _mm256_mul_ps(shifted, _mm256_set1_ps(x.scale * factor));
  }
}

// One block of a tile times kCount tokens, from decoded weights [vector][half].
template <typename A, int kCount>
inline void multiply_block(const Plan &plan, const Levels *levels, const void *prepared,
                           const __m256i *weights, int64_t vectors, int64_t word, int64_t tile,
                           size_t b, int64_t token, float *totals) {
  const Prepared<A> layout(plan);
  typename A::Sum sums[kCount][2];
  const int32_t *words[kCount];
  for (int t = 0; t < kCount; ++t) {
    words[t] = layout.words(prepared, token + t) + word;
    sums[t][0] = sums[t][1] = A::zero();
  }
  for (int64_t v = 0; v < vectors; ++v)
    for (int t = 0; t < kCount; ++t) {
      const __m256i x = _mm256_set1_epi32(words[t][v]);
      sums[t][0] = A::multiply_add(sums[t][0], weights[2 * v], x);
      sums[t][1] = A::multiply_add(sums[t][1], weights[2 * v + 1], x);
    }
  for (int half = 0; half < 2; ++half) {
    const __m256 scales = load_half_scales(plan, tile, plan.blocks[b].group, half);
    for (int t = 0; t < kCount; ++t) {
      float *total = totals + t * kTileRows + half * kHalfRows;
      const __m256 added = finish_block<A>(levels, plan.arithmetic == FDK_INT8, sums[t][half],
                                           layout.factors(prepared, token + t)[b]);
      _mm256_store_ps(total, _mm256_fmadd_ps(added, scales, _mm256_load_ps(total)));
    }
  }
}

// scratch: totals [tokens][16].
template <typename A>
size_t scratch_bytes(const Plan &plan) {
  return static_cast<size_t>(plan.m * kTileRows) * sizeof(float);
}

template <typename A>
void run(const Plan &plan, const void *prepared, void *scratch, const Range &range) {
  static_assert(A::kVectors <= kMaxVectors);
  const A arithmetic(plan, range.codebook);
  const Levels *levels = A::kInteger ? plan.levels + range.codebook : nullptr;
  const Prepared<A> layout(plan);
  const int64_t tokens = range.token_end - range.token_begin;
  float *totals = static_cast<float *>(scratch);
  for (int64_t tile = range.tile_begin; tile < range.tile_end; ++tile) {
    std::fill(totals, totals + tokens * kTileRows, 0.0F);
    int64_t word = 0;
    for (size_t b = 0; b < plan.blocks.size(); ++b) {
      const Block &block = plan.blocks[b];
      alignas(32) __m256i weights[kMaxBlockSteps * kMaxVectors];
      int64_t vectors = 0;
      for (int64_t s = block.step_begin; s < block.step_end; ++s, vectors += A::kVectors) {
        const uint8_t *step = plan.tile_packed(tile) + s * kStepBytes;
        _mm_prefetch(reinterpret_cast<const char *>(step + 1024), _MM_HINT_T0);
        for (int half = 0; half < 2; ++half) {
          __m256i decoded[A::kVectors];
          arithmetic.decode(step, half, decoded);
          for (int v = 0; v < A::kVectors; ++v) weights[(vectors + v) * 2 + half] = decoded[v];
        }
      }
      int64_t t = 0;
      for (; t + kTokens <= tokens; t += kTokens)
        multiply_block<A, kTokens>(plan, levels, prepared, weights, vectors, word, tile, b,
                                   range.token_begin + t, totals + t * kTileRows);
      for (; t < tokens; ++t)
        multiply_block<A, 1>(plan, levels, prepared, weights, vectors, word, tile, b,
                             range.token_begin + t, totals + t * kTileRows);
      word += vectors;
    }
    for (int64_t t = 0; t < tokens; ++t)
      store_tile(plan, range.token_begin + t, tile, range, totals + t * kTileRows);
  }
}

template <int kBits, bool kUniform8>
bool supports_integer(const Plan &plan) {
  return plan.arithmetic != FDK_EXACT && plan.bits == kBits && (!kUniform8 || plan.uniform);
}
template <int kBits>
bool supports_exact(const Plan &plan) {
  return plan.arithmetic == FDK_EXACT && plan.bits == kBits;
}

template <typename A>
constexpr Kernel make_kernel(const char *name, bool (*supports)(const Plan &)) {
  return {name, supports, prepared_bytes<A>, prepare<A>, scratch_bytes<A>, run<A>, 2};
}

constexpr Kernel kKernels[] = {
    make_kernel<Integer<8, true>>("avx2.integer_8bit_uniform", supports_integer<8, true>),
    make_kernel<Integer<8, false>>("avx2.integer_8bit", supports_integer<8, false>),
    make_kernel<Integer<4, false>>("avx2.integer_4bit", supports_integer<4, false>),
    make_kernel<Integer<2, false>>("avx2.integer_2bit", supports_integer<2, false>),
    make_kernel<Integer<1, false>>("avx2.integer_1bit", supports_integer<1, false>),
    make_kernel<Float32<8>>("avx2.float32_8bit", supports_exact<8>),
    make_kernel<Float32<4>>("avx2.float32_4bit", supports_exact<4>),
    make_kernel<Float32<2>>("avx2.float32_2bit", supports_exact<2>),
    make_kernel<Float32<1>>("avx2.float32_1bit", supports_exact<1>),
};

bool available() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

}  // namespace

const Level kAvx2Level = {"avx2", available, kKernels, nullptr, nullptr, nullptr, &kDecoding};

}  // namespace fdk

#endif
