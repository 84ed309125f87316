// AVX-512 BF16 (Intel from Cooper Lake, AMD from Zen 4): bfloat16 activations in their own
// precision.
#if defined(__x86_64__)

#include "isas.h"
#include "x86/avx512_bfloat16.h"
#include "x86/avx512_dense.h"
#include "x86/avx512_panel.h"
#include "x86/avx512_sums.h"

namespace fdk {
namespace {

struct DenseProducts {
  using Pair = __m512i;
  static Pair load(__m512i words) { return words; }
  static __m512 multiply_add(__m512 sum, const Pair &a, const Pair &b) {
    return _mm512_dpbf16_ps(sum, std::bit_cast<__m512bh>(a), std::bit_cast<__m512bh>(b));
  }
};

// The tables of sums of the ISA below are faster where they are: for every number of tokens but 8,
// by a fifth to a half (Zen 4, one thread, k = n = 4096, 2026-12). At 2 bits they are slower.
bool supports_1bit(const Plan &plan) {
  return is_bfloat16<1>(plan) && !Sums<1, false>::supports(plan);
}

constexpr Kernel kKernels[] = {
    make_kernel<BFloat16<8>>("avx512bf16.bfloat16_8bit", is_bfloat16<8>),
    make_kernel<BFloat16<4>>("avx512bf16.bfloat16_4bit", is_bfloat16<4>),
    make_kernel<BFloat16<2>>("avx512bf16.bfloat16_2bit", is_bfloat16<2>),
    make_kernel<BFloat16<1>>("avx512bf16.bfloat16_1bit", supports_1bit),
};

bool available() {
  return kEmulated || (kAvx512VnniIsa.available() && __builtin_cpu_supports("avx512bf16"));
}

// Intel's processors take 2.2 cycles for VDPBF16PS on 512 bits, that is 14.5 products a cycle, and
// do 32 in float32 (Emerald Rapids, 2026-11).
bool preferred() { return !__builtin_cpu_is("intel"); }

}  // namespace

const Isa kAvx512Bf16Isa = {"avx512bf16", available, kKernels, dense_rows<DenseProducts>,
                            nullptr,      nullptr,   nullptr,  preferred};

}  // namespace fdk

#endif
