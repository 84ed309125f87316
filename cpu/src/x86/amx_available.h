// Whether this process may use AMX: the processor has it, the system saves its registers, and the
// kernel has given its permission.
#pragma once

#if defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#endif

namespace fdk {
namespace {

#if defined(__linux__)

inline bool processor_has_amx() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned osxsave = 1U << 27;
  if (__get_cpuid(1, &eax, &ebx, &ecx, &edx) == 0 || (ecx & osxsave) == 0) return false;
  constexpr unsigned bfloat16 = 1U << 22, tile = 1U << 24, int8 = 1U << 25;
  constexpr unsigned all = bfloat16 | tile | int8;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0 || (edx & all) != all) return false;
  // XCR0: the system saves the configuration and the data of the registers.
  unsigned low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr unsigned saved = 3U << 17;
  return (low & saved) == saved;
}

// Linux gives a process the use of the registers when it asks (arch_prctl, since 5.16).
inline bool ask_for_amx() {
  constexpr long request_permission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long tile_data = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

inline bool amx_available() {
  static const bool available = processor_has_amx() && ask_for_amx();
  return available;
}

#else

inline bool amx_available() { return false; }

#endif

}  // namespace
}  // namespace fdk
