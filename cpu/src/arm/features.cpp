// The optional instructions of an ARM processor, as the operating system reports them.
#if defined(__aarch64__)
#include "features.h"

#if defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(_WIN32)
#include <windows.h>
#elif defined(__linux__)
#include <sys/auxv.h>
#endif

namespace fdk {
namespace {

#if defined(__APPLE__)

bool has(const char *name) {
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}

ArmFeatures ask() {
  return {has("hw.optional.arm.FEAT_DotProd"), has("hw.optional.arm.FEAT_I8MM"),
          has("hw.optional.arm.FEAT_BF16"), false};
}

#elif defined(_WIN32)

// Numbers of winnt.h; older headers lack them. SVE2 is not asked for: its ISA is not built there.
constexpr DWORD kDotprod = 43;  // PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE
constexpr DWORD kI8mm = 66;     // PF_ARM_V82_I8MM_INSTRUCTIONS_AVAILABLE
constexpr DWORD kBf16 = 68;     // PF_ARM_V86_BF16_INSTRUCTIONS_AVAILABLE

ArmFeatures ask() {
  return {IsProcessorFeaturePresent(kDotprod) != 0, IsProcessorFeaturePresent(kI8mm) != 0,
          IsProcessorFeaturePresent(kBf16) != 0, false};
}

#elif defined(__linux__)

// Bits of the kernel's interface (arch/arm64/include/uapi/asm/hwcap.h); old headers lack them.
constexpr unsigned long kHwcapDotprod = 1UL << 20;
constexpr unsigned long kHwcap2Sve2 = 1UL << 1;
constexpr unsigned long kHwcap2I8mm = 1UL << 13;
constexpr unsigned long kHwcap2Bf16 = 1UL << 14;

ArmFeatures ask() {
  return {(getauxval(AT_HWCAP) & kHwcapDotprod) != 0, (getauxval(AT_HWCAP2) & kHwcap2I8mm) != 0,
          (getauxval(AT_HWCAP2) & kHwcap2Bf16) != 0, (getauxval(AT_HWCAP2) & kHwcap2Sve2) != 0};
}

#else

ArmFeatures ask() { return {}; }

#endif

}  // namespace

const ArmFeatures &arm_features() {
  static const ArmFeatures features = ask();
  return features;
}

}  // namespace fdk
#endif
