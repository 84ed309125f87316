// AVX2, FMA and F16C (Intel from Haswell, AMD from Zen 1).
#if defined(__x86_64__)

#include <cpuid.h>

#include "isas.h"
#include "prompt_attention.h"
#include "x86/avx2_products.h"
#include "x86/avx2_sums.h"

namespace fdk {
namespace {

template <int kBits>
bool supports_integer(const Plan &plan) {
  return plan.arithmetic != FDK_EXACT && plan.bits == kBits;
}
bool supports_codes(const Plan &plan) { return supports_integer<8>(plan) && plan.uniform; }
bool supports_bytes(const Plan &plan) {
  return supports_integer<8>(plan) && plan.arithmetic == FDK_INT8;
}
template <int kBits>
bool supports_exact(const Plan &plan) {
  return plan.arithmetic == FDK_EXACT && plan.bits == kBits;
}

// The values are read as bfloat16.
template <int kBits>
bool supports_short(const Plan &plan) {
  return supports_exact<kBits>(plan) && plan.codebook_is_bfloat16;
}

bool supports_even(const Plan &plan) {
  return supports_exact<8>(plan) && plan.uniform && Float32Even::holds(plan);
}

constexpr Kernel kKernels[] = {
    Sums<FDK_EXACT>::kernel("avx2.sums_1bit"),
    Sums<FDK_INT16>::kernel("avx2.integer_sums_1bit"),
    make_kernel<Integer<8, 0>>("avx2.integer_8bit_uniform", supports_codes),
    make_kernel<Integer<8, 1>>("avx2.integer_8bit_bytes", supports_bytes),
    make_kernel<Integer<8, 2>>("avx2.integer_8bit", supports_integer<8>),
    make_kernel<Integer<4, 2>>("avx2.integer_4bit", supports_integer<4>),
    make_kernel<Integer<2, 2>>("avx2.integer_2bit", supports_integer<2>),
    make_kernel<Integer<1, 2>>("avx2.integer_1bit", supports_integer<1>),
    make_kernel<Float32Even>("avx2.float32_8bit_even", supports_even),
    make_kernel<Float32<8>>("avx2.float32_8bit", supports_exact<8>),
    make_kernel<Float32Short<4>>("avx2.float32_4bit_bfloat16", supports_short<4>),
    make_kernel<Float32<4>>("avx2.float32_4bit", supports_exact<4>),
    make_kernel<Float32<2>>("avx2.float32_2bit", supports_exact<2>),
    make_kernel<Float32<1>>("avx2.float32_1bit", supports_exact<1>),
};

// Clang 14 has no name for F16C.
bool has_f16c() {
  unsigned a = 0;
  unsigned b = 0;
  unsigned c = 0;
  unsigned d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}

bool available() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}

}  // namespace

const Isa kAvx2Isa = {"avx2", available, kKernels, nullptr, nullptr, nullptr, &kDecoding};

}  // namespace fdk

#endif
