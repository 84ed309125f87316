# Shared by the scripts of this folder (sourced, not run).
#
# fdk_cache            folder that holds what the scripts build; survives a clean checkout
# apt_private ARGS     apt-get with package lists of its own: amd64/arm64 binaries and sources, without root and
#                      without touching the machine's own lists or its list of foreign architectures
# publish TEMP FINAL   makes a finished folder appear under its final name in one step

set -euo pipefail

LLVM_VERSION=${LLVM_VERSION:-19}
GCC_VERSION=${GCC_VERSION:-12}
PYTHON_VERSION=${PYTHON_VERSION:-3.11}
fdk_cache=${FDK_TOOLCHAIN_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/fdk_jax}
toolchain_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cpu_dir=$(dirname "$toolchain_dir")

say() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; }
die() { say "$*"; exit 1; }

need() {
  local tool missing=()
  for tool in "$@"; do command -v "$tool" >/dev/null || missing+=("$tool"); done
  [ ${#missing[@]} -eq 0 ] || die "missing: ${missing[*]} (run 'cpu/toolchain/install.sh' as root, or install them)"
}

# One line that changes when any of the given files or words does: the stamp of a finished build.
fingerprint() { cat "$@" 2>/dev/null | sha256sum | cut -c1-16; }

apt_state=$fdk_cache/apt

apt_private_prepare() {
  need apt-get dpkg-deb
  mkdir -p "$apt_state"/{etc/sources.list.d,lists/partial,cache/archives/partial}
  local file
  for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
    [ -f "$file" ] || continue
    sed -nE 's/^deb( .*)/deb\1\ndeb-src\1/p' "$file" > "$apt_state/etc/sources.list.d/$(basename "$file")"
  done
  for file in /etc/apt/sources.list.d/*.sources; do
    [ -f "$file" ] || continue
    sed -E 's/^Types:.*/Types: deb deb-src/' "$file" > "$apt_state/etc/sources.list.d/$(basename "$file")"
  done
}

apt_private() {
  apt-get -q -o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts="$apt_state/etc/sources.list.d" \
    -o Dir::State="$apt_state" -o Dir::State::lists="$apt_state/lists" -o Dir::State::status=/dev/null \
    -o Dir::Cache="$apt_state/cache" -o APT::Architectures::=arm64 -o APT::Sandbox::User= \
    -o Acquire::Languages=none -o Acquire::Retries=3 "$@"
}

apt_private_update() {
  apt_private_prepare
  # A list of the last day is new enough; a version that has vanished since makes the caller fail and say so.
  if [ -z "$(find "$apt_state/updated" -mtime -1 2>/dev/null)" ]; then
    apt_private update >/dev/null || die "apt-get update failed: no package source, or no network"
    touch "$apt_state/updated"
  fi
}

# download_packages FOLDER PACKAGE...: the .deb files of the packages, into FOLDER
download_packages() {
  local folder=$1
  shift
  mkdir -p "$folder"
  if ! (cd "$folder" && apt_private download "$@" >/dev/null); then
    rm -f "$apt_state/updated"
    die "could not download: $*"
  fi
}

# download_source FOLDER PACKAGE: the archives of a source package, into FOLDER
download_source() {
  local folder=$1 package=$2
  mkdir -p "$folder"
  if ! (cd "$folder" && apt_private source --download-only "$package" >/dev/null); then
    rm -f "$apt_state/updated"
    die "could not download the source package $package"
  fi
}

publish() {
  local temporary=$1 final=$2
  rm -rf "$final.old"
  if [ -e "$final" ]; then mv "$final" "$final.old"; fi
  mv "$temporary" "$final"
  rm -rf "$final.old"
}
