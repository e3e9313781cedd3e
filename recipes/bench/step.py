"""Time of a training step: untouched `SFTTrainer` against exact savings, SparseLoRA, and SparseLoRA without them.

    python recipes/bench/step.py --device cpu --model tiny-229m --protocol math
    python recipes/bench/step.py --model llama-3-8b --protocol math --then --protocol csr    # several in one process

The variants take turns: in every round each trains a few steps with its own trainer over the same frozen weights, and
medians are taken over all rounds. The first step of a turn is not counted, nor is one more where something is fitted
to the first, and one more where a variant records CUDA graphs. Timed is the whole optimizer step, by the wall clock
and by the process's own clock. Peak memory is on a GPU what the allocator held in a variant's turns (of the others
their adapters and optimizer states), on a CPU that of a process of its own per variant. The bound is the ratio of
FLOPs that the cost model gives, attention, LoRA and head included.
"""

import argparse
import csv
import errno
import functools
import gc
import io
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
import yaml
from rich.console import Console
from rich.table import Table
from setup import (
    GRAPHS,
    LIGER,
    PROTOCOLS,
    QUANTIZATIONS,
    TARGETS,
    VARIANTS,
    Workload,
    build_model,
    build_trainer,
    model_config,
    quantize,
    variant_config,
)

from sparselora_hf import SparseLoraConfig
from sparselora_hf.cost import BatchShape, LoraShape, ModelShape, StepCost, bound, keep_lists, step_cost
from sparselora_hf.measure import StepTimer, median_step, peak_memory, reset_peak_memory

RESULTS = Path(__file__).parent / "results"
SCHEDULES = {
    "tiny-229m": {"mlp_sparsity": {"1-10": 0.99}, "attention_sparsity": {"4-8": 0.75}, "score_tokens": 64},
    "llama-3.2-1b": {"mlp_sparsity": {"1-14": 0.99}, "attention_sparsity": {"6-12": 0.75}},
    "math": {"preset": "llama-3-8b-math"},
    "csr": {"preset": "llama-3-8b-csr"},
    "code": {"preset": "llama-3.1-8b-code"},
    "wizard": {"preset": "llama-3.1-8b-wizard"},
}


