// Decoding in AVX-512: an Arithmetic says how weights are decoded and multiplied.
//
// A step (64 packed bytes) decodes to kVectors vectors of 16 rows x 32 bits. Each vector meets one
// 32-bit word of activations that all rows share: four int8, two int16, two bfloat16 or one
// float32. Which columns lie in which word follows from the decoding; prepare() writes the
// activations in that order (see word_column).
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "kernel.h"
#include "numeric.h"

namespace fdk {
namespace {

// Row-major bytes: the 1-bit layout keeps byte j of 16 rows side by side, the others keep the four
// bytes of a row together.
inline __m512i load_step_1bit(const uint8_t *step) {
  alignas(64) static constexpr auto kIndex = [] {
    std::array<uint8_t, 64> index{};
    for (size_t r = 0; r < 16; ++r)
      for (size_t j = 0; j < 4; ++j) index[r * 4 + j] = static_cast<uint8_t>(j * 16 + r);
    return index;
  }();
  return _mm512_permutexvar_epi8(_mm512_load_si512(kIndex.data()), _mm512_loadu_si512(step));
}

template <int kBits>
inline __m512i load_step(const uint8_t *step) {
  if constexpr (kBits == 1) return load_step_1bit(step);
  else return _mm512_loadu_si512(step);
}

// Column within a step of the code at bit `offset` of byte j of a row.
constexpr int column_at(int bits, int j, int offset) {
  return bits == 1 ? 8 * j + offset : 4 * (offset / bits) + j;
}

// Row t, entry i: the code at the bits [t * kBits, ...) of i.
template <int kBits, typename Unsigned>
alignas(64) inline constexpr auto kFieldIndex = [] {
  std::array<std::array<Unsigned, 64 / sizeof(Unsigned)>, 6 / kBits> index{};
  for (size_t t = 0; t < index.size(); ++t)
    for (size_t i = 0; i < index[t].size(); ++i)
      index[t][i] = static_cast<Unsigned>((i >> (t * kBits)) & ((1U << kBits) - 1U));
  return index;
}();

// The tables that look up codes at their own bits, from a codebook of up to 16 entries.
template <int kBits, typename Element, size_t kCount>
inline void load_tables(const Element *entries, __m512i (&tables)[kCount]) {
  alignas(64) Element codebook[64 / sizeof(Element)] = {};
  std::copy(entries, entries + (1 << kBits), codebook);
  const __m512i values = _mm512_load_si512(codebook);
  for (size_t t = 0; t < kCount; ++t)
    if constexpr (sizeof(Element) == 1)
      tables[t] =
          _mm512_permutexvar_epi8(_mm512_load_si512(kFieldIndex<kBits, uint8_t>[t].data()), values);
    else if constexpr (sizeof(Element) == 2)
      tables[t] = _mm512_permutexvar_epi16(
          _mm512_load_si512(kFieldIndex<kBits, uint16_t>[t].data()), values);
    else
      tables[t] = _mm512_permutexvar_epi32(
          _mm512_load_si512(kFieldIndex<kBits, uint32_t>[t].data()), values);
}

// A 256-entry byte table in quarters, chosen by the index' top two bits. Look-ups in one register
// at a time: those in two (VPERMI2B) are three operations each.
struct Table256 {
  __m512i part[4];
  void load(const uint8_t *table) {
    for (int i = 0; i < 4; ++i) part[i] = _mm512_loadu_si512(table + 64 * i);
  }
  __m512i operator()(__m512i index) const {
    const __mmask64 odd = _mm512_movepi8_mask(_mm512_add_epi8(index, index));
    const __m512i low =
        _mm512_mask_permutexvar_epi8(_mm512_permutexvar_epi8(index, part[0]), odd, index, part[1]);
    const __m512i high =
        _mm512_mask_permutexvar_epi8(_mm512_permutexvar_epi8(index, part[2]), odd, index, part[3]);
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), low, high);
  }
};

// Byte plane `plane` of a 256-entry table of T.
template <typename T>
inline void load_plane(const T *table, size_t plane, Table256 &out) {
  alignas(64) uint8_t bytes[256];
  for (int i = 0; i < 256; ++i) bytes[i] = reinterpret_cast<const uint8_t *>(table + i)[plane];
  out.load(bytes);
}

