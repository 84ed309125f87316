// The AVX-512 kernels, over an Arithmetic that says how weights are decoded and multiplied.
//
// A step (64 packed bytes) decodes to kVectors vectors of 16 rows x 32 bits. Each vector meets one
// 32-bit word of activations that all rows share: four int8, two int16, two bfloat16 or one
// float32. Which columns lie in which word follows from the decoding; prepare() writes the
// activations in that order (see word_column). Included by one translation unit an instruction set.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "kernel.h"
#include "numeric.h"

namespace fdk {
namespace {

inline constexpr int64_t kDirectTokens = 8;   // up to here weights are decoded in registers
inline constexpr int64_t kPanelTiles = 4;     // the register block of the panel path:
inline constexpr int64_t kPanelTokens = 6;    // 24 sums, 4 weights, 1 activation word
inline constexpr int64_t kPanelBytes = 192 << 10;  // decoded weights that stay in the L2 cache
inline constexpr int64_t kPrefetchBytes = 2048;

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
  if constexpr (kBits == 1)
    return load_step_1bit(step);
  else
    return _mm512_loadu_si512(step);
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
      tables[t] = _mm512_permutexvar_epi8(
          _mm512_load_si512(kFieldIndex<kBits, uint8_t>[t].data()), values);
    else if constexpr (sizeof(Element) == 2)
      tables[t] = _mm512_permutexvar_epi16(
          _mm512_load_si512(kFieldIndex<kBits, uint16_t>[t].data()), values);
    else
      tables[t] = _mm512_permutexvar_epi32(
          _mm512_load_si512(kFieldIndex<kBits, uint32_t>[t].data()), values);
}

// A 256-entry byte table: two halves chosen by the index' top bit.
struct Table256 {
  __m512i part[4];
  void load(const uint8_t *table) {
    for (int i = 0; i < 4; ++i) part[i] = _mm512_loadu_si512(table + 64 * i);
  }
  __m512i operator()(__m512i index) const {
    const __m512i low = _mm512_permutex2var_epi8(part[0], index, part[1]);
    const __m512i high = _mm512_permutex2var_epi8(part[2], index, part[3]);
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), low, high);
  }
};

// Byte plane `plane` of a 256-entry table of T.
template <typename T>
inline void load_plane(const T *table, size_t plane, Table256 &out) {
  alignas(64) uint8_t bytes[256];
  for (int i = 0; i < 256; ++i)
    bytes[i] = reinterpret_cast<const uint8_t *>(table + i)[plane];
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
      // A row's planes (l0 l1 l2 l3), (h0 h1 h2 h3) -> (l0 h0 l1 h1), (l2 h2 l3 h3).
      alignas(64) static constexpr auto kIndex = [] {
        std::array<std::array<uint8_t, 64>, 2> index{};
        for (size_t half = 0; half < 2; ++half)
          for (size_t b = 0; b < 64; ++b)
            index[half][b] = static_cast<uint8_t>(b / 4 * 4 + half * 2 + b % 4 / 2 + b % 2 * 64);
        return index;
      }();
      const __m512i l = low(v);
      const __m512i h = high(v);
      for (size_t half = 0; half < 2; ++half)
        out[half] = _mm512_permutex2var_epi8(l, _mm512_load_si512(kIndex[half].data()), h);
    } else {
      for (int s = 0; s < 4; ++s) {
        const __m512i w = s == 0 ? v : _mm512_srli_epi32(v, static_cast<unsigned>(4 * s));
        for (int t = 0; t < kTables; ++t)
          out[s * kTables + t] = _mm512_permutexvar_epi16(w, table[t]);
      }
    }
  }

  static constexpr int word_column(int vector, int i) {
    if (kBits == 8) return vector * 2 + i;
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
              value, _mm512_slli_epi32(_mm512_and_si512(_mm512_srli_epi32(p[i], 8 * k), byte),
                                       8 * i));
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
      out[2 * i] = _mm512_slli_epi32(pairs[i], 16);
      out[2 * i + 1] = _mm512_and_si512(pairs[i], upper);
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

