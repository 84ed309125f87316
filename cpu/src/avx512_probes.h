// Bandwidth probes in AVX-512.
#pragma once

#include <immintrin.h>

#include "avx512.h"

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
    _mm_prefetch(from + i + kPrefetchBytes, _MM_HINT_T0);
    _mm512_stream_si512(reinterpret_cast<__m512i *>(to + i), _mm512_loadu_si512(from + i));
  }
  _mm_sfence();
  std::memcpy(to + i, from + i, bytes - i);
}

// Sums of int32 that do not wrap: low and high halves of 64-bit lanes apart.
int64_t probe_sum(const int32_t *source, size_t count) {
  __m512i even = _mm512_setzero_si512();
  __m512i odd = _mm512_setzero_si512();
  size_t i = 0;
  for (; i + 16 <= count; i += 16) {
    _mm_prefetch(reinterpret_cast<const char *>(source + i) + kPrefetchBytes, _MM_HINT_T0);
    const __m512i v = _mm512_loadu_si512(source + i);
    odd = _mm512_add_epi64(odd, _mm512_srai_epi64(v, 32));
    even = _mm512_add_epi64(even, _mm512_srai_epi64(_mm512_slli_epi64(v, 32), 32));
  }
  int64_t sum = _mm512_reduce_add_epi64(_mm512_add_epi64(even, odd));
  for (; i < count; ++i) sum += source[i];
  return sum;
}

}  // namespace
}  // namespace fdk
