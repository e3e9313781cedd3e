#!/usr/bin/env bash
# Every recipe in small, through training, saving and evaluation, offline on a CPU, on data made on the spot.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-$(mktemp -d)}

python recipes/smoke.py "$out"

echo "comparison"
python recipes/compare.py --smoke --output-dir "$out/compare"

echo "step benchmark"
python recipes/bench/step.py --device cpu --layers 2 --hidden 128 --sequence 64 --output 8 --rounds 1 --steps 2 \
  --sparse '{mlp_sparsity: 0.9}' --no-memory --csv "$out/step.csv" --json
python recipes/bench/plot.py --csv "$out/step.csv" --output-dir "$out"