// int8 activations: unsigned byte levels, VPDPBUSD. A byte index has 6 significant bits, so one
// table serves fields at different bits of the byte without masks, and few shifts are needed.
template <int kBits_, bool kUniform>
struct Int8 {
  static constexpr int kBits = kBits_;
  static constexpr int kColumns = 4;  // in a 32-bit word
  static constexpr bool kInteger = true;
  static constexpr int kVectors = 8 / kBits;
  // Fields that tables read at their own bits, without a shift.
  static constexpr int kTables = kBits == 4 ? 1 : kBits == 2 ? 3 : kBits == 1 ? 6 : 1;
  using Sum = __m512i;

  __m512i table[kBits == 8 ? 1 : kTables];
  Table256 table8;

  Int8(const Plan &plan, int64_t codebook) {
    const uint8_t *levels = plan.levels[codebook].level8;
    if constexpr (kBits == 8) {
      if constexpr (!kUniform) table8.load(levels);
    } else {
      load_tables<kBits>(levels, table);
    }
  }

  void decode(const uint8_t *step, __m512i out[kVectors]) const {
    const __m512i v = load_step<kBits>(step);
    if constexpr (kBits == 8) {
      out[0] = kUniform ? v : table8(v);
    } else if constexpr (kBits == 4 && kUniform) {
      const __m512i mask = _mm512_set1_epi8(15);
      out[0] = _mm512_and_si512(v, mask);
      out[1] = _mm512_and_si512(_mm512_srli_epi16(v, 4), mask);
    } else {
      for (int f = 0; f < kVectors; f += kTables) {
        const __m512i w = f == 0 ? v : _mm512_srli_epi16(v, static_cast<unsigned>(f * kBits));
        for (int t = 0; t < kTables && f + t < kVectors; ++t)
          out[f + t] = _mm512_permutexvar_epi8(w, table[t]);
      }
    }
  }

  // Column of byte i of word `vector`.
  static constexpr int word_column(int vector, int i) {
    return column_at(kBits, i, vector * kBits);
  }
  static Sum zero() { return _mm512_setzero_si512(); }
  static Sum multiply_add(Sum sum, __m512i weights, __m512i word) {
    return _mm512_dpbusd_epi32(sum, weights, word);
  }
  static __m512 to_float(Sum sum) { return _mm512_cvtepi32_ps(sum); }
};

// Decodes to 16-bit entries: VPERMW looks up the low 5 bits of each half of a row's 32 bits.
template <int kBits_>
struct Words {
  static constexpr int kBits = kBits_;
  static constexpr int kColumns = 2;
  static constexpr int kVectors = kBits == 8 ? 2 : 16 / kBits;
  static constexpr int kTables = kBits == 8 ? 1 : 4 / kBits;

  __m512i table[kTables];
  Table256 low, high;

  void load(const uint16_t *entries) {
    if constexpr (kBits == 8) {
      load_plane(entries, 0, low);
      load_plane(entries, 1, high);
    } else {
      load_tables<kBits>(entries, table);
    }
  }

  void decode(const uint8_t *step, __m512i out[kVectors]) const {
    const __m512i v = load_step<kBits>(step);
    if constexpr (kBits == 8) {
      // A row's planes (l0 l1 l2 l3), (h0 h1 h2 h3) -> (l0 h0 l2 h2), (l1 h1 l3 h3): without
      // permutations, of which the look-ups take all that one port does.
      const __m512i first_bytes = _mm512_set1_epi16(0x00ff);
      const __m512i l = low(v);
      const __m512i h = high(v);
      constexpr int select = 0xca;  // a bit of the second operand where the first has one
      out[0] = _mm512_ternarylogic_epi32(first_bytes, l, _mm512_slli_epi16(h, 8), select);
      out[1] = _mm512_ternarylogic_epi32(first_bytes, _mm512_srli_epi16(l, 8), h, select);
    } else {
      for (int s = 0; s < 4; ++s) {
        const __m512i w = s == 0 ? v : _mm512_srli_epi32(v, static_cast<unsigned>(4 * s));
        for (int t = 0; t < kTables; ++t)
          out[s * kTables + t] = _mm512_permutexvar_epi16(w, table[t]);
      }
    }
  }

  static constexpr int word_column(int vector, int i) {
    if (kBits == 8) return vector + 2 * i;
    const int s = vector / kTables;
    return column_at(kBits, s / 2 + 2 * i, s % 2 * 4 + vector % kTables * kBits);
  }
};

// int16 activations: signed 16-bit levels, VPDPWSSD.
template <int kBits_>
struct Int16 : Words<kBits_> {
  static constexpr bool kInteger = true;
  using Sum = __m512i;