// Sixteen elements of any dtype as float32; those without a mask bit are 0 and are not read.
inline __m512 load_floats(const void *data, fdk_dtype dtype, int64_t index, __mmask16 mask) {
  if (dtype == FDK_F32)
    return _mm512_maskz_loadu_ps(mask, static_cast<const float *>(data) + index);
  const __m256i bits =
      _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t *>(data) + index);
  if (dtype == FDK_F16) return _mm512_cvtph_ps(bits);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline __mmask16 first_lanes(int64_t count) {
  return count >= 16 ? __mmask16{0xffff}
                     : static_cast<__mmask16>((1U << std::max<int64_t>(count, 0)) - 1U);
}

inline __m512 load_tile_scales(const Plan &plan, int64_t tile, int64_t group) {
  return load_floats(plan.scales, plan.scales_dtype, (tile * plan.groups + group) * kTileRows,
                     0xffff);
}

// Prepared activations, a token after the other: per block (integers only) {scale, sum}, then the
// words of all blocks. 64 bytes are left over for stores of whole vectors.
struct BlockFactor {
  float scale, sum;
};

template <typename A>
struct Prepared {
  int64_t words;  // of a token
  int64_t stride;
  explicit Prepared(const Plan &plan) {
    words = 0;
    for (const Block &block : plan.blocks) words += (block.step_end - block.step_begin) * A::kVectors;
    const int64_t factors = A::kInteger ? static_cast<int64_t>(plan.blocks.size() * sizeof(BlockFactor)) : 0;
    factor_bytes = ceil_div(factors, 64) * 64;
    stride = factor_bytes + ceil_div(words * 4, 64) * 64 + 64;
  }
  const BlockFactor *factors(const void *prepared, int64_t token) const {
    return reinterpret_cast<const BlockFactor *>(static_cast<const char *>(prepared) + token * stride);
  }
  const int32_t *token_words(const void *prepared, int64_t token) const {
    return reinterpret_cast<const int32_t *>(static_cast<const char *>(prepared) + token * stride +
                                             factor_bytes);
  }

 private:
  int64_t factor_bytes;
};

template <typename A>
size_t prepared_bytes(const Plan &plan) {
  return static_cast<size_t>(plan.m * Prepared<A>(plan).stride);
}

// The order of columns in the words of a step: element e = vector * kColumns + i.
template <typename A>
inline constexpr auto kColumnOrder = [] {
  std::array<uint8_t, static_cast<size_t>(step_k(A::kBits))> order{};
  for (int v = 0; v < A::kVectors; ++v)
    for (int i = 0; i < A::kColumns; ++i)
      order[static_cast<size_t>(v * A::kColumns + i)] =
          static_cast<uint8_t>(A::word_column(v, i));
  return order;
}();

// Index vector that applies kColumnOrder to the elements of one or more steps in 64 bytes.
template <typename A, typename Element>
inline __m512i order_index() {
  constexpr size_t count = 64 / sizeof(Element);
  constexpr size_t columns = static_cast<size_t>(step_k(A::kBits));
  alignas(64) static constexpr auto kIndex = [] {
    std::array<Element, count> index{};
    for (size_t e = 0; e < count; ++e)
      index[e] = static_cast<Element>(e / columns * columns + kColumnOrder<A>[e % columns]);
    return index;
  }();
  return _mm512_load_si512(kIndex.data());
}

// Elements of a block in natural order, on the grid of steps, zeros around it -> words.
template <typename A, typename Element>
inline void write_words(const Element *natural, int64_t steps, int32_t *words) {
  constexpr int64_t columns = step_k(A::kBits);
  Element *out = reinterpret_cast<Element *>(words);
  if constexpr (sizeof(Element) == 4) {
    for (int64_t s = 0; s < steps; ++s)
      for (int64_t e = 0; e < columns; ++e)
        out[s * columns + e] = natural[s * columns + kColumnOrder<A>[static_cast<size_t>(e)]];
  } else {
    constexpr int64_t count = 64 / static_cast<int64_t>(sizeof(Element));
    const __m512i index = order_index<A, Element>();
    for (int64_t e = 0; e < steps * columns; e += count) {
      const __m512i v = _mm512_loadu_si512(natural + e);
      _mm512_storeu_si512(out + e, sizeof(Element) == 1 ? _mm512_permutexvar_epi8(index, v)
                                                        : _mm512_permutexvar_epi16(index, v));
    }
  }
}

