// AVX2, FMA and F16C (Intel from Haswell, AMD from Zen).
#if defined(__x86_64__)

#include "levels.h"

namespace fdk {
namespace {

bool available() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

}  // namespace

const Level kAvx2Level = {"avx2", available, {}, nullptr, nullptr, nullptr};

}  // namespace fdk

#endif
