// What a decoding step needs beside products with quantised weights: attention over the cache, and
// unquantised matrices times a few tokens. Plain loops: the translation unit of each ISA includes
// this file and has them vectorised for its instruction set.
#pragma once

#include <cmath>

#include "kernel.h"
#include "numeric.h"

namespace fdk {
namespace {

template <fdk_dtype dtype>
inline float element(const void *data, int64_t index) {
  if constexpr (dtype == FDK_F32) return static_cast<const float *>(data)[index];
  const uint16_t bits = static_cast<const uint16_t *>(data)[index];
  return dtype == FDK_BF16 ? bf16_to_f32(bits) : f16_to_f32(bits);
}

template <fdk_dtype dtype>
void widen(const void *source, int64_t first, int64_t count, float *target) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) target[i] = element<dtype>(source, first + i);
}

inline float dot(const float *a, const float *b, int64_t count) {
  float sum = 0.0F;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += a[i] * b[i];
  return sum;
}

// e**x for x <= 0 to 2e-7, e**-87 for anything less; NaN stays NaN. Range reduction and polynomial
// are those of Cephes' expf; adding 1.5 * 2**23 rounds to an integer that lies in the low bits.
inline float exp_of(float x) {
  x = x < -87.0F ? -87.0F : x;
  constexpr float magic = 12582912.0F;
  const float shifted = x * 1.44269504F + magic;
  const float n = shifted - magic;
  const float r = (x - n * 0.693359375F) + n * 2.12194440e-4F;
  float p = 1.9875691500e-4F;
  p = p * r + 1.3981999507e-3F;
  p = p * r + 8.3334519073e-3F;
  p = p * r + 4.1665795894e-2F;
  p = p * r + 1.6666665459e-1F;
  p = p * r + 5.0000001201e-1F;
  const uint32_t exponent =
      std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(magic) + 127U;
  return (p * r * r + r + 1.0F) * std::bit_cast<float>(exponent << 23);
}

// A head of the newest token in float32: widened, normalised if `norm` is not null, turned by RoPE.
template <fdk_dtype dtype>
void turned_head(const Attention &a, int64_t first, int64_t sequence, const void *norm,
                 float *head) {
  const int64_t d = a.head_dim;
  const int64_t half = d / 2;
  widen<dtype>(a.qkv, first, d, head);
  if (norm != nullptr) {
    const float factor = 1.0F / std::sqrt(dot(head, head, d) / static_cast<float>(d) + a.norm_eps);
    for (int64_t i = 0; i < d; ++i) head[i] *= factor * element<dtype>(norm, i);
  }
  const float *cos = a.cos + sequence * half;
  const float *sin = a.sin + sequence * half;
  for (int64_t i = 0; i < half; ++i) {
    const float low = head[i];
    const float high = head[i + half];
    head[i] = low * cos[i] - high * sin[i];
    head[i + half] = high * cos[i] + low * sin[i];
  }
}

// One key-value head of one sequence: its new key and value go into the cache, and the query heads
// that share it attend to all that is there.
template <fdk_dtype dtype>
void attend_one(const Attention &a, int64_t sequence, int64_t kv_head, float *scratch) {
  const int64_t d = a.head_dim;
  const int64_t group = a.heads / a.kv_heads;
  const int64_t slot = a.slot(sequence);
  const int64_t token = sequence * (a.heads + 2 * a.kv_heads) * d;
  const int64_t cache = (sequence * a.kv_heads + kv_head) * a.capacity * d;
  float *queries = scratch;           // [group][d]
  float *sums = queries + group * d;  // [group][d]
  float *row = sums + group * d;      // [d]
  float *scores = row + d;            // [group][slot + 1]

  turned_head<dtype>(a, token + (a.heads + kv_head) * d, sequence, a.k_norm, row);
  for (int64_t i = 0; i < d; ++i) store_from_f32(a.keys, dtype, cache + slot * d + i, row[i]);
  const int64_t value = token + (a.heads + a.kv_heads + kv_head) * d;
  for (int64_t i = 0; i < d; ++i)
    store_from_f32(a.values, dtype, cache + slot * d + i, element<dtype>(a.qkv, value + i));

  const float scale = 1.0F / std::sqrt(static_cast<float>(d));
  for (int64_t g = 0; g < group; ++g) {
    float *query = queries + g * d;
    turned_head<dtype>(a, token + (kv_head * group + g) * d, sequence, a.q_norm, query);
    for (int64_t i = 0; i < d; ++i) query[i] *= scale;
  }
  for (int64_t s = 0; s <= slot; ++s) {
    widen<dtype>(a.keys, cache + s * d, d, row);
    for (int64_t g = 0; g < group; ++g) scores[g * (slot + 1) + s] = dot(queries + g * d, row, d);
  }
  for (int64_t g = 0; g < group; ++g) {
    float *of_query = scores + g * (slot + 1);
    float largest = of_query[0];
    for (int64_t s = 1; s <= slot; ++s) largest = of_query[s] > largest ? of_query[s] : largest;
    float total = 0.0F;
#pragma omp simd reduction(+ : total)
    for (int64_t s = 0; s <= slot; ++s) {
      of_query[s] = exp_of(of_query[s] - largest);
      total += of_query[s];
    }
    const float factor = 1.0F / total;
    for (int64_t s = 0; s <= slot; ++s) of_query[s] *= factor;
  }
  for (int64_t i = 0; i < group * d; ++i) sums[i] = 0.0F;
  for (int64_t s = 0; s <= slot; ++s) {
    widen<dtype>(a.values, cache + s * d, d, row);
    for (int64_t g = 0; g < group; ++g) {
      const float weight = scores[g * (slot + 1) + s];
      float *sum = sums + g * d;
#pragma omp simd
      for (int64_t i = 0; i < d; ++i) sum[i] += weight * row[i];
    }
  }
  const int64_t out = (sequence * a.heads + kv_head * group) * d;
  for (int64_t i = 0; i < group * d; ++i) store_from_f32(a.out, dtype, out + i, sums[i]);
}