// Up to kMaxBlock columns and the steps around them, with room for whole vectors.
inline constexpr size_t kNaturalElements = 192;

template <typename A, typename Element>
inline BlockFactor quantise_block(const __m512 x[4], int32_t limit, Element *natural) {
  const __m512i magnitude_mask = _mm512_set1_epi32(0x7fffffff);
  __m512i magnitude = _mm512_setzero_si512();
  for (int i = 0; i < 4; ++i)
    magnitude = _mm512_max_epu32(magnitude,
                                 _mm512_and_si512(_mm512_castps_si512(x[i]), magnitude_mask));
  const BlockScale scale = block_scale(_mm512_reduce_max_epu32(magnitude), limit);
  const __m512 inverse = _mm512_set1_ps(scale.inverse);
  // A block that holds a NaN or an infinity has inverse 0: its integers must not be NaN's.
  const __mmask16 usable = scale.inverse == 0.0F ? __mmask16{0} : __mmask16{0xffff};
  __m512i sum = _mm512_setzero_si512();
  for (int i = 0; i < 4; ++i) {
    const __m512i q = _mm512_maskz_cvtps_epi32(usable, _mm512_mul_ps(x[i], inverse));
    sum = _mm512_add_epi32(sum, q);
    if constexpr (sizeof(Element) == 1)
      _mm_storeu_si128(reinterpret_cast<__m128i *>(natural + 16 * i), _mm512_cvtepi32_epi8(q));
    else
      _mm256_storeu_si256(reinterpret_cast<__m256i *>(natural + 16 * i), _mm512_cvtepi32_epi16(q));
  }
  return {scale.scale, static_cast<float>(_mm512_reduce_add_epi32(sum))};
}

inline void load_block(const Plan &plan, int64_t token, const Block &block, __m512 x[4]) {
  for (int64_t i = 0; i < 4; ++i)
    x[i] = load_floats(plan.x, plan.x_dtype, token * plan.k + block.k0 + 16 * i,
                       first_lanes(block.length - 16 * i));
}

template <typename A>
void prepare(const Plan &plan, void *prepared, int64_t token_begin, int64_t token_end) {
  using Element = std::conditional_t<A::kColumns == 4, int8_t,
                                     std::conditional_t<A::kColumns == 2, int16_t, float>>;
  const Prepared<A> layout(plan);
  const int32_t limit =
      !A::kInteger ? 0 : A::kColumns == 4 ? 127 : plan.levels[0].x_limit16;
  for (int64_t token = token_begin; token < token_end; ++token) {
    auto *factors = const_cast<BlockFactor *>(layout.factors(prepared, token));
    auto *words = const_cast<int32_t *>(layout.token_words(prepared, token));
    for (size_t b = 0; b < plan.blocks.size(); ++b) {
      const Block &block = plan.blocks[b];
      const int64_t steps = block.step_end - block.step_begin;
      const int64_t lead = block.k0 - block.step_begin * step_k(A::kBits);
      alignas(64) Element natural[kNaturalElements] = {};
      __m512 x[4];
      load_block(plan, token, block, x);
      if constexpr (A::kInteger)
        factors[b] = quantise_block<A>(x, limit, natural + lead);
      else
        A::store_block(x, natural + lead);
      write_words<A>(natural, steps, words);
      words += steps * A::kVectors;
    }
  }
}

// Sixteen float32 to elements of any dtype, rounded like store_from_f32.
inline void store_floats(void *data, fdk_dtype dtype, int64_t index, __m512 values) {
  if (dtype == FDK_F32) {
    _mm512_storeu_ps(static_cast<float *>(data) + index, values);
    return;
  }
  __m256i bits;
  if (dtype == FDK_F16) {
    bits = _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  } else {
    const __m512i u = _mm512_castps_si512(values);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    bits = _mm512_cvtepi32_epi16(_mm512_srli_epi32(
        _mm512_mask_or_epi32(rounded, nan, u, _mm512_set1_epi32(0x400000)), 16));
  }
  _mm256_storeu_si256(
      reinterpret_cast<__m256i *>(static_cast<uint16_t *>(data) + index), bits);
}

