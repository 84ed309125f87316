// Decoding in AVX2: an Arithmetic says how weights are decoded and multiplied.
//
// A step decodes, for each half of a tile (8 rows), to kVectors vectors of 8 rows x 32 bits. Each
// meets one 32-bit word of activations that all rows share: two int16 or one float32. The byte dot
// product of this ISA would saturate, so int8 levels and activations are widened to int16.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "kernel.h"
#include "numeric.h"

namespace fdk {
namespace {

constexpr int64_t kHalfRows = 8;
constexpr int kMaxVectors = 32;         // of a half and a step, over all arithmetics
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

inline __m256i shift_right(__m256i v, int bits) {
  return _mm256_srl_epi32(v, _mm_cvtsi32_si128(bits));
}

// Looks up 16-bit entries of a codebook of up to 16 by nibbles: a table of their low bytes and one
// of their high bytes for each code that a nibble holds.
template <int kBits>
struct NibbleTables {
  static constexpr int kTables = 4 / kBits;
  __m256i low[kTables], high[kTables];

  void load(const uint16_t *entries) {
    for (int t = 0; t < kTables; ++t) {
      alignas(16) uint8_t bytes[2][16];
      for (int i = 0; i < 16; ++i) {
        const uint16_t value = entries[(i >> (t * kBits)) & ((1 << kBits) - 1)];
        bytes[0][i] = static_cast<uint8_t>(value & 255);
        bytes[1][i] = static_cast<uint8_t>(value >> 8);
      }
      low[t] = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<__m128i *>(bytes[0])));
      high[t] = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<__m128i *>(bytes[1])));
    }
  }

  // use(f, even, odd) for each field f of the bytes: entries of bytes 0 and 2 of a row, of 1 and 3.
  template <typename Use>
  void look_up(__m256i v, Use use) const {
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m256i even_bytes = _mm256_set1_epi16(255);
    for (int s = 0; s < 2; ++s) {
      const __m256i index = _mm256_and_si256(s == 0 ? v : _mm256_srli_epi16(v, 4), nibble);
      for (int t = 0; t < kTables; ++t) {
        const __m256i l = _mm256_shuffle_epi8(low[t], index);
        const __m256i h = _mm256_shuffle_epi8(high[t], index);
        use(s * kTables + t,
            _mm256_or_si256(_mm256_and_si256(l, even_bytes), _mm256_slli_epi16(h, 8)),
            _mm256_or_si256(_mm256_srli_epi16(l, 8), _mm256_andnot_si256(even_bytes, h)));
      }
    }
  }
};

// The decode() of each Arithmetic calls use(v, weights) for the vectors v = 0 .. kVectors - 1 of a
// half of a step, as soon as each is there.

// Integer arithmetic on 16-bit levels. Below 8 bits a nibble looks up the low and the high byte of
// a level; at 8 bits levels are gathered, or are the codes themselves when the codebook is affine.
template <int kBits_, bool kUniform8>
struct Integer {
  static constexpr int kBits = kBits_;
  static constexpr bool kInteger = true;
  static constexpr bool kGather = kBits == 8 && !kUniform8;
  static constexpr int kColumns = kGather ? 1 : 2;
  static constexpr int kVectors = static_cast<int>(step_k(kBits)) / kColumns;
  using Sum = __m256i;

  NibbleTables<kBits == 8 ? 4 : kBits> tables;
  int32_t gathered[kGather ? 256 : 1];

  Integer(const Plan &plan, int64_t codebook) {
    const Levels &levels = plan.levels[codebook];
    const bool int8 = plan.arithmetic == FDK_INT8;
    if constexpr (kGather) {
      for (int q = 0; q < 256; ++q)
        gathered[q] = int8 ? int32_t{levels.level8[q]} : int32_t{levels.level16[q]};
    } else if constexpr (kBits < 8) {
      uint16_t entries[1 << kBits];
      for (int q = 0; q < 1 << kBits; ++q)
        entries[q] = int8 ? uint16_t{levels.level8[q]} : static_cast<uint16_t>(levels.level16[q]);
      tables.load(entries);
    }
  }

