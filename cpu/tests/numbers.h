// Numbers of the library's dtypes, written independently of src/numeric.h (and without _Float16,
// which not every compiler has).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "fdk.h"

namespace fdk_test {

inline size_t size_of(fdk_dtype dtype) { return dtype == FDK_F32 ? 4 : 2; }

// Rounds to `mantissa` bits after the leading one, ties to even; what is beyond `largest` becomes
// infinite.
inline double round_float(double value, int mantissa, int min_exponent, double largest) {
  if (value == 0.0 || !std::isfinite(value)) return value;
  int exponent = 0;
  std::frexp(value, &exponent);
  const int last = std::max(exponent - 1, min_exponent) - mantissa;
  const double rounded = std::ldexp(std::nearbyint(std::ldexp(value, -last)), last);
  return std::fabs(rounded) > largest ? std::copysign(HUGE_VAL, value) : rounded;
}

inline double round_as(double value, fdk_dtype dtype) {
  if (dtype == FDK_F16) return round_float(value, 10, -14, 65504.0);
  if (dtype == FDK_BF16) return round_float(value, 7, -126, 0x1.fep127);
  return double{static_cast<float>(value)};
}

inline double decode(const void *data, fdk_dtype dtype, size_t i = 0) {
  const char *source = static_cast<const char *>(data) + i * size_of(dtype);
  if (dtype == FDK_F32) {
    float value = 0.0F;
    std::memcpy(&value, source, sizeof value);
    return double{value};
  }
  uint16_t bits = 0;
  std::memcpy(&bits, source, sizeof bits);
  const int exponent_bits = dtype == FDK_F16 ? 5 : 8;
  const int mantissa_bits = 15 - exponent_bits;
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const double sign = (bits >> 15) != 0 ? -1.0 : 1.0;
  const int exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  if (exponent == (1 << exponent_bits) - 1) return mantissa != 0 ? std::nan("") : sign * HUGE_VAL;
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
}

// Rounded as the dtype is.
inline void encode(void *data, fdk_dtype dtype, size_t i, double wanted) {
  char *target = static_cast<char *>(data) + i * size_of(dtype);
  const double value = round_as(wanted, dtype);
  if (dtype == FDK_F32) {
    const auto single = static_cast<float>(value);
    std::memcpy(target, &single, sizeof single);
    return;
  }
  const int exponent_bits = dtype == FDK_F16 ? 5 : 8;
  const int mantissa_bits = 15 - exponent_bits;
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int sign = std::signbit(value) ? 1 << 15 : 0;
  int magnitude = 0;
  if (std::isnan(value)) {
    magnitude = 0x7fff;
  } else if (std::isinf(value)) {
    magnitude = ((1 << exponent_bits) - 1) << mantissa_bits;
  } else if (value != 0.0) {
    int exponent = 0;
    std::frexp(value, &exponent);
    const int e = std::max(exponent - 1 + bias, 0);
    const int unit = std::max(e, 1) - bias - mantissa_bits;
    const int mantissa = static_cast<int>(std::ldexp(std::fabs(value), -unit));
    magnitude = e == 0 ? mantissa : (e << mantissa_bits) | (mantissa & ((1 << mantissa_bits) - 1));
  }
  const auto bits = static_cast<uint16_t>(sign | magnitude);
  std::memcpy(target, &bits, sizeof bits);
}

}  // namespace fdk_test
