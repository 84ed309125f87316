#!/usr/bin/env bash
# Builds a real adbd (Android's daemon) for this host from Debian's source package android-platform-tools, for the
# tests of cpu/run_on_device.sh. Prints the program's path.
#
# Debian packages the client only. Authentication, USB and the debugger's connections are replaced by
# adbd_stubs.cpp. The daemon binds every address: start it in a network namespace of its own.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

final=$fdk_cache/adbd
stamp=$(fingerprint "${BASH_SOURCE[0]}" "$toolchain_dir/common.sh" "$toolchain_dir/adbd_stubs.cpp")
packages=(android-libbase-dev android-libbase android-liblog-dev android-liblog android-libcutils-dev
  android-libcutils libcap-dev libssl-dev)
sources=(
  adb.cpp adb_io.cpp adb_listeners.cpp adb_trace.cpp adb_unique_fd.cpp adb_utils.cpp fdevent/fdevent.cpp
  fdevent/fdevent_poll.cpp fdevent/fdevent_epoll.cpp services.cpp sockets.cpp socket_spec.cpp sysdeps/errno.cpp
  transport.cpp transport_fd.cpp transport_local.cpp types.cpp sysdeps_unix.cpp sysdeps/posix/network.cpp
  shell_service_protocol.cpp daemon/usb_dummy.cpp daemon/file_sync_service.cpp daemon/services.cpp
  daemon/shell_service.cpp daemon/main.cpp "$toolchain_dir/adbd_stubs.cpp"
)

build_adbd() {
  local work=$1 archive top patch triple
  download_packages "$work/packages" "${packages[@]}"
  for archive in "$work"/packages/*.deb; do dpkg-deb -x "$archive" "$work/root"; done
  download_source "$work" android-platform-tools
  tar -C "$work" -xf "$work"/*.orig.tar.* --wildcards '*/system/core/*'
  top=$(dirname "$(dirname "$(find "$work" -mindepth 3 -maxdepth 3 -path '*/system/core')")")
  tar -C "$top" -xf "$work"/*.debian.tar.*
  while read -r patch; do
    patch -d "$top" -s -p1 -N -f < "$top/debian/patches/$patch" >&2 || die "$patch does not apply"
  done < <(grep '^system/core/' "$top/debian/patches/series")

  triple=$(clang++-"$LLVM_VERSION" -print-target-triple | sed 's/-pc-/-/')
  local include=$work/root/usr/include library=$work/root/usr/lib/$triple
  local flags=(
    -std=gnu++20 -O1 -w -DADB_HOST=0 -DALLOW_ADBD_NO_AUTH=1 -DALLOW_ADBD_ROOT=1 -D_GNU_SOURCE
    -DANDROID_BASE_UNIQUE_FD_DISABLE_IMPLICIT_CONVERSION=1 '-DPLATFORM_TOOLS_VERSION="debian"'
    -I../libcutils/include -I. -Idaemon/include -Iadbconnection/include -I../diagnose_usb/include
    -I../libasyncio/include -I../libcrypto_utils/include -I../include
    -I"$include/android" -I"$include" -I"$include/$triple"
  )
  mkdir "$work/objects" "$work/out"
  export FLAGS COMPILER OBJECTS
  FLAGS=$(printf '%q ' "${flags[@]}") COMPILER=clang++-$LLVM_VERSION OBJECTS=$work/objects
  (cd "$top/system/core/adb" && printf '%s\0' "${sources[@]}" | xargs -0 -P "$(nproc)" -I{} bash -c '
    name=${1//\//_}
    eval "$COMPILER $FLAGS" -c "\"$1\"" -o "\"$OBJECTS/$name.o\""' - {}) || die "adbd did not compile"
  cp -a "$library"/android/lib*.so.* "$work/out"
  clang++-"$LLVM_VERSION" "$work"/objects/*.o -L"$library/android" -lbase -lcutils -llog -lresolv -lutil -lpthread \
    -Wl,--disable-new-dtags,-rpath,'$ORIGIN' -o "$work/out/adbd" || die "adbd did not link"
  echo "$stamp" > "$work/out/.fdk_stamp"
}

if [ "$(cat "$final/.fdk_stamp" 2>/dev/null)" != "$stamp" ]; then
  need apt-get dpkg-deb tar patch "clang++-$LLVM_VERSION"
  say "building adbd in $final"
  mkdir -p "$fdk_cache"
  work=$(mktemp -d "$fdk_cache/adbd.XXXXXX")
  trap 'rm -rf "$work"' EXIT
  apt_private_update
  build_adbd "$work"
  publish "$work/out" "$final"
fi
echo "$final/adbd"
