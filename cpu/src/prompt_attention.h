// Causal attention of many tokens over the keys of these and of earlier ones, in float32. A piece
// of work is one key-value head and as many tokens as fill the registers' columns; keys come in
// blocks, whose scores stay in the L2 cache between the two products. Columns of scores are
// queries: softmax is element by element along them.
#pragma once

#include <algorithm>
#include <cmath>

#include "decoding.h"

namespace fdk {
namespace {

// Vectors as wide as the instruction set's, and as many as leave it registers for the operands.
#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
inline constexpr int kVectors = 4;
#elif defined(__AVX__)
inline constexpr int kLanes = 8;
inline constexpr int kVectors = 2;
#else
inline constexpr int kLanes = 4;
inline constexpr int kVectors = 4;
#endif
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));
inline constexpr int64_t kStrip = int64_t{kLanes} * kVectors;
inline constexpr int64_t kProductRows = 4;
inline constexpr float kHidden =
    -1e30F;  // finite: a row that has seen nothing yet shrinks by 1, not by NaN

inline int64_t to_strips(int64_t columns) { return (columns + kStrip - 1) / kStrip * kStrip; }

// c [rows, columns] (+)= a b: element (row, k) of a lies at row * row_step + k * k_step, b is
// [depth, b_step] and c [.., c_step]. Rows are a multiple of kProductRows, columns of kStrip.
template <bool add>
void product(const float *a, int64_t row_step, int64_t k_step, const float *b, int64_t b_step,
             float *c, int64_t c_step, int64_t rows, int64_t depth, int64_t columns) {
  for (int64_t column = 0; column < columns; column += kStrip)
    for (int64_t row = 0; row < rows; row += kProductRows) {
      Lanes sums[kProductRows][kVectors] = {};
      float *const target = c + row * c_step + column;
      if constexpr (add)
        for (int r = 0; r < kProductRows; ++r)
          for (int v = 0; v < kVectors; ++v)
            sums[r][v] = *reinterpret_cast<const Lanes *>(target + r * c_step + v * kLanes);
      const float *left = a + row * row_step;
      const float *right = b + column;
      for (int64_t k = 0; k < depth; ++k, left += k_step, right += b_step)
        for (int v = 0; v < kVectors; ++v) {
          const Lanes some = *reinterpret_cast<const Lanes *>(right + v * kLanes);
          for (int r = 0; r < kProductRows; ++r) sums[r][v] += left[r * row_step] * some;
        }
      for (int r = 0; r < kProductRows; ++r)
        for (int v = 0; v < kVectors; ++v)
          *reinterpret_cast<Lanes *>(target + r * c_step + v * kLanes) = sums[r][v];
    }
}

// The memory of one piece of work; see PromptAttention::scratch.
struct PromptScratch {
  PromptScratch(const PromptAttention &a, float *memory)
      : queries_a_block(to_strips(a.block_tokens() * a.heads / a.kv_heads)),
        width(to_strips(a.head_dim)),
        queries(memory),
        scores(queries + a.head_dim * queries_a_block),
        mixed(scores + kPromptKeys * queries_a_block),
        keys(mixed + queries_a_block * width),
        values(keys + kPromptKeys * a.head_dim),
        peaks(values + kPromptKeys * width),
        higher(peaks + queries_a_block),
        totals(higher + queries_a_block),
        positions(totals + queries_a_block) {}
  int64_t queries_a_block, width;
  float *queries;                              // [head_dim][queries], scaled
  float *scores;                               // [keys][queries]
  float *mixed;                                // [queries][width]
  float *keys;                                 // [keys][head_dim]
  float *values;                               // [keys][width]
  float *peaks, *higher, *totals, *positions;  // [queries]; positions as floats, exact below 2**24
};

// Scores become weights e**(score - highest), and what was summed before shrinks to the new highest
// score.
inline void soften(const PromptScratch &w, int64_t count) {
  const int64_t n = w.queries_a_block;
  std::copy(w.peaks, w.peaks + n, w.higher);
  for (int64_t s = 0; s < count; ++s) {
    const float *row = w.scores + s * n;
#pragma omp simd
    for (int64_t r = 0; r < n; ++r) w.higher[r] = row[r] > w.higher[r] ? row[r] : w.higher[r];
  }
#pragma omp simd
  for (int64_t r = 0; r < n; ++r) {
    const float shrink = exp_of(w.peaks[r] - w.higher[r]);
    w.totals[r] *= shrink;
    w.peaks[r] = shrink;
  }
  for (int64_t r = 0; r < n; ++r) {
    float *row = w.mixed + r * w.width;
    const float shrink = w.peaks[r];
    if (shrink == 1.0F) continue;
#pragma omp simd
    for (int64_t i = 0; i < w.width; ++i) row[i] *= shrink;
  }
  for (int64_t s = 0; s < count; ++s) {
    float *row = w.scores + s * n;
#pragma omp simd
    for (int64_t r = 0; r < n; ++r) {
      row[r] = exp_of(row[r] - w.higher[r]);
      w.totals[r] += row[r];
    }
  }
  std::copy(w.higher, w.higher + n, w.peaks);
}

