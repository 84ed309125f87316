#!/usr/bin/env bash
# Installs what a build or a test needs, by Debian's packages, when it is not there yet.
#
#   cpu/toolchain/install.sh host          a C++20 compiler with OpenMP and Python's headers
#   cpu/toolchain/install.sh arm64         cross compiler, emulator and the arm64 sysroot
#   cpu/toolchain/install.sh model         llvm-mca, for the modelled speed of the ARM kernels
#   cpu/toolchain/install.sh android-test  arm64, and adb with an adbd to talk to
#
# Packages are installed as root only; anybody else is told what is missing. Exit status 0 when
# everything is there.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# Sets `wanted` to the packages whose check fails.
wanted=()
want() {
  local package=$1
  shift
  "$@" >/dev/null 2>&1 || wanted+=("$package")
}
have() { command -v "$1"; }

compiles_openmp() {
  local compiler program='#include <omp.h>
#include <span>
int main() { return omp_get_max_threads() < 0; }'
  for compiler in ${CXX:-clang++ clang++-22 clang++-21 clang++-20 clang++-19 clang++-18 clang++-17 g++ c++}; do
    have "$compiler" && "$compiler" -std=c++20 -fopenmp -x c++ - -o /dev/null <<<"$program" && return
  done
  return 1
}

has_python_headers() {
  python3 -c 'import os, sysconfig; assert os.path.exists(sysconfig.get_path("include") + "/Python.h")'
}

want_cross_tools() {
  want "clang-$LLVM_VERSION" have "clang++-$LLVM_VERSION"
  want "lld-$LLVM_VERSION" have "ld.lld-$LLVM_VERSION"
  want "llvm-$LLVM_VERSION" have "llvm-ar-$LLVM_VERSION"
  want qemu-user-static have qemu-aarch64-static
  want ninja-build have ninja
  want cmake have cmake
  want xz-utils have xz
}

install_wanted() {
  [ ${#wanted[@]} -gt 0 ] || return 0
  command -v apt-get >/dev/null || die "missing: ${wanted[*]} (names of Debian's packages; there is no apt here)"
  [ "$(id -u)" -eq 0 ] || die "missing: run 'apt-get install ${wanted[*]}' as root"
  say "installing ${wanted[*]}"
  local log
  log=$(mktemp)
  if ! { apt-get install -qq -y --no-install-recommends "${wanted[@]}" ||
    { apt-get update -qq && apt-get install -qq -y --no-install-recommends "${wanted[@]}"; }; } >"$log" 2>&1; then
    tail -20 "$log" >&2
    rm -f "$log"
    die "could not install ${wanted[*]}"
  fi
  rm -f "$log"
}

case ${1:-} in
  host)
    compiles_openmp >/dev/null 2>&1 ||
      wanted+=("clang-$LLVM_VERSION" "libomp-$LLVM_VERSION-dev" "lld-$LLVM_VERSION")
    want python3-dev has_python_headers
    install_wanted
    ;;
  arm64)
    want_cross_tools
    install_wanted
    "$toolchain_dir/arm64_sysroot.sh" >/dev/null
    ;;
  model)
    want_cross_tools
    want llvm-22 have llvm-mca-22
    install_wanted
    "$toolchain_dir/arm64_sysroot.sh" >/dev/null
    ;;
  android-test)
    want_cross_tools
    want adb have adb
    want patch have patch
    want iproute2 have ip
    want util-linux have unshare
    install_wanted
    "$toolchain_dir/arm64_sysroot.sh" >/dev/null
    "$toolchain_dir/adbd.sh" >/dev/null
    ;;
  *)
    sed -n '2,/^source/{/^source/d;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
esac
