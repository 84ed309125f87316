// Decoding in AVX2: an Arithmetic says how weights are decoded and multiplied.
//
// A step decodes, for each half of a tile (8 rows), to kVectors vectors of 8 rows x 32 bits. Each
// meets one 32-bit word of activations that all rows share: two int16 or one float32. The byte dot
// product of this ISA would saturate, so int8 levels and activations are widened to int16.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <type_traits>

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

// The same by bytes, entries of kEntryBytes: sixteen tables of sixteen, read by the low nibble. A
// look-up gives zero where bit 7 is set, so that two tables, one of them with that bit turned, are
// joined by an OR; the other three bits choose. Fewer instructions than reading memory for each
// code (docs/decisions/011).
template <int kEntryBytes>
struct ByteTables {
  alignas(16) uint8_t bytes[kEntryBytes][16][16];

  void load(const uint16_t *entries) {
    for (int i = 0; i < 256; ++i)
      for (int p = 0; p < kEntryBytes; ++p)
        bytes[p][i / 16][i % 16] = static_cast<uint8_t>(entries[i] >> (8 * p));
  }

  struct Index {
    __m256i low, high;  // the codes, for tables 0 .. 7 and 8 .. 15
    __m256i bits[3];    // bit 7 of bits[i] is bit 4 + i of a code
  };

  static __m256i look_up(const uint8_t *table, __m256i index) {
    const __m128i entries = _mm_load_si128(reinterpret_cast<const __m128i *>(table));
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(entries), index);
  }

  // Entries of tables kFirst .. kFirst + kCount - 1 and of those 8 after them.
  template <int kFirst, int kCount>
  static __m256i choose(const uint8_t (*tables)[16], const Index &index) {
    if constexpr (kCount == 1) {
      return _mm256_or_si256(look_up(tables[kFirst], index.low),
                             look_up(tables[kFirst + 8], index.high));
    } else {
      constexpr int half = kCount / 2;
      return _mm256_blendv_epi8(choose<kFirst, half>(tables, index),
                                choose<kFirst + half, half>(tables, index),
                                index.bits[std::countr_zero(unsigned{half})]);
    }
  }

  // use(0, even, odd): entries of bytes 0 and 2 of a row, of 1 and 3.
  template <typename Use>
  void look_up(__m256i v, Use use) const {
    const __m256i even_bytes = _mm256_set1_epi16(255);
    Index index{v, _mm256_xor_si256(v, _mm256_set1_epi8(-128)), {}};
    index.bits[2] = _mm256_add_epi8(v, v);
    for (int i = 1; i >= 0; --i)
      index.bits[i] = _mm256_add_epi8(index.bits[i + 1], index.bits[i + 1]);
    const __m256i l = choose<0, 8>(bytes[0], index);
    __m256i even = _mm256_and_si256(l, even_bytes);
    __m256i odd = _mm256_srli_epi16(l, 8);
    if constexpr (kEntryBytes == 2) {
      const __m256i h = choose<0, 8>(bytes[1], index);
      even = _mm256_or_si256(even, _mm256_slli_epi16(h, 8));
      odd = _mm256_or_si256(odd, _mm256_andnot_si256(even_bytes, h));
    }
    use(0, even, odd);
  }
};

// Tables of entries for codes of kBits, each of kEntryBytes (or fewer, which a nibble's tables do
// not mind).
template <int kBits, int kEntryBytes>
using Tables =
    std::conditional_t<kBits == 8, ByteTables<kEntryBytes>, NibbleTables<kBits == 8 ? 4 : kBits>>;

// The decode() of each Arithmetic calls use(v, weights) for the vectors v = 0 .. kVectors - 1 of a
// half of a step, as soon as each is there.

// Integer arithmetic on levels of 16 bits, which are looked up in tables of kEntryBytes; at 0 they
// are the codes themselves (8 bits, an affine codebook).
template <int kBits_, int kEntryBytes>
struct Integer {
  static constexpr int kBits = kBits_;
  static constexpr bool kInteger = true;
  static constexpr int kColumns = 2;
  static constexpr int kVectors = static_cast<int>(step_k(kBits)) / kColumns;
  using Sum = __m256i;

  Tables<kBits, std::max(kEntryBytes, 1)> tables;

  Integer(const Plan &plan, int64_t codebook) {
    if constexpr (kEntryBytes > 0) {
      const Levels &levels = plan.levels[codebook];
      const bool int8 = plan.arithmetic == FDK_INT8;
      uint16_t entries[1 << kBits];
      for (int q = 0; q < 1 << kBits; ++q)
        entries[q] = int8 ? uint16_t{levels.level8[q]} : static_cast<uint16_t>(levels.level16[q]);
      tables.load(entries);
    }
  }

  template <typename Use>
  void decode(const uint8_t *step, int half, Use use) const {
    const __m256i v = load_half<kBits>(step, half);
    if constexpr (kEntryBytes == 0) {
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

// The same at 8 bits where the values were evenly spaced before they were rounded to bfloat16.
struct Float32Even {
  static constexpr int kBits = 8;
  static constexpr bool kInteger = false;
  static constexpr int kColumns = 1;
  static constexpr int kVectors = 4;
  using Sum = __m256;

  __m256 first, step;

  explicit Float32Even(const float *values)
      : first(_mm256_set1_ps(values[0])),
        step(_mm256_set1_ps((values[255] - values[0]) / 255.0F)) {}
  Float32Even(const Plan &plan, int64_t codebook)
      : Float32Even(plan.codebook + (codebook << kBits)) {}

  // Values of eight codes, rounded to bfloat16; a value halfway between two goes the wrong way.
  __m256i values_of(__m256i codes) const {
    const __m256 value = _mm256_fmadd_ps(_mm256_cvtepi32_ps(codes), step, first);
    const __m256i rounded = _mm256_add_epi32(_mm256_castps_si256(value), _mm256_set1_epi32(0x8000));
    return _mm256_and_si256(rounded, _mm256_set1_epi32(static_cast<int>(0xffff0000U)));
  }

  // Whether that is every value of the codebooks.
  static bool holds(const Plan &plan) {
    for (int64_t c = 0; c < plan.num_codebooks; ++c) {
      const float *values = plan.codebook + (c << kBits);
      const Float32Even even(values);
      for (int q = 0; q < 256; q += 8) {
        const __m256i codes =
            _mm256_add_epi32(_mm256_set1_epi32(q), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
        const __m256i wanted = _mm256_castps_si256(_mm256_loadu_ps(values + q));
        const __m256i equal = _mm256_cmpeq_epi32(even.values_of(codes), wanted);
        if (_mm256_movemask_epi8(equal) != -1) return false;
      }
    }
    return true;
  }

  template <typename Use>
  void decode(const uint8_t *packed, int half, Use use) const {
    const __m256i v = load_half<kBits>(packed, half);
    for (int f = 0; f < kVectors; ++f)
      use(f, values_of(_mm256_and_si256(shift_right(v, 8 * f), _mm256_set1_epi32(255))));
  }

  static constexpr int word_column(int vector, int) { return vector; }
  static Sum zero() { return _mm256_setzero_ps(); }
  static Sum multiply_add(Sum sum, __m256i weights, __m256i word) {
    return Float32<kBits>::multiply_add(sum, weights, word);
  }
};

}  // namespace
}  // namespace fdk
