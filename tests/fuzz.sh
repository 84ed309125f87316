#!/usr/bin/env bash
# Random input for minutes: fuzz.sh PYTHON SECONDS. Used by `make fuzz`.
#
# SECONDS go to each of: the release build (guard pages), address + undefined-behaviour sanitizers, the
# thread sanitizer with three callers, libFuzzer where there is a clang++ with it, and the long versions of four
# files of Python tests, in an order of chance, which start nothing new after that.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "$1")
seconds=$2
ninja=$(dirname "$python")/ninja
export PYTHON=$python

"$ninja" -C cpu fuzzers
cpu/build/fdk_fuzz --seconds "$seconds" --threads 2
cpu/build/asan/fdk_fuzz --seconds "$seconds"
TSAN_OPTIONS=halt_on_error=1 cpu/build/tsan/fdk_fuzz --seconds "$seconds" --threads 3
# libFuzzer is clang's, whichever compiler built the library: in a copy of the sources, which keeps that build.
clang=
for name in "${CXX:-}" clang++ clang++-{22..17}; do
  if [[ $name == *clang* ]] && command -v "$name" >/dev/null &&
    echo 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char *, unsigned long) { return 0; }' |
    "$name" -fsanitize=fuzzer,address,undefined -x c++ - -o /dev/null 2>/dev/null; then
    clang=$name
    break
  fi
done
if [ -n "$clang" ]; then
  copy=build/fuzz/cpu
  mkdir -p "$copy" build/fuzz/corpus
  tar -C cpu --exclude=./build -cf - . | tar -C "$copy" -xf -
  CXX=$clang "$ninja" -C "$copy" libfuzzer
  "$copy/build/libfuzzer/fdk_fuzz" -max_total_time="$seconds" -len_control=0 -max_len=64 \
    -artifact_prefix=build/fuzz/ -verbosity=0 -print_final_stats=1 build/fuzz/corpus
else
  echo "libFuzzer is skipped: no clang++ here links -fsanitize=fuzzer (Debian: clang-19 libclang-rt-19-dev)"
fi
rounds=$((seconds / 12 < 1 ? 1 : seconds / 12 > 100 ? 100 : seconds / 12))
for file in tests/test_{properties,hostile_files,threads,memory}.py; do
  FDK_RANDOM_SEEDS=1 FDK_FUZZ_SECONDS=$seconds FDK_FUZZ_ROUNDS=${FDK_FUZZ_ROUNDS:-$rounds} \
    "$python" -m pytest -n 2 -rP "$file"
done