class PhaseTimer(StepTimer):
    """Step timer that also takes the forward pass and its loss.

    On a GPU by events on the device: the host is not made to wait in the middle of a step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.forward: list[tuple[Mark, Mark]] = []

    def watch(self, trainer) -> None:
        """Time what a trainer does in the contexts of its loss; `compute_loss` stays its own."""
        contexts = trainer.compute_loss_context_manager

        def timed():
            stack, start = contexts(), _mark()
            stack.callback(lambda: self.forward.append((start, _mark())))
            return stack

        trainer.compute_loss_context_manager = timed

    @property
    def forward_seconds(self) -> list[float]:
        """Of every forward pass; the device must have reached their ends."""
        return [
            end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3 for start, end in self.forward
        ]


Mark = float | torch.cuda.Event


def _mark() -> Mark:
    if not torch.cuda.is_available():
        return time.process_time()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="tiny-229m", help="a shape by name, or the folder of a configuration")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--protocol", choices=sorted(PROTOCOLS), help="sequence and output tokens by name")
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--output", type=int, default=51, help="labelled tokens at the end of each row")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--fill", type=float, default=1.0, help="mean length of the rows over the longest")
    parser.add_argument("--layers", type=int, help="cut the model to so many layers")
    parser.add_argument("--hidden", type=int, help="another width, with the proportions of the shape")
    parser.add_argument(
        "--sparse", help="YAML of SparseLoraConfig settings, or 'default'; left out, the model's or the preset"
    )
    parser.add_argument("--quantization", choices=QUANTIZATIONS, default="none", help="of the frozen weights")
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--dora", action="store_true", help="DoRA in place of LoRA, in every variant")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--variants", nargs="+", choices=[*VARIANTS, *LIGER, *GRAPHS], default=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="counted steps of a turn")
    parser.add_argument("--no-memory", action="store_true", help="skip the memory runs of a CPU")
    parser.add_argument("--csv", type=Path, default=None, help="append rows to this file")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--memory-probe", choices=[*VARIANTS, *LIGER, *GRAPHS], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.protocol:
        args.sequence, args.output = PROTOCOLS[args.protocol]
    try:
        model_config(args.model, **_overrides(args.layers, args.hidden))
        sparse_settings(args)
    except (OSError, ValueError, yaml.YAMLError) as error:
        parser.error(" ".join(str(error).split()))
    return args


def sparse_settings(args: argparse.Namespace) -> SparseLoraConfig:
    """Settings of the sparse variants."""
    if args.sparse == "default":
        shape = model_config(args.model, **_overrides(args.layers, args.hidden))
        return SparseLoraConfig.default(shape.num_hidden_layers, shape.hidden_size)
    if args.sparse:
        return SparseLoraConfig.from_dict(yaml.safe_load(args.sparse))
    if args.model in SCHEDULES:
        return SparseLoraConfig.from_dict(SCHEDULES[args.model])
    return SparseLoraConfig.from_dict(SCHEDULES[args.protocol or "math"])


def make_model(args: argparse.Namespace):
    """The model of a measurement; the last one made is kept for measurements of the same model."""
    return _make_model(args.model, args.device, args.layers, args.hidden, args.quantization)


@functools.lru_cache(maxsize=1)
def _make_model(name: str, device: str, layers: int | None, hidden: int | None, quantization: str):
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    return quantize(build_model(name, device, dtype, **_overrides(layers, hidden)), quantization, dtype)


def _overrides(layers: int | None, hidden: int | None) -> dict[str, int]:
    """Values of a configuration that are cut to size."""
    overrides = {} if layers is None else {"num_hidden_layers": layers}
    if hidden:
        heads = max(4, hidden // 64)
        overrides |= {"hidden_size": hidden, "intermediate_size": hidden * 7 // 2}
        overrides |= {"num_attention_heads": heads, "num_key_value_heads": max(1, heads // 4)}
    return overrides


def make_trainer(args: argparse.Namespace, variant: str, model, steps: int, callbacks: tuple = ()):
    workload = Workload(args.sequence, args.output, args.batch, args.fill)
    return build_trainer(
        variant,
        model,
        workload,
        sparse_settings(args),
        steps,
        lora_rank=args.lora_rank,
        dora=args.dora,
        checkpointing=args.checkpointing,
        callbacks=callbacks,
    )


def measure(args: argparse.Namespace) -> tuple[dict[str, PhaseTimer], ModelShape, dict[str, object], dict[str, int]]:
    """Take turns; returns the timers, the model's shape, the trainers, and on a GPU the peak bytes of their turns."""
    model, timers, trainers, peaks = make_model(args), {}, {}, {}
    # steps of a turn that warm up, fit what dense steps gave, and record graphs
    first = 1 + sparse_settings(args).needs_statistics + any(variant in GRAPHS for variant in args.variants)
    for variant in args.variants:
        timers[variant] = PhaseTimer()
        trainers[variant] = make_trainer(args, variant, model, args.steps + first, (timers[variant],))
        timers[variant].watch(trainers[variant])
    for _ in range(args.rounds):
        for variant, trainer in trainers.items():
            done = len(timers[variant].steps)
            if args.device == "cuda":
                reset_peak_memory()
            with family_as_it_was(model):
                trainer.train()
            if args.device == "cuda":
                peaks[variant] = max(peak_memory(), peaks.get(variant, 0))
            del timers[variant].steps[done : done + first], timers[variant].forward[done : done + first]
    return timers, ModelShape.from_config(model.config), trainers, peaks


@contextmanager
def family_as_it_was(model) -> Iterator[None]:
    """The names in the file of a model's family stand for the same things afterwards: Liger exchanges some of them."""
    names = vars(sys.modules[type(model).__module__])
    before = dict(names)
    try:
        yield
    finally:
        names.update(before)
        for name in names.keys() - before.keys():
            del names[name]


