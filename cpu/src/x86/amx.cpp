// AMX with int8 and bfloat16 (Intel from Sapphire Rapids): many tokens.
#if defined(__x86_64__)

#include "isas.h"
#include "x86/amx_available.h"
#include "x86/amx_matrix.h"
#include "x86/avx512_bfloat16.h"

namespace fdk {
namespace {

// With fewer tokens the ISAs below are faster (Xeon with AMX and AVX512-FP16, one thread, k = n =
// 4096, weights from memory, 2026-12).
constexpr int64_t fewest_tokens(int bits, bool integer) {
  if (integer) return bits == 1 ? 6 : 9;
  return bits == 8 || bits == 1 ? 5 : 3;
}

template <typename A>
bool is_worthwhile(const Plan &plan) {
  return plan.m >= fewest_tokens(A::kBits, A::kInteger) && fills_registers<A>(plan);
}

template <int kBits>
using Bfloat16Matrix = Matrix<BFloat16<kBits>>;
template <int kBits, bool kUniform>
using Int8Matrix = Matrix<Int8<kBits, kUniform>>;

template <int kBits>
bool supports_bfloat16(const Plan &plan) {
  return is_bfloat16<kBits>(plan) && is_worthwhile<Bfloat16Matrix<kBits>>(plan);
}
template <int kBits, bool kUniform>
bool supports_int8(const Plan &plan) {
  return plan.arithmetic == FDK_INT8 && plan.bits == kBits && (!kUniform || plan.uniform) &&
         plan.num_codebooks <= kMatrixCodebooks && is_worthwhile<Int8Matrix<kBits, kUniform>>(plan);
}

constexpr Kernel kKernels[] = {
    make_matrix_kernel<Bfloat16Matrix<8>>("amx.bfloat16_8bit", supports_bfloat16<8>),
    make_matrix_kernel<Bfloat16Matrix<4>>("amx.bfloat16_4bit", supports_bfloat16<4>),
    make_matrix_kernel<Bfloat16Matrix<2>>("amx.bfloat16_2bit", supports_bfloat16<2>),
    make_matrix_kernel<Bfloat16Matrix<1>>("amx.bfloat16_1bit", supports_bfloat16<1>),
    make_matrix_kernel<Int8Matrix<8, true>>("amx.int8_8bit_uniform", supports_int8<8, true>),
    make_matrix_kernel<Int8Matrix<8, false>>("amx.int8_8bit", supports_int8<8, false>),
    make_matrix_kernel<Int8Matrix<4, true>>("amx.int8_4bit_uniform", supports_int8<4, true>),
    make_matrix_kernel<Int8Matrix<4, false>>("amx.int8_4bit", supports_int8<4, false>),
    make_matrix_kernel<Int8Matrix<2, false>>("amx.int8_2bit", supports_int8<2, false>),
    make_matrix_kernel<Int8Matrix<1, false>>("amx.int8_1bit", supports_int8<1, false>),
};

bool available() { return kEmulated || (kAvx512Bf16Isa.available() && amx_available()); }

}  // namespace

const Isa kAmxIsa = {"amx", available, kKernels, nullptr, nullptr, nullptr};

}  // namespace fdk

#endif