// Rows [begin, end) of W [n, k]: each is a dot product, and stays in the cache for all tokens.
template <fdk_dtype dtype>
void dense_rows_of(const FewTokens &args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t first = row * args.k;
    for (int64_t t = 0; t < args.m; ++t) {
      const float *x = args.x + t * args.k;
      float sum = 0.0F;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < args.k; ++i) sum += x[i] * element<dtype>(args.weight, first + i);
      store_from_f32(args.y, args.y_dtype, t * args.n + row, sum);
    }
  }
}

// Columns [begin, end) of W [k, n], at most kDenseColumns: four rows at a time are added to sums.
template <fdk_dtype dtype>
void dense_columns_of(const FewTokens &args, int64_t begin, int64_t end) {
  constexpr int64_t kRows = 4;
  constexpr int64_t kAhead = 8;  // rows that are fetched before their turn: each is another page
  const int64_t width = end - begin;
  float sums[kFewTokens][kDenseColumns] = {};
  float rows[kRows][kDenseColumns];
  for (int64_t k0 = 0; k0 < args.k; k0 += kRows) {
    const int64_t count = args.k - k0 < kRows ? args.k - k0 : kRows;
    for (int64_t r = 0; r < count; ++r) {
      const int64_t first = (k0 + r) * args.n + begin;
      if (k0 + r + kAhead < args.k) {
        const char *next = static_cast<const char *>(args.weight) +
                           (first + kAhead * args.n) * static_cast<int64_t>(dtype_size(dtype));
        for (int64_t i = 0; i < width * static_cast<int64_t>(dtype_size(dtype)); i += 64)
          __builtin_prefetch(next + i);
      }
      widen<dtype>(args.weight, first, width, rows[r]);
    }
    for (int64_t t = 0; t < args.m; ++t) {
      const float *x = args.x + t * args.k + k0;
      if (count == kRows) {
#pragma omp simd
        for (int64_t i = 0; i < width; ++i)
          sums[t][i] +=
              x[0] * rows[0][i] + x[1] * rows[1][i] + x[2] * rows[2][i] + x[3] * rows[3][i];
        continue;
      }
      for (int64_t r = 0; r < count; ++r)
        for (int64_t i = 0; i < width; ++i) sums[t][i] += x[r] * rows[r][i];
    }
  }
  for (int64_t t = 0; t < args.m; ++t)
    for (int64_t i = 0; i < width; ++i)
      store_from_f32(args.y, args.y_dtype, t * args.n + begin + i, sums[t][i]);
}

void attend(const Attention &a, int64_t sequence, int64_t kv_head, float *scratch) {
  if (a.dtype == FDK_F32) return attend_one<FDK_F32>(a, sequence, kv_head, scratch);
  if (a.dtype == FDK_F16) return attend_one<FDK_F16>(a, sequence, kv_head, scratch);
  attend_one<FDK_BF16>(a, sequence, kv_head, scratch);
}

void dense(const FewTokens &args, int64_t begin, int64_t end) {
  if (args.rows) {
    if (args.dtype == FDK_F32) return dense_rows_of<FDK_F32>(args, begin, end);
    if (args.dtype == FDK_F16) return dense_rows_of<FDK_F16>(args, begin, end);
    return dense_rows_of<FDK_BF16>(args, begin, end);
  }
  if (args.dtype == FDK_F32) return dense_columns_of<FDK_F32>(args, begin, end);
  if (args.dtype == FDK_F16) return dense_columns_of<FDK_F16>(args, begin, end);
  dense_columns_of<FDK_BF16>(args, begin, end);
}

}  // namespace
}  // namespace fdk
