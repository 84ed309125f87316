// AVX-512 with VBMI and VNNI (Intel from Ice Lake, AMD from Zen 4): integer arithmetic, and
// float32.
#if defined(__x86_64__)

#include "isas.h"
#include "prompt_attention.h"
#include "x86/avx512_dense.h"
#include "x86/avx512_panel.h"
#include "x86/avx512_probes.h"
#include "x86/avx512_sums.h"

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
// Dense bfloat16 products in float32: of the 32 columns the even ones, then the odd ones.
struct DenseProducts {
  struct Pair {
    __m512 even, odd;
  };
  static Pair load(__m512i words) {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000U));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(words, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(words, upper))};
  }
  static __m512 multiply_add(__m512 sum, const Pair &a, const Pair &b) {
    return _mm512_fmadd_ps(a.odd, b.odd, _mm512_fmadd_ps(a.even, b.even, sum));
  }
};

bool supports_wide8(const Plan &plan) {
  return supports_exact<8>(plan) && plan.codebook_is_bfloat16;
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
    Sums<2, true>::kernel("avx512vnni.integer_sums_2bit"),
    make_kernel<Int16<2>>("avx512vnni.int16_2bit", supports_int16<2>),
    Sums<1, true>::kernel("avx512vnni.integer_sums_1bit"),
    make_kernel<Int16<1>>("avx512vnni.int16_1bit", supports_int16<1>),
    make_kernel<Float32Wide8>("avx512vnni.float32_8bit_bfloat16", supports_wide8),
    make_kernel<Float32<8>>("avx512vnni.float32_8bit", supports_exact<8>),
    make_kernel<Float32<4>>("avx512vnni.float32_4bit", supports_exact<4>),
    Sums<2, false>::kernel("avx512vnni.sums_2bit"),
    make_kernel<Float32<2>>("avx512vnni.float32_2bit", supports_exact<2>),
    Sums<1, false>::kernel("avx512vnni.sums_1bit"),
    make_kernel<Float32<1>>("avx512vnni.float32_1bit", supports_exact<1>),
};

bool available() {
  if (kEmulated) return true;
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") &&
         __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

}  // namespace

const Isa kAvx512VnniIsa = {"avx512vnni", available, kKernels,  dense_rows<DenseProducts>,
                            probe_copy,   probe_sum, &kDecoding};

}  // namespace fdk

#endif
