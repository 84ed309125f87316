// <immintrin.h> for a build that runs the AVX-512 and AMX kernels on any processor: SIMDe's plain
// loops in place of the instructions, and here what it lacks. Found before the compiler's own
// header by the build `emulated` of build.ninja. Slow: for tests only.
#pragma once

#if !__has_include("simde/x86/avx512.h")
#error "the emulated build needs SIMDe's headers: pip install simde-py, then configure again"
#endif

#define SIMDE_NO_NATIVE
#define SIMDE_NO_CHECK_IMMEDIATE_CONSTANT  // clang does not see that a loop's shifts are constants
#define SIMDE_ENABLE_NATIVE_ALIASES
#if defined(__clang__)
#pragma clang diagnostic ignored "-Wpass-failed"  // these loops need not be fast
#endif
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wconversion"
#include "simde/x86/avx2.h"
#include "simde/x86/avx512.h"
#include "simde/x86/f16c.h"
#include "simde/x86/fma.h"
#pragma GCC diagnostic pop

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../numbers.h"

namespace fdk_emulated {

template <typename To, typename From>
To as(const From &from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <typename T, int kCount>
struct Lanes {
  T at[kCount];
};

inline float widened(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

}  // namespace fdk_emulated

// --- AVX-512 that SIMDe lacks ------------------------------------------------------------------

inline __m256i fdk_cvtepi32_epi16(__m512i v) {
  const auto from = fdk_emulated::as<fdk_emulated::Lanes<int32_t, 16>>(v);
  fdk_emulated::Lanes<int16_t, 16> to;
  for (int i = 0; i < 16; ++i) to.at[i] = static_cast<int16_t>(from.at[i]);
  return fdk_emulated::as<__m256i>(to);
}
inline __m128i fdk_cvtepi32_epi8(__m512i v) {
  const auto from = fdk_emulated::as<fdk_emulated::Lanes<int32_t, 16>>(v);
  fdk_emulated::Lanes<int8_t, 16> to;
  for (int i = 0; i < 16; ++i) to.at[i] = static_cast<int8_t>(from.at[i]);
  return fdk_emulated::as<__m128i>(to);
}
inline __m512i fdk_cvtepi32_epi64(__m256i v) {
  const auto from = fdk_emulated::as<fdk_emulated::Lanes<int32_t, 8>>(v);
  fdk_emulated::Lanes<int64_t, 8> to;
  for (int i = 0; i < 8; ++i) to.at[i] = from.at[i];
  return fdk_emulated::as<__m512i>(to);
}
inline __m512i fdk_maskz_cvtps_epi32(__mmask16 mask, __m512 v) {
  const auto from = fdk_emulated::as<fdk_emulated::Lanes<float, 16>>(v);
  fdk_emulated::Lanes<int32_t, 16> to;
  for (int i = 0; i < 16; ++i)
    to.at[i] = (mask >> i & 1) != 0 ? static_cast<int32_t>(std::nearbyintf(from.at[i])) : 0;
  return fdk_emulated::as<__m512i>(to);
}
inline __m256i fdk_cvtps_ph(__m512 v, int) {
  const auto from = fdk_emulated::as<fdk_emulated::Lanes<float, 16>>(v);
  fdk_emulated::Lanes<uint16_t, 16> to;
  for (int i = 0; i < 16; ++i) {
    fdk_test::encode(&to.at[i], FDK_F16, 0, double{from.at[i]});
  }
  return fdk_emulated::as<__m256i>(to);
}
// SIMDe's masked loads read what the mask leaves out.
template <typename V, typename T>
V fdk_maskz_load(uint64_t mask, const void *from) {
  fdk_emulated::Lanes<T, sizeof(V) / sizeof(T)> to{};
  for (size_t i = 0; i < sizeof(V) / sizeof(T); ++i)
    if ((mask >> i & 1) != 0)
      std::memcpy(&to.at[i], static_cast<const char *>(from) + i * sizeof(T), sizeof(T));
  return fdk_emulated::as<V>(to);
}
template <typename T, typename V>
T fdk_reduce_add(const V &v) {
  const auto from = fdk_emulated::as<fdk_emulated::Lanes<T, 64 / sizeof(T)>>(v);
  T sum = from.at[0];
  for (size_t i = 1; i < 64 / sizeof(T); ++i) sum = static_cast<T>(sum + from.at[i]);
  return sum;
}
#undef _mm512_load_si512  // an argument may hold a comma
#define _mm512_load_si512(...) simde_mm512_load_si512(__VA_ARGS__)
#undef _mm512_cvtepi32_epi16
#undef _mm512_cvtepi32_epi8
#undef _mm512_cvtepi32_epi64
#undef _mm512_maskz_cvtps_epi32
#undef _mm512_cvtps_ph
#undef _mm512_maskz_loadu_ps
#undef _mm256_maskz_loadu_epi16
#undef _mm512_maskz_loadu_epi16
#define _mm512_maskz_loadu_ps(mask, from) fdk_maskz_load<__m512, float>(mask, from)
#define _mm256_maskz_loadu_epi16(mask, from) fdk_maskz_load<__m256i, uint16_t>(mask, from)
#define _mm512_maskz_loadu_epi16(mask, from) fdk_maskz_load<__m512i, uint16_t>(mask, from)
#define _mm512_cvtepi32_epi16(v) fdk_cvtepi32_epi16(v)
#define _mm512_cvtepi32_epi8(v) fdk_cvtepi32_epi8(v)
#define _mm512_cvtepi32_epi64(v) fdk_cvtepi32_epi64(v)
#define _mm512_maskz_cvtps_epi32(mask, v) fdk_maskz_cvtps_epi32(mask, v)
#define _mm512_cvtps_ph(v, rounding) fdk_cvtps_ph(v, rounding)
#define _mm512_reduce_add_ps(v) fdk_reduce_add<float>(v)
#define _mm512_reduce_add_epi32(v) fdk_reduce_add<int32_t>(v)
#define _mm512_reduce_add_epi64(v) fdk_reduce_add<int64_t>(v)
#define _mm512_stream_si512(to, v) _mm512_storeu_si512(to, v)
#ifndef _MM_FROUND_TO_NEAREST_INT
#define _MM_FROUND_TO_NEAREST_INT 0
#endif
#ifndef _MM_FROUND_NO_EXC
#define _MM_FROUND_NO_EXC 8
#endif

// --- AMX ---------------------------------------------------------------------------------------

// The registers of a thread. Whatever the processor would refuse ends the program.
struct FdkMatrixRegisters {
  uint16_t row_bytes[8] = {};
  uint8_t rows[8] = {};
  uint8_t data[8][16][64] = {};
  bool configured = false;

  void check(int i) const {
    if (!configured || rows[i] == 0 || row_bytes[i] == 0) __builtin_trap();
  }
  void configure(const void *shapes) {
    uint8_t bytes[64];
    std::memcpy(bytes, shapes, sizeof bytes);
    if (bytes[0] != 1 || bytes[1] != 0) __builtin_trap();
    *this = FdkMatrixRegisters();
    configured = true;
    for (int i = 0; i < 8; ++i) {
      std::memcpy(&row_bytes[i], bytes + 16 + 2 * i, 2);
      rows[i] = bytes[48 + i];
      if (row_bytes[i] > 64 || rows[i] > 16) __builtin_trap();
    }
  }
  void load(int i, const void *from, size_t stride) {
    check(i);
    std::memset(data[i], 0, sizeof data[i]);
    for (size_t r = 0; r < rows[i]; ++r)
      std::memcpy(data[i][r], static_cast<const char *>(from) + r * stride, row_bytes[i]);
  }
  void store(int i, void *to, size_t stride) const {
    check(i);
    for (size_t r = 0; r < rows[i]; ++r)
      std::memcpy(static_cast<char *>(to) + r * stride, data[i][r], row_bytes[i]);
  }
  void zero(int i) {
    check(i);
    std::memset(data[i], 0, sizeof data[i]);
  }
  // sums[m][n] += what `add` makes of word k of row m of a and word n of row k of b.
  template <typename Sum, typename Add>
  void multiply(int sums, int a, int b, Add add) {
    check(sums), check(a), check(b);
    if (rows[sums] != rows[a] || row_bytes[sums] != row_bytes[b] || row_bytes[a] != 4 * rows[b])
      __builtin_trap();
    for (int m = 0; m < rows[sums]; ++m)
      for (int n = 0; n < row_bytes[b] / 4; ++n) {
        Sum sum;
        std::memcpy(&sum, data[sums][m] + 4 * n, 4);
        for (int k = 0; k < rows[b]; ++k) sum = add(sum, data[a][m] + 4 * k, data[b][k] + 4 * n);
        std::memcpy(data[sums][m] + 4 * n, &sum, 4);
      }
  }
};

inline thread_local FdkMatrixRegisters fdk_matrix_registers;

inline void fdk_dpbsud(int sums, int a, int b) {
  fdk_matrix_registers.multiply<int32_t>(sums, a, b,
                                         [](int32_t sum, const uint8_t *x, const uint8_t *w) {
                                           for (int i = 0; i < 4; ++i)
                                             sum += static_cast<int8_t>(x[i]) * int32_t{w[i]};
                                           return sum;
                                         });
}
inline void fdk_dpbf16ps(int sums, int a, int b) {
  fdk_matrix_registers.multiply<float>(
      sums, a, b, [](float sum, const uint8_t *x, const uint8_t *w) {
        uint16_t pairs[4];
        std::memcpy(pairs, x, 4);
        std::memcpy(pairs + 2, w, 4);
        sum = std::fma(fdk_emulated::widened(pairs[0]), fdk_emulated::widened(pairs[2]), sum);
        return std::fma(fdk_emulated::widened(pairs[1]), fdk_emulated::widened(pairs[3]), sum);
      });
}
#define _tile_loadconfig(shapes) fdk_matrix_registers.configure(shapes)
#define _tile_release() (fdk_matrix_registers.configured = false)
#define _tile_loadd(i, from, stride) fdk_matrix_registers.load(i, from, static_cast<size_t>(stride))
#define _tile_stored(i, to, stride) fdk_matrix_registers.store(i, to, static_cast<size_t>(stride))
#define _tile_zero(i) fdk_matrix_registers.zero(i)
#define _tile_dpbsud(sums, a, b) fdk_dpbsud(sums, a, b)
#define _tile_dpbf16ps(sums, a, b) fdk_dpbf16ps(sums, a, b)
