// Every level that a translation unit of this build may define.
#pragma once

#include "kernel.h"

namespace fdk {

extern const Level kScalarLevel;

#if defined(__x86_64__)
extern const Level kAvx2Level;        // AVX2, FMA, F16C
extern const Level kAvx512VnniLevel;  // AVX-512 F, BW, VL, DQ, VBMI, VNNI
extern const Level kAvx512Bf16Level;  // and AVX-512 BF16
extern const Level kAmxLevel;         // and AMX with int8 and bfloat16
#endif

#if defined(__aarch64__)
extern const Level kNeonLevel;     // armv8-a
extern const Level kDotprodLevel;  // + dotprod
extern const Level kI8mmLevel;     // + i8mm
extern const Level kBf16Level;     // + bf16
extern const Level kSve2Level;     // + sve2 (Linux)
#endif

}  // namespace fdk
