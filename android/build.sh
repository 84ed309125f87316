#!/usr/bin/env bash
# Builds fdk_test and fdk_bench for Android and prints their folder; says on stderr with what.
#
# The NDK is taken from ANDROID_NDK_HOME or ANDROID_NDK_ROOT, else from the places where Android
# Studio and sdkmanager put it. Without one the programs are linked statically for arm64 Linux,
# which Android's kernel runs as well.
#   FDK_ANDROID_API  API level for the NDK (28)
#   FDK_CPU_TUNING   -mtune= for the NDK's build (generic)
#   FDK_NO_NDK=1     the static build even so
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export FDK_ANDROID_API=${FDK_ANDROID_API:-28} FDK_CPU_TUNING=${FDK_CPU_TUNING:-generic}

# The bin folder of the newest NDK, or nothing.
find_ndk() {
  local home candidate found
  [ "${FDK_NO_NDK:-0}" = 1 ] && return
  for home in "${ANDROID_NDK_HOME:-}" "${ANDROID_NDK_ROOT:-}"; do
    [ -n "$home" ] || continue
    for candidate in "$home"/toolchains/llvm/prebuilt/*/bin; do
      if [ -x "$candidate/clang++" ]; then echo "$candidate"; return; fi
    done
    echo "build.sh: $home is no NDK: it has no toolchains/llvm/prebuilt/*/bin/clang++" >&2
    exit 1
  done
  for home in "${ANDROID_HOME:-}" "${ANDROID_SDK_ROOT:-}" "$HOME/Android/Sdk" "$HOME/Library/Android/sdk" /opt/android-sdk; do
    [ -d "$home/ndk" ] || continue
    found=$(printf '%s\n' "$home"/ndk/*/toolchains/llvm/prebuilt/*/bin | sort -V | tail -1)
    if [ -x "$found/clang++" ]; then echo "$found"; return; fi
  done
}

ninja=ninja
command -v ninja >/dev/null || ninja=$root/.venv/bin/ninja
FDK_NDK_BIN=$(find_ndk)
export FDK_NDK_BIN
if [ -n "$FDK_NDK_BIN" ]; then
  echo "building with the NDK in $FDK_NDK_BIN, API level $FDK_ANDROID_API, tuned for $FDK_CPU_TUNING" >&2
  "$ninja" -C "$root/cpu" -f ../android/ndk.ninja >&2
  echo "$root/cpu/build/android-ndk"
else
  echo "no NDK found (ANDROID_NDK_HOME): building static arm64 programs with Debian's clang" >&2
  "$root/cpu/toolchain/install.sh" arm64
  "$ninja" -C "$root/cpu" -f ../android/static.ninja >&2
  echo "$root/cpu/build/android-static"
fi
