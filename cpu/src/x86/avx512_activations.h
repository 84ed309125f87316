// Activations in AVX-512: read in any dtype, quantised, and written in the order of decoded
// weights.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "kernel.h"
#include "numeric.h"
#include "x86/avx512_decode.h"

namespace fdk {
namespace {

// Sixteen elements of any dtype as float32; those without a mask bit are 0 and are not read.
inline __m512 load_floats(const void *data, fdk_dtype dtype, int64_t index, __mmask16 mask) {
  if (dtype == FDK_F32)
    return _mm512_maskz_loadu_ps(mask, static_cast<const float *>(data) + index);
  const __m256i bits = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t *>(data) + index);
  if (dtype == FDK_F16) return _mm512_cvtph_ps(bits);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline __mmask16 first_lanes(int64_t count) {
  return count >= 16 ? __mmask16{0xffff}
                     : static_cast<__mmask16>((1U << std::max<int64_t>(count, 0)) - 1U);
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
    for (const Block &block : plan.blocks)
      words += (block.step_end - block.step_begin) * A::kVectors;
    const int64_t factors =
        A::kInteger ? static_cast<int64_t>(plan.blocks.size() * sizeof(BlockFactor)) : 0;
    factor_bytes = ceil_div(factors, 64) * 64;
    stride = factor_bytes + ceil_div(words * 4, 64) * 64 + 64;
  }
  const BlockFactor *factors(const void *prepared, int64_t token) const {
    return reinterpret_cast<const BlockFactor *>(static_cast<const char *>(prepared) +
                                                 token * stride);
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
      order[static_cast<size_t>(v * A::kColumns + i)] = static_cast<uint8_t>(A::word_column(v, i));
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

// Up to kMaxBlock columns and the steps around them, with space for whole vectors.
inline constexpr size_t kNaturalElements = 192;

template <typename A, typename Element>
inline BlockFactor quantise_block(const __m512 x[4], int32_t limit, Element *natural) {
  const __m512i magnitude_mask = _mm512_set1_epi32(0x7fffffff);
  __m512i magnitude = _mm512_setzero_si512();
  for (int i = 0; i < 4; ++i)
    magnitude =
        _mm512_max_epu32(magnitude, _mm512_and_si512(_mm512_castps_si512(x[i]), magnitude_mask));
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

// The words of a block of a token, and its factor; whole vectors are written, up to 60 bytes too
// many.
template <typename A>
BlockFactor prepare_block(const Plan &plan, int64_t token, const Block &block, int32_t *words) {
  using Element = std::conditional_t<A::kColumns == 4, int8_t,
                                     std::conditional_t<A::kColumns == 2, int16_t, float>>;
  const int64_t lead = block.k0 - block.step_begin * step_k(A::kBits);
  alignas(64) Element natural[kNaturalElements] = {};
  __m512 x[4];
  load_block(plan, token, block, x);
  BlockFactor factor{1.0F, 0.0F};
  if constexpr (A::kInteger)
    factor =
        quantise_block<A>(x, A::kColumns == 4 ? 127 : plan.levels[0].x_limit16, natural + lead);
  else A::store_block(x, natural + lead);
  write_words<A>(natural, block.step_end - block.step_begin, words);
  return factor;
}

template <typename A>
void prepare(const Plan &plan, void *prepared, int64_t token_begin, int64_t token_end) {
  const Prepared<A> layout(plan);
  for (int64_t token = token_begin; token < token_end; ++token) {
    auto *factors = const_cast<BlockFactor *>(layout.factors(prepared, token));
    auto *words = const_cast<int32_t *>(layout.token_words(prepared, token));
    for (size_t b = 0; b < plan.blocks.size(); ++b) {
      const Block &block = plan.blocks[b];
      const BlockFactor factor = prepare_block<A>(plan, token, block, words);
      if constexpr (A::kInteger) factors[b] = factor;
      words += (block.step_end - block.step_begin) * A::kVectors;
    }
  }
}

}  // namespace
}  // namespace fdk
