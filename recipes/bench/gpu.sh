#!/usr/bin/env bash
# Everything that needs a GPU, in order of worth, in one command of less than 9 minutes. Every step has a time limit and
# stands for itself; its figures are written to recipes/bench/results/ as soon as it is done.
#
#   bash recipes/bench/gpu.sh                             # Llama-3-8B shapes: about 80 GB of device memory
#   SPARSELORA_WHEELS=wheels bash recipes/bench/gpu.sh    # on a machine without a network, from a folder of wheels
#   SPARSELORA_BENCH_SMOKE=1 bash recipes/bench/gpu.sh    # the same lines with tiny shapes, on a CPU
#   SPARSELORA_BENCH_ONLY="kernels step" bash recipes/bench/gpu.sh    # some steps by name
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
parallel=$("$python" -c "import xdist; print('-n auto')" 2>/dev/null || true)  # kernels compile on the CPU

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
  turns="--no-memory --rounds 1 --steps 2" liger="" parallel="" parity="tests/kernel_parity/test_slices.py"
  times="--tiny --dtype fp32" attach="--model llama-3-8b --layers 1 --hidden 128"
  sparse='{mlp_sparsity: 0.9, attention_sparsity: 0.5, dense_if_slower: false}'
  protocol() { shape=(--sequence 32 --output 8 --batch 1 --sparse "$sparse"); }
  whole=$sparse
  all='{mlp_sparsity: 0.9, criterion: static, compensation: low_rank, compensation_rank: 4, dense_if_slower: false}'
else
  device=cuda large="--model llama-3-8b" small="--model llama-3.2-1b"
  turns="--rounds 2 --steps 4" liger="sft_liger sparse sparse_graphs" parity="tests/kernel_parity"
  times="--shapes math --write-table" attach="--model llama-3-8b"
  protocol() { shape=(--protocol "$1" --batch "$2"); }
  whole='{preset: llama-3-8b-math, dense_if_slower: false}'
  all='{mlp_sparsity: 0.99, attention_sparsity: 0.75, criterion: static, compensation: low_rank, compensation_rank: 256, calibration_tokens: 512}'
fi
bench() { # bench NAME SECONDS SCRIPT ARGUMENTS...
  local name=$1 limit=$2 script=$3; shift 3
  run "$name" "$limit" "$python" "recipes/bench/$script.py" --device "$device" "$@"
}
steps=()
add() { # add PROTOCOL BATCH ARGUMENTS...: one more measurement of the step benchmark, which makes a model once
  protocol "$1" "$2"; shift 2
  [ ${#steps[@]} -gt 0 ] && steps+=(--then)
  steps+=("${shape[@]}" "$@")
}

# the kernels are right on this device, and what each way of an operation takes; the fastest ways are used from here on
run parity 90 $interpret "$python" -m pytest -q --tb=short --maxfail=20 -p no:cacheprovider $parallel $parity
bench kernels 60 kernel_times --csv "$out/kernels-$device.csv" $times
# the four protocols against untouched SFTTrainer, launched and replayed; a stand-in in every layer, whatever quality it
# has; what a trainer does that is told nothing, checkpointed as TRL does and not; padded rows, a single one; the
# paper's schedule in whole, with what would not pay
these="--variants sft sparse sparse_graphs"
add math 8
add csr 8 $these
add code 6 $these
add wizard 2 $these
add csr 8 $these --sparse "$all" --csv "$out/step-stand-in-$device.csv"
add math 8 $these --sparse default --csv "$out/step-default-$device.csv"
add math 8 $these --sparse default --csv "$out/step-default-$device.csv" --checkpointing
add math 8 $these --checkpointing
add math 8 $these --fill 0.6
add math 1 --variants sft exact exact_graphs
add math 8 $these --sparse "$whole" --csv "$out/step-whole-$device.csv"
bench step 300 step --variants sft exact sparse sparse_graphs $large $turns --csv "$out/step-$device.csv" "${steps[@]}"
# against SFTTrainer with fused layer kernels
protocol math 8
[ -n "$liger" ] &&
  bench step-liger 100 step --variants $liger $large $turns --csv "$out/step-liger-$device.csv" "${shape[@]}" \
    --then --protocol csr --then --protocol code --batch 6 --then --protocol wizard --batch 2
# where its time goes, and how often the sparse step launches and waits
protocol math 8
bench profile 50 profile_step --csv "$out/profile-$device.csv" $these $large "${shape[@]}"
# the SVD of every weight, cold and cached
bench attach 60 attach --csv "$out/attach-$device.csv" $attach
# a small model
protocol wizard 2
bench step-1b 40 step $these $small $turns --csv "$out/step-$device.csv" "${shape[@]}"
# a base of 4 bits, checkpointed
protocol math 8
bench step-qlora 90 step --variants sft sparse $large $turns --csv "$out/step-qlora-$device.csv" "${shape[@]}" --quantization nf4 \
  --checkpointing
echo "== done in $SECONDS s; results in $out"