  Int16(const Plan &plan, int64_t codebook) {
    uint16_t entries[256];
    std::memcpy(entries, plan.levels[codebook].level16, size_t{2} << kBits_);
    this->load(entries);
  }
  static Sum zero() { return _mm512_setzero_si512(); }
  static Sum multiply_add(Sum sum, __m512i weights, __m512i word) {
    return _mm512_dpwssd_epi32(sum, weights, word);
  }
  static __m512 to_float(Sum sum) { return _mm512_cvtepi32_ps(sum); }
};

// float32 activations.
template <int kBits_>
struct Float32 {
  static constexpr int kBits = kBits_;
  static constexpr int kColumns = 1;
  static constexpr bool kInteger = false;
  static constexpr int kVectors = 32 / kBits;
  static constexpr int kTables = kBits == 8 ? 1 : 4 / kBits;
  using Sum = __m512;

  __m512i table[kTables];
  Table256 plane[kBits == 8 ? 4 : 1];

  Float32(const Plan &plan, int64_t codebook) {
    const float *values = plan.codebook + (codebook << kBits);
    if constexpr (kBits == 8) {
      for (size_t p = 0; p < 4; ++p) load_plane(values, p, plane[p]);
    } else {
      load_tables<kBits>(values, table);
    }
  }

  void decode(const uint8_t *step, __m512i out[kVectors]) const {
    const __m512i v = load_step<kBits>(step);
    if constexpr (kBits == 8) {
      const __m512i p[4] = {plane[0](v), plane[1](v), plane[2](v), plane[3](v)};
      const __m512i byte = _mm512_set1_epi32(255);
      for (unsigned k = 0; k < 4; ++k) {
        __m512i value = _mm512_and_si512(_mm512_srli_epi32(p[0], 8 * k), byte);
        for (unsigned i = 1; i < 4; ++i)
          value = _mm512_or_si512(
              value,
              _mm512_slli_epi32(_mm512_and_si512(_mm512_srli_epi32(p[i], 8 * k), byte), 8 * i));
        out[k] = value;
      }
    } else {
      for (int s = 0; s < 8; ++s) {
        const __m512i w = s == 0 ? v : _mm512_srli_epi32(v, static_cast<unsigned>(4 * s));
        for (int t = 0; t < kTables; ++t)
          out[s * kTables + t] = _mm512_permutexvar_epi32(w, table[t]);
      }
    }
  }

  static constexpr int word_column(int vector, int) {
    if (kBits == 8) return vector;
    const int s = vector / kTables;
    return column_at(kBits, s / 2, s % 2 * 4 + vector % kTables * kBits);
  }
  static void store_block(const __m512 x[4], float *natural) {
    for (int i = 0; i < 4; ++i) _mm512_storeu_ps(natural + 16 * i, x[i]);
  }
  static Sum zero() { return _mm512_setzero_ps(); }
  static Sum multiply_add(Sum sum, __m512i weights, __m512i word) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(weights), _mm512_castsi512_ps(word), sum);
  }
  static __m512 to_float(Sum sum) { return sum; }
};

// The same where every value of the codebook is a bfloat16 (they are rounded to the dtype of the
// scales): half the planes to look up.
struct Float32Wide8 : Words<8> {
  static constexpr int kColumns = 1;
  static constexpr bool kInteger = false;
  static constexpr int kVectors = 4;
  using Sum = __m512;

  Float32Wide8(const Plan &plan, int64_t codebook) {
    uint16_t entries[256];
    for (int i = 0; i < 256; ++i) entries[i] = f32_to_bf16(plan.codebook[(codebook << 8) + i]);
    load(entries);
  }
  void decode(const uint8_t *step, __m512i out[kVectors]) const {
    __m512i pairs[2];
    Words<8>::decode(step, pairs);
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000U));
    for (int i = 0; i < 2; ++i) {
      out[i] = _mm512_slli_epi32(pairs[i], 16);
      out[i + 2] = _mm512_and_si512(pairs[i], upper);
    }
  }
  static constexpr int word_column(int vector, int) { return vector; }
  static void store_block(const __m512 x[4], float *natural) {
    Float32<8>::store_block(x, natural);
  }
  static Sum zero() { return Float32<8>::zero(); }
  static Sum multiply_add(Sum sum, __m512i weights, __m512i word) {
    return Float32<8>::multiply_add(sum, weights, word);
  }
  static __m512 to_float(Sum sum) { return sum; }
};

}  // namespace
}  // namespace fdk