// Hides from each query the keys after it and those before its window.
inline void hide(const PromptScratch &w, int64_t first_key, int64_t count, float window) {
  const int64_t n = w.queries_a_block;
  for (int64_t s = 0; s < count; ++s) {
    float *row = w.scores + s * n;
    const auto key = static_cast<float>(first_key + s);
#pragma omp simd
    for (int64_t r = 0; r < n; ++r) {
      const float before = w.positions[r] - key;
      row[r] = before >= 0.0F && before < window ? row[r] : kHidden;
    }
  }
}

template <fdk_dtype dtype>
void attend_block_of(const PromptAttention &a, int64_t sequence, int64_t kv_head, int64_t token,
                     float *memory) {
  const PromptScratch w(a, memory);
  const int64_t d = a.head_dim;
  const int64_t group = a.heads / a.kv_heads;
  const int64_t tokens = std::min(a.block_tokens(), a.tokens - token);
  const int64_t n = w.queries_a_block;
  const int64_t first = a.start(sequence) + token;
  const int64_t last = first + tokens - 1;
  const int64_t from = a.window == 0 ? 0 : std::max(first - a.window + 1, int64_t{0});
  const int64_t to = std::min(last + 1, a.slots);
  const auto window = static_cast<float>(a.window == 0 ? to + 1 : a.window);
  const auto query = [&](int64_t r) {  // where a column's query and result lie
    return (((sequence * a.tokens + token + r / group) * a.heads) + kv_head * group + r % group) *
           d;
  };

  std::fill(w.queries, w.queries + d * n, 0.0F);
  std::fill(w.mixed, w.mixed + n * w.width, 0.0F);
  std::fill(w.values, w.values + kPromptKeys * w.width, 0.0F);
  std::fill(w.totals, w.totals + n, 0.0F);
  std::fill(w.peaks, w.peaks + n, kHidden);
  std::fill(w.positions, w.positions + n, static_cast<float>(last));
  const float scale = 1.0F / std::sqrt(static_cast<float>(d));
  for (int64_t r = 0; r < tokens * group; ++r) {
    w.positions[r] = static_cast<float>(first + r / group);
    for (int64_t i = 0; i < d; ++i)
      w.queries[i * n + r] = scale * element<dtype>(a.q, query(r) + i);
  }
  const int64_t head = sequence * a.key_sequence + kv_head * a.key_head;
  for (int64_t key = from; key < to; key += kPromptKeys) {
    const int64_t count = std::min(kPromptKeys, to - key);
    for (int64_t s = 0; s < count; ++s) {
      widen<dtype>(a.keys, head + (key + s) * a.key_token, d, w.keys + s * d);
      widen<dtype>(a.values, head + (key + s) * a.key_token, d, w.values + s * w.width);
    }
    const int64_t rows = (count + kProductRows - 1) / kProductRows * kProductRows;
    std::fill(w.keys + count * d, w.keys + rows * d, 0.0F);
    product<false>(w.keys, d, 1, w.queries, n, w.scores, n, rows, d, n);
    if (key + count - 1 > first || (a.window != 0 && key <= last - a.window))
      hide(w, key, count, window);
    soften(w, count);
    product<true>(w.scores, 1, n, w.values, w.width, w.mixed, w.width, n, count, w.width);
  }
  for (int64_t r = 0; r < tokens * group; ++r) {
    const float factor = 1.0F / w.totals[r];
    for (int64_t i = 0; i < d; ++i)
      store_from_f32(a.out, dtype, query(r) + i, w.mixed[r * w.width + i] * factor);
  }
}

void attend_block(const PromptAttention &a, int64_t sequence, int64_t kv_head, int64_t token,
                  float *scratch) {
  if (a.dtype == FDK_F32) return attend_block_of<FDK_F32>(a, sequence, kv_head, token, scratch);
  if (a.dtype == FDK_F16) return attend_block_of<FDK_F16>(a, sequence, kv_head, token, scratch);
  attend_block_of<FDK_BF16>(a, sequence, kv_head, token, scratch);
}

constexpr Decoding kDecoding = {attend, dense, attend_block};

}  // namespace
}  // namespace fdk
