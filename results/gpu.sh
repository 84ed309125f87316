#!/usr/bin/env bash
# The rows of this folder that an NVIDIA GPU measures: gpu.sh OUT [PYTHON [PROCESSES [NAMES]]].
#
# PROCESSES runs at a time (6 by default, of up to 20 GB of the GPU's memory each) make cases side by side and measure
# alone; with a processor or two for each, products may have 10. Each writes OUT/NAME.jsonl and OUT/NAME.log. NAMES is
# a regular expression of the names below, which are in the order of what the tables need most. Then
#
#   cat OUT/products*.jsonl >rows.jsonl && python -m fdk_jax.benchmark.adopt rows.jsonl results/h200_kernels.jsonl
#   python -m fdk_jax.benchmark.report
set -uo pipefail
out=$(realpath -m "${1:?a folder for the rows is needed}") python=${2:-python3} processes=${3:-6} names=${4:-.}
cd "$(dirname "$0")/.." && mkdir -p "$out" && rm -f "$out/turns" || exit 1
export XLA_PYTHON_CLIENT_PREALLOCATE=false PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} out python

one() { # NAME ARGUMENTS...
  local name=$1
  shift
  "$python" bench.py --backend pallas --turns "$out/turns" --output "$out/$name.jsonl" "$@" >"$out/$name.log" 2>&1
  echo "$name: status $?, $(cat "$out/$name.jsonl" 2>/dev/null | wc -l) rows"
}
export -f one

jobs() {
  local fast='--repetitions 10 --checked_rows 256 --sample_seconds 0.03' shape m bits k
  local model='--suite models --batch 1 --prompt 2 --repetitions 12' kmeans='--codebook kmeans' even='--codebook uniform'
  # A run has one shape, whose weights serve all its numbers of tokens; all shapes come as far.
  for m in 512,192,96,16,1,32,12,8,24,14 256,128,64,4,48,2,10; do
    for shape in 8192-8192 4096-4096 4096-14336 14336-4096 21504-6144; do
      echo "products-$shape-${m%%,*} $kmeans --bits 16,8,4,2,1 --m $m --k ${shape%-*} --n ${shape#*-} $fast"
    done
  done
  echo "models-12B $model --model custom-llama-12B --bits 4 $kmeans"
  echo "models-12B-even $model --model custom-llama-12B --bits 4 $even"
  echo "models-31B $model --model custom-llama-31B,custom-llama-31B-head8 --bits 1 $kmeans"
  echo "models-4B $model --model custom-llama-4B --bits 16,4,1 $kmeans"
  echo "models-4B-even $model --model custom-llama-4B --bits 4 $even"
  echo "models-qwen3-1 $model --model qwen3-8B-tables1,qwen3-4B-tables1,qwen3-1.7B-tables1 --bits 1 --group_size 128 $even"
  echo "models-qwen3-2 $model --model qwen3-8B-tables2,qwen3-4B-tables2,qwen3-1.7B-tables2 --bits 2 $even"
  for prompt in 8100,4096 1024,128; do
    echo "models-prompts-${prompt%%,*} $model --prompt $prompt --steps 8 --model custom-llama-12B --bits 4 $kmeans"
  done
  echo "models-prompts-16 $model --batch 16 --prompt 1024 --steps 8 --model custom-llama-12B --bits 4 $kmeans"
  echo "models-guesses $model --speculate 4 --model custom-llama-12B --bits 4 $kmeans"
  echo "models-batches $model --batch 16,64 --steps 16 --model custom-llama-12B --bits 4 $kmeans"
  echo "models-31B-batch $model --batch 64 --steps 16 --model custom-llama-31B --bits 1 $kmeans"
  echo "attention --suite attention --batch 1,16 --slots 1024,8192 --repetitions 10"
  echo "attention-long --suite attention --batch 1 --slots 32768 --repetitions 10"
  echo "groups $kmeans --m 1 --k 8192,4096 --bits 8,4,2,1 --group_size 16,32,64,128,256,4096 --repetitions 10"
  echo "products-2048 $kmeans --bits 16,8,4,2,1 --m 2048 --k 8192 $fast"
  echo "products-8192 $kmeans --bits 16,8,4,2,1 --m 8192 --k 8192 $fast"
  for bits in 4 1 8 2; do
    echo "products-groups-$bits $kmeans --group_size 32,64,128 --bits $bits --m 16,64,256,512,1,128 --k 8192 $fast"
  done
  for k in 8192 4096; do
    echo "products-even-$k $even --bits 8,4,2 --m 16,64,256,512,1,128 --k $k $fast"
  done
  echo "integers $kmeans --arithmetic exact,int8 --bits 16,8,4,2,1 --m 192,512,2048 --k 8192 $fast"
}

jobs | grep -E "^[^ ]*($names)" | xargs -P "$processes" -d '\n' -I{} bash -f -c 'one $0' {}
