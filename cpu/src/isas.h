// Every ISA that a translation unit of this build may define.
#pragma once

#include "kernel.h"

namespace fdk {

extern const Isa kScalarIsa;

#if defined(__x86_64__)
extern const Isa kAvx2Isa;        // AVX2, FMA, F16C
extern const Isa kAvx512VnniIsa;  // AVX-512 F, BW, VL, DQ, VBMI, VNNI
extern const Isa kAvx512Bf16Isa;  // and AVX-512 BF16
extern const Isa kAmxIsa;         // and AMX with int8 and bfloat16
#endif

#if defined(__aarch64__)
extern const Isa kNeonIsa;     // armv8-a
extern const Isa kDotprodIsa;  // + dotprod
extern const Isa kI8mmIsa;     // + i8mm
extern const Isa kBf16Isa;     // + bf16
extern const Isa kSve2Isa;     // + sve2 (Linux)
#endif

}  // namespace fdk