def peak_of(args: argparse.Namespace, argv: list[str], variant: str) -> int | None:
    """Peak bytes of a training run of one variant, in a process of its own."""
    command = [sys.executable, __file__, *argv, "--memory-probe", variant]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def probe(args: argparse.Namespace) -> None:
    """Print the peak of two steps, the process's own start-up (interpreter and libraries) taken off."""
    reset_peak_memory()
    start = peak_memory() or 0
    trainer = make_trainer(args, args.memory_probe, make_model(args), 2)
    reset_peak_memory()
    trainer.train()
    peak = peak_memory()
    print(json.dumps(None if peak is None else peak - start))


def cost_of(args: argparse.Namespace, variant: str, shape: ModelShape, handle: object) -> StepCost:
    """FLOPs of a step of one variant, from its trainer's own decisions."""
    workload = Workload(args.sequence, args.output, args.batch, args.fill)
    lengths = workload.lengths()
    batch = BatchShape(
        context=sum(lengths) - len(lengths) * (args.output + 1),
        output=len(lengths) * (args.output + 1),
        padding=len(lengths) * max(lengths) - sum(lengths),
        loss=len(lengths) * args.output,
        batch=len(lengths),
        sequence=max(lengths),
    )
    head = "all" if args.device == "cpu" else "labels"
    common = {"checkpointing": args.checkpointing, "head": head}
    lora = LoraShape(args.lora_rank, tuple(TARGETS))
    if handle is None:
        return step_cost(shape, batch, lora, **common)
    config = variant_config(LIGER.get(variant, variant), sparse_settings(args))
    mlp_keep, attention_keep = keep_lists(config, shape)
    exact = sorted(set(config.exact) - handle.state.withheld.keys())
    return step_cost(shape, batch, lora, mlp_keep=mlp_keep, attention_keep=attention_keep, exact=exact, **common)


def rows_of(args: argparse.Namespace, argv: list[str]) -> Iterator[dict]:
    """One row per variant, the baseline first."""
    timers, shape, trainers, peaks = measure(args)
    if args.device != "cuda" and not args.no_memory:
        peaks = {variant: peak_of(args, argv, variant) for variant in args.variants}
    costs = {
        v: cost_of(args, v, shape, None if LIGER.get(v, v) == "sft" else t.sparse_handle) for v, t in trainers.items()
    }
    clock = "cpu" if args.device == "cpu" else "wall"
    baseline = args.variants[0]
    base = median_step(timers[baseline].steps)
    for variant in args.variants:
        steps = timers[variant].steps
        middle = median_step(steps)
        forward = statistics.median(timers[variant].forward_seconds)
        limit = bound(costs[baseline], costs[variant])
        total = getattr(middle, clock)
        speedup = getattr(base, clock) / total
        yield {
            "variant": variant,
            "model": args.model,
            "sequence": args.sequence,
            "output": args.output,
            "batch": args.batch,
            "fill": args.fill,
            "hidden": shape.hidden,
            "layers": shape.layers,
            "context_share": round(1 - (args.output + 1) / (args.sequence * args.fill), 3),
            "checkpointing": args.checkpointing,
            **({} if args.quantization == "none" else {"quantization": args.quantization}),
            **({"adapter": "DoRA"} if args.dora else {}),
            "speedup": round(speedup, 3),
            "speedup_wall": round(base.wall / middle.wall, 3),
            "bound": round(limit, 3),
            "realised": round(speedup / limit, 3),
            **_quartiles("wall", [step.wall for step in steps]),
            **_quartiles("cpu", [step.cpu for step in steps]),
            "forward": round(forward, 4),
            "backward_and_update": round(total - forward, 4),
            "peak_memory": peaks.get(variant),
            "steps": len(steps),
            **environment(args.device),
        }


