// AVX-512 with VBMI and VNNI (Intel from Ice Lake, AMD from Zen 4): integer arithmetic, and float32.
#if defined(__x86_64__)

#include "avx512.h"
#include "avx512_probes.h"
#include "decoding.h"
#include "levels.h"

namespace fdk {
namespace {

template <int kBits, bool kUniform>
bool supports_int8(const Plan &plan) {
  return plan.arithmetic == FDK_INT8 && plan.bits == kBits && (!kUniform || plan.uniform);
}
template <int kBits>
bool supports_int16(const Plan &plan) {
  return plan.arithmetic == FDK_INT16 && plan.bits == kBits;
}
template <int kBits>
bool supports_exact(const Plan &plan) {
  return plan.arithmetic == FDK_EXACT && plan.bits == kBits;
}

constexpr Kernel kKernels[] = {
    make_kernel<Int8<8, true>>("avx512vnni.int8_8bit_uniform", supports_int8<8, true>),
    make_kernel<Int8<8, false>>("avx512vnni.int8_8bit", supports_int8<8, false>),
    make_kernel<Int8<4, true>>("avx512vnni.int8_4bit_uniform", supports_int8<4, true>),
    make_kernel<Int8<4, false>>("avx512vnni.int8_4bit", supports_int8<4, false>),
    make_kernel<Int8<2, false>>("avx512vnni.int8_2bit", supports_int8<2, false>),
    make_kernel<Int8<1, false>>("avx512vnni.int8_1bit", supports_int8<1, false>),
    make_kernel<Int16<8>>("avx512vnni.int16_8bit", supports_int16<8>),
    make_kernel<Int16<4>>("avx512vnni.int16_4bit", supports_int16<4>),
    make_kernel<Int16<2>>("avx512vnni.int16_2bit", supports_int16<2>),
    make_kernel<Int16<1>>("avx512vnni.int16_1bit", supports_int16<1>),
    make_kernel<Float32<8>>("avx512vnni.float32_8bit", supports_exact<8>),
    make_kernel<Float32<4>>("avx512vnni.float32_4bit", supports_exact<4>),
    make_kernel<Float32<2>>("avx512vnni.float32_2bit", supports_exact<2>),
    make_kernel<Float32<1>>("avx512vnni.float32_1bit", supports_exact<1>),
};

bool available() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") &&
         __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

}  // namespace

const Level kAvx512VnniLevel = {"avx512vnni", available, kKernels, nullptr, probe_copy, probe_sum,
                                &kDecoding};

}  // namespace fdk

#endif
