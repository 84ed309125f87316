// Bandwidth probes in AVX-512.
#pragma once

#include <immintrin.h>

#include "x86/avx512_streams.h"

namespace fdk {
namespace {

// Non-temporal stores past the caches, as a copy of more than a cache wants them.
void probe_copy(const void *source, void *target, size_t bytes) {
  const char *from = static_cast<const char *>(source);
  char *to = static_cast<char *>(target);
  const size_t head = std::min(bytes, (64 - reinterpret_cast<uintptr_t>(to) % 64) % 64);
  std::memcpy(to, from, head);
  size_t i = head;
  for (; i + 64 <= bytes; i += 64) {
    prefetch(from + i + kPrefetchBytes);
    _mm512_stream_si512(reinterpret_cast<__m512i *>(to + i), _mm512_loadu_si512(from + i));
  }
  _mm_sfence();
  std::memcpy(to + i, from + i, bytes - i);
}

// Sixteen int32 as eight int64 sums.
__m512i widened_sum(__m512i v) {
  return _mm512_add_epi64(_mm512_cvtepi32_epi64(_mm512_castsi512_si256(v)),
                          _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(v, 1)));
}

// Sums of int32 that do not wrap: each lane keeps its sum modulo 2**32 and the sum of its upper
// halves, which together give the sum of a range. Few instructions a cache line and four streams
// at once keep as many reads in flight as the machine takes: the probe is to be what bounds every
// kernel (Emerald Rapids, one thread, 2026-11: 15.0 GB/s with one stream, 16.9 with four, 17.2 with
// four in pages of 2 MiB; five instructions a line instead of three: 15.6).
int64_t probe_sum(const int32_t *source, size_t count) {
  constexpr size_t kStreams = 4;
  constexpr size_t kLines = 64;  // elements of a stream that are read before the next one's turn
  constexpr size_t kStretch = size_t{16} << 15;  // 2**15 vectors: upper halves stay below 2**31
  const size_t length = count / (kStreams * kLines) * kLines;
  const __m512i upper = _mm512_set1_epi32(1 << 16);
  int64_t sum = 0;
  for (size_t begin = 0; begin < length; begin += kStretch) {
    const size_t end = std::min(length, begin + kStretch);
    __m512i wrapped[kStreams] = {};
    __m512i halves[kStreams] = {};
    for (size_t i = begin; i < end; i += kLines)
      for (size_t t = 0; t < kStreams; ++t)
        for (size_t u = 0; u < kLines; u += 16) {
          const int32_t *at = source + t * length + i + u;
          prefetch(reinterpret_cast<const char *>(at) + kPrefetchBytes);
          const __m512i v = _mm512_loadu_si512(at);
          wrapped[t] = _mm512_add_epi32(wrapped[t], v);
          halves[t] = _mm512_dpwssd_epi32(halves[t], v, upper);
        }
    for (size_t t = 0; t < kStreams; ++t) {
      // sum = halves * 2**16 + what the lower halves add, which is below 2**31.
      const __m512i lower = _mm512_sub_epi32(wrapped[t], _mm512_slli_epi32(halves[t], 16));
      sum += _mm512_reduce_add_epi64(widened_sum(halves[t])) * 65536 +
             _mm512_reduce_add_epi64(widened_sum(lower));
    }
  }
  for (size_t i = kStreams * length; i < count; ++i) sum += source[i];
  return sum;
}

}  // namespace
}  // namespace fdk
