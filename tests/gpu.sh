#!/usr/bin/env bash
# The kernels on an NVIDIA GPU: gpu.sh [PYTHON [PROCESSES [KEYWORDS]]].
#
# First all GPU tests as they stand; then those of single kernels again under compute-sanitizer's memcheck, in small
# parts of which PROCESSES run at a time, with an allocation of its own for each array. Prints both summaries; the logs
# are in build/gpu/. Fails if a test fails, if memcheck reports an error or if a part of it has no report. KEYWORDS
# picks tests, as pytest's -k does: all of them take more than ten minutes.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
processes=${2:-$(($(nproc) < 12 ? $(nproc) : 12))}
logs=build/gpu
rm -rf "$logs" && mkdir -p "$logs"
export PYTHONPATH=$PWD
# pytest-benchmark, where it is installed, warns of xdist, and warnings are errors.
pytest=(-m pytest -q -p no:cacheprovider -p no:benchmark -o addopts=)
kernels=(-k "${3:-}" tests/test_gpu.py tests/test_gpu_many.py)
models=(tests/test_gpu_layers.py tests/test_families_gpu.py tests/test_gpu_devices.py)
failed=0

XLA_PYTHON_CLIENT_PREALLOCATE=false "$python" "${pytest[@]}" -n "$processes" -rf "${kernels[@]}" "${models[@]}" \
  >"$logs/plain.log" 2>&1 || failed=1
tail -n 12 "$logs/plain.log"

"$python" "${pytest[@]}" --collect-only "${kernels[@]}" 2>"$logs/collect.log" | grep :: |
  split -a 3 -l 4 - "$logs/part."
compgen -G "$logs/part.???" >/dev/null || { echo "no tests were found: they need an NVIDIA GPU" && exit 1; }

# Where XLA compiles on several threads, compute-sanitizer crashes, at random and without a report.
check() {
  XLA_FLAGS=--xla_gpu_force_compilation_parallelism=1 XLA_PYTHON_CLIENT_ALLOCATOR=platform \
    compute-sanitizer --tool memcheck --error-exitcode 9 --port "$2" \
    "$python" "${pytest[@]}" "@$1" >"$1.log" 2>&1
}

port=49152
for part in "$logs"/part.???; do
  while (($(jobs -rp | wc -l) >= processes)); do wait -n; done
  port=$((port + 20)) # each its own: ten follow from it
  check "$part" "$port" 2>>"$logs/collect.log" &
done
wait
passed=0
for part in "$logs"/part.???; do
  summary=$(grep -h 'ERROR SUMMARY' "$part.log" | sed 's/^=* *//')
  tests=$(grep -hE '^[0-9]+ (passed|failed|skipped)' "$part.log")
  if [[ $summary == 'ERROR SUMMARY: 0 errors' && $tests != *failed* && $tests != *error* ]]; then
    passed=$((passed + $(grep -oE '[0-9]+ passed' <<<"$tests" | grep -oE '[0-9]+' || echo 0)))
  else
    echo "memcheck ${part##*.}: ${summary:-no report} ($(wc -l <"$part") tests: ${tests:-no result})"
    failed=1
  fi
done
echo "memcheck: $passed passed with ERROR SUMMARY: 0 errors in their parts"
exit $failed