  template <typename Use>
  void decode(const uint8_t *step, int half, Use use) const {
    const __m256i v = load_half<kBits>(step, half);
    if constexpr (kGather) {
      for (int j = 0; j < 4; ++j)
        use(j, _mm256_i32gather_epi32(
                   gathered, _mm256_and_si256(shift_right(v, 8 * j), _mm256_set1_epi32(255)), 4));
    } else if constexpr (kBits == 8) {
      use(0, _mm256_and_si256(v, _mm256_set1_epi16(255)));
      use(1, _mm256_srli_epi16(v, 8));
    } else {
      tables.look_up(v, [&](int f, __m256i even, __m256i odd) {
        use(2 * f, even);
        use(2 * f + 1, odd);
      });
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
  __m256 low, high;  // entries 0..7 and 8..15; up to 2 bits four of them, twice

  Float32(const Plan &plan, int64_t codebook) : values(plan.codebook + (codebook << kBits)) {
    if constexpr (kBits < 8) {
      constexpr int period = kBits == 4 ? 16 : 4;
      alignas(32) float entries[16];
      for (int i = 0; i < 16; ++i) entries[i] = values[i % period & ((1 << kBits) - 1)];
      low = _mm256_load_ps(entries);
      high = _mm256_load_ps(entries + 8);
    }
  }

  template <typename Use>
  void decode(const uint8_t *step, int half, Use use) const {
    const __m256i v = load_half<kBits>(step, half);
    for (int f = 0; f < kVectors; ++f) {
      const __m256i index = shift_right(v, f * kBits);
      if constexpr (kBits == 8) {
        const __m256i byte = _mm256_and_si256(index, _mm256_set1_epi32(255));
        use(f, _mm256_castps_si256(_mm256_i32gather_ps(values, byte, 4)));
      } else if constexpr (kBits == 4) {
        const __m256 top = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
        use(f, _mm256_castps_si256(_mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index),
                                                    _mm256_permutevar8x32_ps(high, index), top)));
      } else {  // two bits of the index count: at 1 bit entries 2 and 3 are 0 and 1 again
        use(f, _mm256_castps_si256(_mm256_permutevar_ps(low, index)));
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

// The same where every value of the codebook is a bfloat16: bytes are looked up, 32 at a time.
template <int kBits_>
struct Float32Short {
  static constexpr int kBits = kBits_;
  static constexpr bool kInteger = false;
  static constexpr int kColumns = 1;
  static constexpr int kVectors = static_cast<int>(step_k(kBits));
  using Sum = __m256;

  NibbleTables<kBits> tables;

  Float32Short(const Plan &plan, int64_t codebook) {
    uint16_t entries[1 << kBits];
    for (int q = 0; q < 1 << kBits; ++q)
      entries[q] = f32_to_bf16(plan.codebook[(codebook << kBits) + q]);
    tables.load(entries);
  }

  template <typename Use>
  void decode(const uint8_t *step, int half, Use use) const {
    const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000U));
    tables.look_up(load_half<kBits>(step, half), [&](int f, __m256i even, __m256i odd) {
      use(4 * f, _mm256_slli_epi32(even, 16));
      use(4 * f + 1, _mm256_slli_epi32(odd, 16));
      use(4 * f + 2, _mm256_and_si256(even, upper));
      use(4 * f + 3, _mm256_and_si256(odd, upper));
    });
  }

  static constexpr int word_column(int vector, int) {
    return column_at(kBits, vector % 4, vector / 4 * kBits);
  }
  static Sum zero() { return _mm256_setzero_ps(); }
  static Sum multiply_add(Sum sum, __m256i weights, __m256i word) {
    return Float32<kBits>::multiply_add(sum, weights, word);
  }
};

}  // namespace
}  // namespace fdk
