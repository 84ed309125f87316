#!/usr/bin/env bash
# Random input for minutes: fuzz.sh PYTHON SECONDS. Used by `make fuzz`.
#
# SECONDS go to each of: the release build (guard pages), address + undefined-behaviour sanitizers, the
# thread sanitizer with three callers, and libFuzzer where the compiler has it. Then the long versions
# of the Python tests.
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
if "$ninja" -C cpu libfuzzer; then
  mkdir -p cpu/build/corpus
  cpu/build/libfuzzer/fdk_fuzz -max_total_time="$seconds" -len_control=0 -max_len=64 \
    -artifact_prefix=cpu/build/ -verbosity=0 -print_final_stats=1 cpu/build/corpus
else
  echo "libFuzzer is skipped: it needs clang++ and its runtime (Debian: libclang-rt-19-dev)"
fi
FDK_FUZZ_ROUNDS=${FDK_FUZZ_ROUNDS:-10} "$python" -m pytest -n 2 -rP \
  tests/test_properties.py tests/test_hostile_files.py tests/test_threads.py tests/test_memory.py