// sums -> y.
inline void store_sums(const Plan &plan, int64_t token, int64_t tile, const Range &range,
                       __m512 sums) {
  const int64_t first = tile * kTileRows;
  if (range.row_begin <= first && first + kTileRows <= range.row_end) {
    if (plan.bias != nullptr)
      sums = _mm512_add_ps(sums, load_floats(plan.bias, plan.bias_dtype, first, 0xffff));
    store_floats(plan.y, plan.y_dtype, token * plan.n + first, sums);
    return;
  }
  alignas(64) float rows[kTileRows];
  _mm512_store_ps(rows, sums);
  store_tile(plan, token, tile, range, rows);
}

// What a block adds to a row: float sums as they are; integers with the scale of the activations
// and the codebook's offset: (sum + sum_x * offset / factor) * (scale * factor).
template <typename A>
struct Finish {
  float ratio = 0.0F, factor = 1.0F;
  explicit Finish(const Plan &plan, int64_t codebook) {
    if constexpr (A::kInteger) {
      const Levels &levels = plan.levels[codebook];
      factor = A::kColumns == 4 ? levels.factor8 : levels.factor16;
      ratio = (A::kColumns == 4 ? levels.offset8 : levels.offset16) / factor;
    }
  }
  __m512 block(typename A::Sum sum, const BlockFactor *factors, size_t b) const {
    if constexpr (!A::kInteger) {
      return sum;
    } else {
      const __m512 shifted =
          _mm512_add_ps(A::to_float(sum), _mm512_set1_ps(factors[b].sum * ratio));
      return _mm512_mul_ps(shifted, _mm512_set1_ps(factors[b].scale * factor));
    }
  }
};

inline void prefetch(const void *p) { _mm_prefetch(static_cast<const char *>(p), _MM_HINT_T0); }

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

// Few tokens: kTiles tiles side by side, weights decoded in registers. Several tiles are several
// streams of memory and several independent chains of sums, and share the words of x.
template <typename A, int kTokens, int kTiles>
void direct(const Plan &plan, const A &arithmetic, const Finish<A> &finish,
            const Prepared<A> &layout, const void *prepared, const Range &range, int64_t token,
            int64_t tile) {
  const int32_t *words[kTokens];
  const BlockFactor *factors[kTokens];
  __m512 totals[kTokens][kTiles];
  for (int t = 0; t < kTokens; ++t) {
    words[t] = layout.token_words(prepared, token + t);
    factors[t] = layout.factors(prepared, token + t);
    for (__m512 &total : totals[t]) total = _mm512_setzero_ps();
  }
  const Streams<kTiles> streams(plan, range, tile);
  int64_t word = 0;
  for (size_t b = 0; b < plan.blocks.size(); ++b) {
    const Block &block = plan.blocks[b];
    typename A::Sum sums[kTokens][kTiles];
    for (auto &of_token : sums)
      for (auto &sum : of_token) sum = A::zero();
    for (int64_t s = block.step_begin; s < block.step_end; ++s, word += A::kVectors) {
      const int64_t ahead = streams.ahead(s);
      for (int i = 0; i < kTiles; ++i) {
        __m512i weights[A::kVectors];
        arithmetic.decode(streams.step(s, i, ahead), weights);
        for (int v = 0; v < A::kVectors; ++v)
          for (int t = 0; t < kTokens; ++t)
            sums[t][i] =
                A::multiply_add(sums[t][i], weights[v], _mm512_set1_epi32(words[t][word + v]));
      }
    }
    for (int i = 0; i < kTiles; ++i) {
      streams.fetch_scales(block.group, i);
      const __m512 scales = load_tile_scales(plan, tile + i, block.group);
      for (int t = 0; t < kTokens; ++t)
        totals[t][i] = _mm512_fmadd_ps(finish.block(sums[t][i], factors[t], b), scales, totals[t][i]);
    }
  }
  for (int t = 0; t < kTokens; ++t)
    for (int i = 0; i < kTiles; ++i) store_sums(plan, token + t, tile + i, range, totals[t][i]);
}