def _quartiles(name: str, values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {f"{name}_q1": round(low, 4), f"{name}_median": round(middle, 4), f"{name}_q3": round(high, 4)}


def environment(device: str) -> dict[str, str]:
    """Where and with what a figure was measured."""
    import peft
    import trl

    name = torch.cuda.get_device_name() if device == "cuda" else f"{_cpu_name()}, {torch.get_num_threads()} threads"
    versions = {m.__name__: m.__version__ for m in (torch, transformers, peft, trl)}
    return {"device": name, "python": platform.python_version(), **versions, "commit": _commit()}


def _commit() -> str:
    """Commit of the working tree, or the one that is given for a copy of it; empty where there is no repository."""
    if given := os.environ.get("SPARSELORA_BENCH_COMMIT"):
        return given
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=RESULTS.parent).stdout.strip()
    except FileNotFoundError:
        return ""


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), "cpu")


def append_csv(path: Path, rows: list[dict]) -> None:
    """Append rows, all or none; a new file, or an empty one, gets the header.

    Raises:
        OSError: they do not fit on the disk; the file is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:  # at once: what a buffer holds would be tried again when it is closed
        end, text = file.tell(), io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=list(rows[0]))
        if not end:
            writer.writeheader()
        writer.writerows(rows)
        data = text.getvalue().encode()
        if file.write(data) < len(data):
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def table_of(rows: list[dict]) -> Table:
    table = Table(title=f"{rows[0]['model']}, {rows[0]['batch']} x {rows[0]['sequence']} on {rows[0]['device']}")
    for column in ("variant", "wall s", "cpu s", "forward s", "speed-up", "by wall", "bound", "realised", "peak MiB"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for row in rows:
        peak = "" if row["peak_memory"] is None else f"{row['peak_memory'] / 2**20:.0f}"
        numbers = [row[k] for k in ("wall_median", "cpu_median", "forward")]
        ratios = [f"{row[k]:.2f}" for k in ("speedup", "speedup_wall", "bound", "realised")]
        table.add_row(row["variant"], *(f"{n:.3f}" for n in numbers), *ratios, peak)
    return table


def summary(rows: list[dict]) -> dict:
    """The JSON object of `--json`."""
    by_name = {row["variant"]: row for row in rows}
    sparse, base = by_name.get("sparse", rows[-1]), rows[0]
    ratio = sparse["peak_memory"] / base["peak_memory"] if base["peak_memory"] and sparse["peak_memory"] else None
    return {
        "speedup": sparse["speedup"],
        "speedup_wall": sparse["speedup_wall"],
        "speedup_exact_only": by_name.get("exact", {}).get("speedup"),
        "bound": sparse["bound"],
        "realised": sparse["realised"],
        "peak_memory_ratio": None if ratio is None else round(ratio, 3),
        "baseline": {"name": "trl.SFTTrainer", "wall": base["wall_median"], "cpu": base["cpu_median"]},
        "device": base["device"],
    }


def split(argv: list[str]) -> list[list[str]]:
    """Arguments of each measurement: those before the first `--then`, and what each part behind one adds to them."""
    parts = [list(part) for word, part in itertools.groupby(argv, lambda word: word == "--then") if not word]
    return [parts[0], *(parts[0] + part for part in parts[1:])] if parts else [[]]


def run(argv: list[str]) -> None:
    """One measurement, written and shown."""
    args = parse(argv)
    if args.memory_probe:
        probe(args)
        return
    rows = list(rows_of(args, argv))
    kind = "step-dora" if args.dora else "step" if args.quantization == "none" else "step-qlora"
    append_csv(args.csv or RESULTS / f"{kind}-{args.device}.csv", rows)
    Console().print(table_of(rows))
    if args.json:
        print(json.dumps(summary(rows)))


def main(argv: list[str] | None = None) -> int:
    parts = split(sys.argv[1:] if argv is None else argv)
    for part in parts:
        parse(part)  # what is wrong with any is said before the first
    transformers.utils.logging.set_verbosity_error()
    failed = False
    for part in parts:
        try:
            run(part)
        except Exception:
            if len(parts) == 1:
                raise
            traceback.print_exc()  # the others are measured all the same
            failed = True
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return int(failed)


if __name__ == "__main__":
    import datasets

    datasets.disable_progress_bars()
    raise SystemExit(main())
