"""Time to make a model sparse: the SVD of every weight that is scored, cold and from the cache.

    python recipes/bench/attach.py --model llama-3-8b --preset llama-3-8b-math

With `--layers` the model is cut and the time of the whole extrapolated by the number of sparse layers; `extrapolated`
says so in the result.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from setup import TARGETS, build_model
from step import RESULTS, append_csv, environment

from sparselora_hf import SparseLoraConfig, sparsify


def attach_seconds(model, config: SparseLoraConfig) -> float:
    start = time.perf_counter()
    with sparsify(model, config, progress=False):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="llama-3-8b")
    parser.add_argument("--preset", default="llama-3-8b-math")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, help="layers in the middle of the schedule that are built")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    config = SparseLoraConfig.from_preset(args.preset, dense_if_slower=False)
    overrides, share = {"vocab_size": 1024}, 1.0
    if args.layers:
        whole = build_model(args.model, "meta", torch.bfloat16, **overrides).config.num_hidden_layers
        mlp, attention = config.layer_sparsity(whole)
        sparse = [number for number in range(whole) if mlp[number] and attention[number]]
        picked = sparse[: args.layers]
        count = sum(map(bool, mlp)) * 2 + sum(map(bool, attention)) * 0.35  # cost of q, k and v over that of gate
        share = count / (len(picked) * 2.35)
        parts = {"mlp_sparsity": mlp[picked[0]], "attention_sparsity": attention[picked[0]]}
        config, overrides = config.replace(**parts), {**overrides, "num_hidden_layers": len(picked)}
    model = build_model(args.model, args.device, torch.bfloat16, **overrides)
    model = get_peft_model(model, LoraConfig(r=8, target_modules=TARGETS))
    with tempfile.TemporaryDirectory() as folder:
        config = config.replace(cache_dir=folder)
        cold, cached = (attach_seconds(model, config) for _ in range(2))
    row = {
        "model": args.model,
        "preset": args.preset,
        "cold": round(cold * share, 2),
        "cached": round(cached * share, 2),
        "extrapolated": round(share, 2) if args.layers else "",
        **environment(args.device),
    }
    Console().print(row)
    append_csv(args.csv or RESULTS / f"attach-{args.device}.csv", [row])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