// All tokens of the range by the tiles from `tile` on, kTiles of them.
template <typename A, int kTiles>
void direct_tokens(const Plan &plan, const A &arithmetic, const Finish<A> &finish,
                   const Prepared<A> &layout, const void *prepared, const Range &range,
                   int64_t tile) {
  int64_t token = range.token_begin;
  if constexpr (kTiles == 1)
    for (; token + 8 <= range.token_end; token += 8)
      direct<A, 8, kTiles>(plan, arithmetic, finish, layout, prepared, range, token, tile);
  if constexpr (kTiles <= 2)
    for (; token + 4 <= range.token_end; token += 4)
      direct<A, 4, kTiles>(plan, arithmetic, finish, layout, prepared, range, token, tile);
  for (; token + 2 <= range.token_end; token += 2)
    direct<A, 2, kTiles>(plan, arithmetic, finish, layout, prepared, range, token, tile);
  for (; token < range.token_end; ++token)
    direct<A, 1, kTiles>(plan, arithmetic, finish, layout, prepared, range, token, tile);
}

template <typename A>
void run_direct(const Plan &plan, const A &arithmetic, const Finish<A> &finish,
                const void *prepared, const Range &range) {
  const Prepared<A> layout(plan);
  const int64_t tokens = range.token_end - range.token_begin;
  int64_t tile = range.tile_begin;
  // As many tiles as keep the sums of all tokens in registers.
  if (tokens < 4)
    for (; tile + 4 <= range.tile_end; tile += 4)
      direct_tokens<A, 4>(plan, arithmetic, finish, layout, prepared, range, tile);
  if (tokens < 8)
    for (; tile + 2 <= range.tile_end; tile += 2)
      direct_tokens<A, 2>(plan, arithmetic, finish, layout, prepared, range, tile);
  for (; tile < range.tile_end; ++tile)
    direct_tokens<A, 1>(plan, arithmetic, finish, layout, prepared, range, tile);
}

// Many tokens: kPanelTiles tiles are decoded once for a stretch of blocks, then meet all tokens.
// panel [vector][kPanelTiles][16 x 32 bits]; totals [token][kPanelTiles][16] float32.
template <typename A>
size_t panel_scratch_bytes(const Plan &plan) {
  if (plan.m <= kDirectTokens) return 0;
  const int64_t totals = plan.m * kPanelTiles * kTileRows * 4;
  const int64_t block_bytes =
      (kMaxBlock / step_k(A::kBits) + 2) * A::kVectors * kPanelTiles * 64;
  return static_cast<size_t>(totals + kPanelBytes + block_bytes);
}

template <typename A, int kTokens>
void panel_block(const __m512i *panel, int64_t vectors, const int32_t *const words[],
                 typename A::Sum sums[kTokens][kPanelTiles]) {
  for (int t = 0; t < kTokens; ++t)
    for (int i = 0; i < kPanelTiles; ++i) sums[t][i] = A::zero();
  for (int64_t v = 0; v < vectors; ++v) {
    __m512i weights[kPanelTiles];
    for (int i = 0; i < kPanelTiles; ++i) weights[i] = _mm512_load_si512(panel + v * kPanelTiles + i);
    for (int t = 0; t < kTokens; ++t) {
      const __m512i word = _mm512_set1_epi32(words[t][v]);
      for (int i = 0; i < kPanelTiles; ++i)
        sums[t][i] = A::multiply_add(sums[t][i], weights[i], word);
    }
  }
}

