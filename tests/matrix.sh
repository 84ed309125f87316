#!/usr/bin/env bash
# The support matrix: matrix.sh [CASE...]; without arguments every case. Each prints "CASE: passed".
#
#   oldest   Python 3.11, JAX, Flax and numpy at the lowest versions that pyproject.toml allows
#   between  Python 3.12, each minor version of JAX between those: sharding, models and generation
#   newest   Python 3.12, the newest of everything
#   clean    a fresh copy without git, read-only, as a user who is not root, without HOME, empty caches
#
# MATRIX_TESTS chooses the tests (default: all). Logs and environments are in build/matrix/.
set -uo pipefail
cd "$(dirname "$0")/.."
root=$PWD
work=$root/build/matrix
tests=${MATRIX_TESTS:-tests}
mkdir -p "$work"

# The lowest version of a package in pyproject.toml's list.
lowest() { sed -n "s/.*\"$1>=\([0-9.]*\)[\",].*/$1==\1/p" pyproject.toml | head -1; }

# A virtual environment with this package's dependencies, and pins if there are any.
environment() {
  local python=$1 venv=$2
  shift 2
  [ -e "$venv/.done" ] && return
  "$python" -m venv "$venv" && "$venv/bin/pip" install --quiet --upgrade pip &&
    "$venv/bin/pip" install --quiet "$root[dev]" "$@" &&
    "$venv/bin/pip" uninstall --quiet --yes fdk-jax && touch "$venv/.done"
}

# A copy of the tree as it stands, without git and built files, with its own C++ module.
copy() {
  local target=$1 python=$2
  rm -rf "$target" && mkdir -p "$target" &&
    tar -C "$root" --exclude=./build --exclude=./.git --exclude='./.venv*' --exclude=./cpu/build \
      --exclude='./.bench' --exclude=__pycache__ -cf - . | tar -C "$target" -xf - &&
    PYTHON=$python "$(dirname "$python")/ninja" -C "$target/cpu" build/_cpu.so >/dev/null
}

suite() { (cd "$1" && shift && "$@" -m pytest -n 2 -p no:cacheprovider $tests); }

oldest() {
  environment "${PYTHON:-python3.11}" "$work/oldest" "$(lowest jax)" "$(lowest jaxlib)" \
    "$(lowest flax)" "$(lowest numpy)" &&
    copy "$work/oldest-tree" "$work/oldest/bin/python" &&
    suite "$work/oldest-tree" "$work/oldest/bin/python"
}

# Where these versions differ for this package: what several devices share, and what models compile.
between() {
  local minor tests=${MATRIX_TESTS:-$(echo tests/test_{sharding,tensor_parallel,processes,generate}.py \
    tests/test_model*.py)}
  for minor in 0.11; do
    environment "${NEWEST_PYTHON:-python3.12}" "$work/$minor" "jax==$minor.*" "jaxlib==$minor.*" &&
      copy "$work/$minor-tree" "$work/$minor/bin/python" &&
      suite "$work/$minor-tree" "$work/$minor/bin/python" || return 1
  done
}

newest() {
  environment "${NEWEST_PYTHON:-python3.12}" "$work/newest" &&
    copy "$work/newest-tree" "$work/newest/bin/python" &&
    suite "$work/newest-tree" "$work/newest/bin/python"
}

clean() {
  local tree=/tmp/fdk-clean.$$ status
  environment "${PYTHON:-python3.11}" "$work/clean" && copy "$tree" "$work/clean/bin/python" || return 1
  chmod -R a+rX,a-w "$tree"
  local as=()
  if [ "$(id -u)" = 0 ]; then
    as=(setpriv --reuid=65534 --regid=65534 --clear-groups)
    # An interpreter in root's own folders: nobody in a namespace, without root's powers, can read it.
    "${as[@]}" env "$work/clean/bin/python" -c "" 2>/dev/null || as=(unshare --user)
  fi
  local scratch=/tmp/fdk-scratch.$$
  mkdir -m 777 "$scratch"
  suite "$tree" "${as[@]}" env -i PATH="$PATH" TMPDIR="$scratch" PYTHONDONTWRITEBYTECODE=1 \
    HYPOTHESIS_STORAGE_DIRECTORY="$scratch/hypothesis" "$work/clean/bin/python"
  status=$?
  chmod -R u+w "$tree"
  rm -rf "$tree" "$scratch"
  return $status
}

failed=0
for case in "${@:-oldest between newest clean}"; do
  for name in $case; do
    if "$name" >"$work/$name.log" 2>&1; then
      echo "$name: passed ($(tail -1 "$work/$name.log"))"
    else
      echo "$name: FAILED, see $work/$name.log"
      failed=1
    fi
  done
done
exit $failed
