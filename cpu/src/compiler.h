// The compiler that made this program, for reports and rows of measurements.
#pragma once

namespace fdk {

#if defined(__clang__)
inline constexpr const char *kCompiler = __VERSION__;  // names clang itself
#elif defined(__GNUC__)
inline constexpr const char *kCompiler = "GCC " __VERSION__;
#else
inline constexpr const char *kCompiler = "an unknown compiler";
#endif

}  // namespace fdk