// Blocks [block_begin, block_end), whose first word is `word`, for kTokens tokens.
template <typename A, int kTokens>
void panel_tokens(const Plan &plan, const Finish<A> &finish, const void *prepared,
                  const __m512i *panel, float *totals, int64_t tile, int64_t tiles, int64_t token,
                  size_t block_begin, size_t block_end, int64_t word) {
  const Prepared<A> layout(plan);
  for (size_t b = block_begin; b < block_end; ++b) {
    const Block &block = plan.blocks[b];
    const int64_t vectors = (block.step_end - block.step_begin) * A::kVectors;
    const int32_t *words[kTokens];
    for (int t = 0; t < kTokens; ++t) words[t] = layout.token_words(prepared, token + t) + word;
    typename A::Sum sums[kTokens][kPanelTiles];
    panel_block<A, kTokens>(panel, vectors, words, sums);
    for (int i = 0; i < kPanelTiles; ++i) {
      // Tiles beyond the panel's end hold zeros; they borrow the first one's scales.
      const __m512 scales = load_tile_scales(plan, i < tiles ? tile + i : tile, block.group);
      for (int t = 0; t < kTokens; ++t) {
        float *total = totals + (t * kPanelTiles + i) * kTileRows;
        const __m512 added = finish.block(sums[t][i], layout.factors(prepared, token + t), b);
        _mm512_store_ps(total, _mm512_fmadd_ps(added, scales, _mm512_load_ps(total)));
      }
    }
    panel += vectors * kPanelTiles;
    word += vectors;
  }
}

template <typename A>
void run_panel(const Plan &plan, const A &arithmetic, const Finish<A> &finish,
               const void *prepared, void *scratch, const Range &range, int64_t tile) {
  const int64_t tiles = std::min(kPanelTiles, range.tile_end - tile);
  const int64_t tokens = range.token_end - range.token_begin;
  float *totals = static_cast<float *>(scratch);
  __m512i *panel = reinterpret_cast<__m512i *>(totals + tokens * kPanelTiles * kTileRows);
  std::fill(totals, totals + tokens * kPanelTiles * kTileRows, 0.0F);
  int64_t word = 0;
  for (size_t begin = 0; begin < plan.blocks.size();) {
    int64_t vectors = 0;
    size_t end = begin;
    for (; end < plan.blocks.size() && vectors * kPanelTiles * 64 < kPanelBytes; ++end) {
      const Block &block = plan.blocks[end];
      for (int64_t s = block.step_begin; s < block.step_end; ++s, vectors += A::kVectors)
        for (int64_t i = 0; i < kPanelTiles; ++i) {
          __m512i weights[A::kVectors];
          if (i < tiles)
            arithmetic.decode(plan.tile_packed(tile + i) + s * kStepBytes, weights);
          else
            for (auto &w : weights) w = _mm512_setzero_si512();
          for (int v = 0; v < A::kVectors; ++v)
            _mm512_store_si512(panel + (vectors + v) * kPanelTiles + i, weights[v]);
        }
    }
    int64_t t = 0;
    const auto at = [&](int64_t token) { return totals + token * kPanelTiles * kTileRows; };
    for (; t + kPanelTokens <= tokens; t += kPanelTokens)
      panel_tokens<A, kPanelTokens>(plan, finish, prepared, panel, at(t), tile, tiles,
                                    range.token_begin + t, begin, end, word);
    for (; t + 2 <= tokens; t += 2)
      panel_tokens<A, 2>(plan, finish, prepared, panel, at(t), tile, tiles, range.token_begin + t,
                         begin, end, word);
    for (; t < tokens; ++t)
      panel_tokens<A, 1>(plan, finish, prepared, panel, at(t), tile, tiles, range.token_begin + t,
                         begin, end, word);
    word += vectors;
    begin = end;
  }
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t i = 0; i < tiles; ++i)
      store_sums(plan, range.token_begin + t, tile + i, range,
                 _mm512_load_ps(totals + (t * kPanelTiles + i) * kTileRows));
}

template <typename A>
void run(const Plan &plan, const void *prepared, void *scratch, const Range &range) {
  const A arithmetic(plan, range.codebook);
  const Finish<A> finish(plan, range.codebook);
  if (range.token_end - range.token_begin > kDirectTokens) {
    for (int64_t tile = range.tile_begin; tile < range.tile_end; tile += kPanelTiles)
      run_panel(plan, arithmetic, finish, prepared, scratch, range, tile);
    return;
  }
  run_direct(plan, arithmetic, finish, prepared, range);
}

template <typename A>
constexpr Kernel make_kernel(const char *name, bool (*supports)(const Plan &)) {
  return {name, supports, prepared_bytes<A>, prepare<A>, panel_scratch_bytes<A>, run<A>,
          kPanelTiles};
}

}  // namespace
}  // namespace fdk
