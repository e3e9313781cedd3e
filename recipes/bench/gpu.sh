#!/usr/bin/env bash
# Everything that needs a GPU, in order of worth, in one command of less than 9 minutes. Every step has a time limit and
# stands for itself; its figures are written to recipes/bench/results/ as soon as it is done.
#
#   bash recipes/bench/gpu.sh                             # Llama-3-8B shapes: about 60 GB of device memory
#   SPARSELORA_WHEELS=wheels bash recipes/bench/gpu.sh    # on a machine without a network, from a folder of wheels
#   SPARSELORA_BENCH_SMOKE=1 bash recipes/bench/gpu.sh    # the same lines with tiny shapes, on a CPU
#   SPARSELORA_BENCH_ONLY="math csr" bash recipes/bench/gpu.sh    # some steps by name
#
# The folder of wheels, where trl, datasets and the like are missing, for the Python of that machine (multiprocess has a
# wheel for each). datasets needs pyarrow, pandas, xxhash and fsspec besides, which machines with PyTorch and
# transformers mostly have:
#   pip download --no-deps --only-binary=:all: --python-version 3.12 -d wheels trl==1.16.0 datasets==5.2.0 dill==0.4.1 \
#     multiprocess==0.70.19 peft==0.21.2 liger-kernel==0.8.5
set -uo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TRITON_DEFAULT_FP_FUSION=1
python=${SPARSELORA_PYTHON:-python3}
budget=${SPARSELORA_BENCH_SECONDS:-530} patience=1 interpret=
[ -n "${SPARSELORA_BENCH_SMOKE:-}" ] && budget=3600 patience=5 interpret="env TRITON_INTERPRET=1"
out=${SPARSELORA_BENCH_OUT:-recipes/bench/results}
mkdir -p "$out"

if [ -n "${SPARSELORA_WHEELS:-}" ]; then
  site=$(mktemp -d)
  "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$SPARSELORA_WHEELS"/*.whl || exit 1
  export PYTHONPATH="$PYTHONPATH:$site"
fi
# what is missing is said now, not by every step
"$python" -c "import pytest, rich, trl, sparselora_hf.trainer" || exit 1
parallel=$("$python" -c "import xdist; print('-n 8')" 2>/dev/null || true)  # kernels compile on the CPU

# run NAME SECONDS COMMAND...: within its limit and what is left of the budget, its last lines shown
run() {
  [[ -n "${SPARSELORA_BENCH_ONLY:-}" && " $SPARSELORA_BENCH_ONLY " != *" $1 "* ]] && return
  local name=$1 limit=$(($2 * patience)) left=$((budget - SECONDS)); shift 2
  [ "$left" -lt 10 ] && { echo "== $name: skipped, out of time"; return; }
  echo "== $name (at $SECONDS s, limit $((limit < left ? limit : left)) s)"
  timeout "$((limit < left ? limit : left))" "$@" >"$out/$name.log" 2>&1 || echo "failed ($?): $name"
  tail -n "${SPARSELORA_BENCH_TAIL:-14}" "$out/$name.log"
}

if [ -n "${SPARSELORA_BENCH_SMOKE:-}" ]; then
  device=cpu large="--model llama-3-8b --layers 2 --hidden 128" small="--model llama-3.2-1b --layers 2 --hidden 128"
  batch="--batch 1" turns="--rounds 1 --steps 2" liger="" parallel="" parity="tests/kernel_parity/test_slices.py"
  times="--tiny --dtype fp32" attach="--model llama-3-8b --layers 1 --hidden 128"
  sparse='{mlp_sparsity: 0.9, attention_sparsity: 0.5, dense_if_slower: false}'
  settings() { printf -- '--sequence\n32\n--output\n8\n--sparse\n%s\n' "$sparse"; }
  all='{mlp_sparsity: 0.9, criterion: static, compensation: low_rank, compensation_rank: 4, dense_if_slower: false}'
else
  device=cuda large="--model llama-3-8b" small="--model llama-3.2-1b"
  batch="--batch 8" turns="--rounds 3 --steps 3" liger="sft_liger sparse_liger" parity="tests/kernel_parity"
  times="--shapes math csr --write-table" attach="--model llama-3-8b"
  settings() { printf -- '--protocol\n%s\n' "$1"; }
  all='{mlp_sparsity: 0.99, attention_sparsity: 0.75, criterion: static, compensation: low_rank, compensation_rank: 256, calibration_tokens: 512}'
fi
step() { # step NAME SECONDS PROTOCOL ARGUMENTS...
  [[ -n "${SPARSELORA_BENCH_ONLY:-}" && " $SPARSELORA_BENCH_ONLY " != *" $1 "* ]] && return
  local name=$1 limit=$2 protocol=$3 shape; shift 3
  mapfile -t shape < <(settings "$protocol")
  run "$name" "$limit" "$python" recipes/bench/step.py --device "$device" --csv "$out/step-$device.csv" --json \
    --variants sft sparse --no-memory "${shape[@]}" "$@"
}

# the kernels are right on this device, and what each way of an operation takes; the fastest ways are used from here on
run parity 90 $interpret "$python" -m pytest -q --tb=short --maxfail=20 -p no:cacheprovider $parallel $parity
run kernels 60 $interpret "$python" recipes/bench/kernel_times.py --device "$device" --csv "$out/kernels-$device.csv" $times
# the four protocols against untouched SFTTrainer
step math 100 math $large $batch $turns
step csr 80 csr $large $batch $turns
# where its time goes, and how often the sparse step launches and waits
mapfile -t shape < <(settings math)
run profile 50 "$python" recipes/bench/profile_step.py --device "$device" --csv "$out/profile-$device.csv" \
  --variants sft sparse $large $batch "${shape[@]}"
step code 55 code $large ${batch/8/6} $turns
step wizard 55 wizard $large ${batch/8/2} $turns
# the SVD of every weight, cold and cached
run attach 60 "$python" recipes/bench/attach.py --device "$device" --csv "$out/attach-$device.csv" $attach
# against SFTTrainer with fused layer kernels, which change transformers for the whole process
[ -n "$liger" ] && step math-liger 75 math $large $batch $turns --variants $liger --csv "$out/step-liger-$device.csv"
# a stand-in in every layer, whatever quality it has; a small model; a small batch
step csr-stand-in 75 csr $large $batch $turns --sparse "$all" --csv "$out/step-stand-in-$device.csv"
step 1b 35 wizard $small ${batch/8/2} $turns
step batch-1 35 math $large --batch 1 $turns
echo "== done in $SECONDS s; results in $out"
