"""Time to make a model sparse: SVD of every weight that is scored, then again with all of them in the cache.

    python recipes/bench/attach.py --model llama-3-8b --preset llama-3-8b-math
    python recipes/bench/attach.py --layers 2        # where memory is short: layers from the middle of the schedule

Weights are random and all different, the vocabulary is cut to 1024. Seconds are what the layers took that were built
(`layers`, of `of` in the model), and nothing is extrapolated. The cached figure is the median of `--repeats`.
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
from sparselora_hf.measure import StepTime, median_step


def attach_time(model, config: SparseLoraConfig) -> tuple[StepTime, int]:
    """Seconds of one attachment by both clocks, and how many parts are sparse."""
    wall, cpu = time.perf_counter(), time.process_time()
    with sparsify(model, config, progress=False) as handle:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = StepTime(time.perf_counter() - wall, time.process_time() - cpu)
        return seconds, sum(decision.outcome == "sparse" for decision in handle.decisions)


def measure(model, config: SparseLoraConfig, repeats: int) -> dict[str, float]:
    """Seconds without a cache, and from one."""
    with tempfile.TemporaryDirectory() as folder:
        config = config.replace(cache_dir=folder)
        cold, parts = attach_time(model, config)
        cached = median_step([attach_time(model, config)[0] for _ in range(repeats)])
    return {
        "sparse_parts": parts,
        "cold": round(cold.wall, 2),
        "cold_cpu": round(cold.cpu, 2),
        "cached": round(cached.wall, 2),
        "cached_cpu": round(cached.cpu, 2),
    }


def cut(config: SparseLoraConfig, layers: int, total: int) -> SparseLoraConfig:
    """A schedule for the first so many layers whose attention is sparse as well as their MLP."""
    mlp, attention = config.layer_sparsity(total)
    picked = [number for number in range(total) if mlp[number] and attention[number]][:layers]
    return config.replace(
        mlp_sparsity={new: mlp[old] for new, old in enumerate(picked)},
        attention_sparsity={new: attention[old] for new, old in enumerate(picked)},
    )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="llama-3-8b")
    parser.add_argument("--preset", default="llama-3-8b-math")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, help="build so many layers, out of the middle of the schedule")
    parser.add_argument("--hidden", type=int, help="another width, with the proportions of the shape")
    parser.add_argument("--repeats", type=int, default=3, help="attachments from the cache")
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()], help="a row for each")
    parser.add_argument("--csv", type=Path)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    config = SparseLoraConfig.from_preset(args.preset, dense_if_slower=False)
    overrides = {"vocab_size": 1024}
    total = build_model(args.model, "meta", torch.bfloat16, **overrides).config.num_hidden_layers
    if args.layers:
        config, overrides = cut(config, args.layers, total), {**overrides, "num_hidden_layers": args.layers}
    if args.hidden:
        overrides |= {"hidden_size": args.hidden, "intermediate_size": args.hidden * 7 // 2}
    model = build_model(args.model, args.device, torch.bfloat16, **overrides)
    model = get_peft_model(model, LoraConfig(r=8, target_modules=TARGETS))
    for threads in args.threads:
        torch.set_num_threads(threads)
        row = {
            "model": args.model,
            "preset": args.preset,
            "dtype": "bfloat16",
            "layers": args.layers or total,
            "of": total,
            **measure(model, config, args.repeats),
            **environment(args.device),
        }
        Console().print(row)
        append_csv(args.csv or RESULTS / f"attach-{args.device}.csv", [row])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
