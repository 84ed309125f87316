#!/usr/bin/env bash
# The kernels on an NVIDIA GPU: gpu.sh [PYTHON [PROCESSES]].
#
# First tests/test_gpu.py as it stands; then again under compute-sanitizer's memcheck, split over PROCESSES,
# with an allocation of its own for each array. Prints both summaries; the logs are in build/gpu/.
# Fails if a test fails, if memcheck reports an error or if a part of it has no report.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
processes=${2:-$(($(nproc) < 12 ? $(nproc) : 12))}
logs=build/gpu
rm -rf "$logs" && mkdir -p "$logs"
export PYTHONPATH=$PWD
# pytest-benchmark, where it is installed, warns of xdist, and warnings are errors.
pytest=(-m pytest -q -p no:cacheprovider -p no:benchmark -o addopts=)
failed=0

XLA_PYTHON_CLIENT_PREALLOCATE=false "$python" "${pytest[@]}" -n "$processes" -rf tests/test_gpu.py \
  >"$logs/plain.log" 2>&1 || failed=1
tail -n 12 "$logs/plain.log"

# Neighbours are alike: dealt out in turns, the parts take equally long.
"$python" "${pytest[@]}" --collect-only tests/test_gpu.py 2>"$logs/collect.log" | grep :: |
  split -e -n "r/$processes" - "$logs/part."
compgen -G "$logs/part.??" >/dev/null || { echo "no tests were found: they need an NVIDIA GPU" && exit 1; }
port=49152
for part in "$logs"/part.??; do  # each with ports of its own: more than ten at the same ones crash
  XLA_PYTHON_CLIENT_ALLOCATOR=platform compute-sanitizer --tool memcheck --error-exitcode 9 \
    --base-port $((port += 100)) "$python" "${pytest[@]}" "@$part" >"$part.log" 2>&1 &
done
wait
for part in "$logs"/part.??; do
  summary=$(grep -h 'ERROR SUMMARY' "$part.log" | sed 's/^=* *//')
  tests=$(grep -hE '^[0-9]+ (passed|failed|skipped)' "$part.log")
  echo "memcheck ${part##*.}: ${summary:-no report} ($(wc -l <"$part") tests: ${tests:-no result})"
  [[ $summary == 'ERROR SUMMARY: 0 errors' && $tests != *failed* && $tests == *passed* ]] || failed=1
done
exit $failed
