#!/usr/bin/env bash
# Builds the arm64 sysroot from Debian's packages, with a static OpenMP runtime from Debian's source package.
#
#   cpu/toolchain/arm64_sysroot.sh            builds what is missing, prints the folder
#
# The result is $FDK_TOOLCHAIN_DIR/sysroot-arm64 (default: ~/.cache/fdk_jax), linked as cpu/build/sysroot-arm64 for
# the ninja files. Nothing is installed on the machine and root is not needed.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

sysroot=$fdk_cache/sysroot-arm64
stamp=$(fingerprint "${BASH_SOURCE[0]}" "$toolchain_dir/common.sh" <(echo "$LLVM_VERSION $GCC_VERSION $PYTHON_VERSION"))

packages=(
  libc6 libc6-dev linux-libc-dev "libgcc-$GCC_VERSION-dev" libgcc-s1 "libstdc++-$GCC_VERSION-dev" libstdc++6 libcrypt1
  "libomp-$LLVM_VERSION-dev" "libomp5-$LLVM_VERSION" "libc++-$LLVM_VERSION-dev" "libc++1-$LLVM_VERSION"
  "libc++abi-$LLVM_VERSION-dev" "libc++abi1-$LLVM_VERSION" "libunwind-$LLVM_VERSION" "libunwind-$LLVM_VERSION-dev"
)
python_packages=(
  "python$PYTHON_VERSION" "python$PYTHON_VERSION-minimal" "libpython$PYTHON_VERSION" "libpython$PYTHON_VERSION-dev"
  "libpython$PYTHON_VERSION-minimal" "libpython$PYTHON_VERSION-stdlib" libexpat1 zlib1g libssl3 libffi8 libbz2-1.0
  liblzma5 libsqlite3-0 libncursesw6 libtinfo6 libreadline8 libuuid1 libdb5.3 libnsl2 libtirpc3 libgssapi-krb5-2
  libkrb5-3 libk5crypto3 libkrb5support0 libcom-err2 libkeyutils1
)

unpack_packages() {
  local root=$1 folder=$2 archive
  download_packages "$folder" "${packages[@]/%/:arm64}" "${python_packages[@]/%/:arm64}"
  for archive in "$folder"/*.deb; do dpkg-deb -x "$archive" "$root"; done
  # Absolute links would lead out of the sysroot.
  find "$root" -type l -lname '/*' -print0 | while IFS= read -r -d '' link; do
    ln -sfn "$(realpath -m --relative-to="$(dirname "$link")" "$root$(readlink "$link")")" "$link"
  done
}

build_static_openmp() {
  local root=$1 work=$2 top
  download_source "$work" "llvm-toolchain-$LLVM_VERSION"
  tar -C "$work" -xf "$work"/*.orig.tar.* --wildcards '*/openmp/*' '*/cmake/*'
  top=$(dirname "$(find "$work" -mindepth 2 -maxdepth 2 -name openmp)")
  CC=clang-$LLVM_VERSION CXX=clang++-$LLVM_VERSION cmake -S "$top/openmp" -B "$work/build" -G Ninja \
    -DCMAKE_BUILD_TYPE=Release -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
    -DCMAKE_C_COMPILER_TARGET=aarch64-linux-gnu -DCMAKE_CXX_COMPILER_TARGET=aarch64-linux-gnu \
    -DCMAKE_ASM_COMPILER_TARGET=aarch64-linux-gnu -DCMAKE_SYSROOT="$root" \
    -DCMAKE_EXE_LINKER_FLAGS=-fuse-ld=lld -DCMAKE_SHARED_LINKER_FLAGS=-fuse-ld=lld \
    -DOPENMP_STANDALONE_BUILD=ON -DLIBOMP_ENABLE_SHARED=OFF -DOPENMP_ENABLE_LIBOMPTARGET=OFF \
    -DLIBOMP_OMPT_SUPPORT=OFF -DOPENMP_ENABLE_OMPT_TOOLS=OFF -DLIBOMP_ARCH=aarch64 >"$work/log" 2>&1 &&
    ninja -C "$work/build" omp >>"$work/log" 2>&1 || { tail -40 "$work/log" >&2; die "the OpenMP runtime did not build"; }
  cp "$work/build/runtime/src/libomp.a" "$root/usr/lib/llvm-$LLVM_VERSION/lib/libomp.a"
}

if [ "$(cat "$sysroot/.fdk_stamp" 2>/dev/null)" != "$stamp" ]; then
  need apt-get dpkg-deb cmake ninja "clang++-$LLVM_VERSION" "ld.lld-$LLVM_VERSION" xz tar
  say "building the arm64 sysroot in $sysroot"
  mkdir -p "$fdk_cache"
  work=$(mktemp -d "$fdk_cache/sysroot.XXXXXX")
  trap 'rm -rf "$work"' EXIT
  apt_private_update
  mkdir "$work/root"
  unpack_packages "$work/root" "$work/packages"
  build_static_openmp "$work/root" "$work/openmp"
  echo "$stamp" > "$work/root/.fdk_stamp"
  publish "$work/root" "$sysroot"
fi
mkdir -p "$cpu_dir/build"
ln -sfn "$sysroot" "$cpu_dir/build/sysroot-arm64"
echo "$sysroot"
