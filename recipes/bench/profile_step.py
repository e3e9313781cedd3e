"""Where a training step spends its time, and how often it launches, copies and waits: SFTTrainer beside SparseLoRA.

    python recipes/bench/profile_step.py --model llama-3-8b --protocol math --batch 8

Takes the arguments of `step.py`. One step is profiled after two that are not. On a GPU times are those of kernels on
the device; on a CPU those of operators, self time. `waits` counts the calls in which the host waits for the device.
"""

import sys
from collections import Counter
from collections.abc import Iterable

import torch
import transformers
from rich.console import Console
from rich.table import Table
from step import RESULTS, append_csv, environment, make_model, make_trainer, parse
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

# first match wins; names of CUDA kernels and of PyTorch operators
GROUPS = {
    "sparse kernels": ("gathered_product", "mlp_in_fwd", "gather_rows", "gather_columns", "nf4_"),
    "estimator": ("project_fwd", "gram_norms", "gated_norms", "topk", "sort", "gatherTopK", "radix"),
    "attention": ("flash", "fmha", "attention", "sdpa", "softmax"),
    "product": ("gemm", "cutlass", "nvjet", "cublas", "xmma", "aten::mm", "aten::addmm", "aten::bmm"),
    "gather and scatter": ("index", "Index", "gather", "scatter", "cat"),
    "copy and fill": ("copy", "CopyFunctor", "Memcpy", "Memset", "fill", "zero", "cast"),
    "optimizer": ("multi_tensor", "foreach", "adam"),
    "norm and element-wise": (
        "elementwise",
        "reduce",
        "norm",
        "Norm",
        "mlp_activation",
        "rotary",
        "triton_",
        "aten::",
    ),
}
# on a GPU an operator that reads a number is among the calls that wait; on a CPU it stands for them
WAITS = {
    True: ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"),
    False: ("aten::_local_scalar_dense",),
}
COPIES = ("Memcpy HtoD", "Memcpy DtoH")  # the call, `cudaMemcpyAsync`, also serves copies within the device
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx", "cudaGraphLaunch")


class ProfileStep(TrainerCallback):
    """Profiles the third step of a training."""

    def __init__(self, activities: list[ProfilerActivity]) -> None:
        self.profiler = profile(activities=activities)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """Start before the third."""
        if state.global_step == 2:
            self.profiler.__enter__()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Stop after it."""
        if state.global_step == 3:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.profiler.__exit__(None, None, None)


def group_of(name: str) -> str:
    return next((group for group, parts in GROUPS.items() if any(part in name for part in parts)), "other")


def summarise(events: Iterable, on_gpu: bool) -> tuple[Counter, Counter, dict[str, int]]:
    """Milliseconds and calls by group, and the counts of launches, waits and copies."""
    times, calls, counts = Counter(), Counter(), Counter()
    for event in events:
        counts["launches"] += event.count if event.key in LAUNCHES else 0
        counts["waits"] += event.count if event.key in WAITS[on_gpu] else 0
        counts["copies between host and device"] += event.count if event.key.startswith(COPIES) else 0
        time = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        kernel = event.device_type == torch.autograd.DeviceType.CUDA
        if time and kernel == on_gpu and not event.is_user_annotation:  # a region's time is that of its kernels
            times[group_of(event.key)] += time / 1e3
            calls[group_of(event.key)] += event.count
    return times, calls, dict(counts)


def main() -> int:
    args = parse(sys.argv[1:])
    transformers.utils.logging.set_verbosity_error()
    on_gpu = args.device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    model, facts, rows = make_model(args), environment(args.device), []
    table = Table(title=f"{args.model}, {args.batch} x {args.sequence}: milliseconds of a step (calls)")
    table.add_column("group")
    columns = {}
    for variant in args.variants:
        callback = ProfileStep(activities)
        make_trainer(args, variant, model, 3, (callback,)).train()
        times, calls, counts = summarise(callback.profiler.key_averages(), on_gpu)
        columns[variant] = {group: f"{ms:.1f} ({calls[group]})" for group, ms in times.items()}
        columns[variant] |= {name: str(count) for name, count in counts.items()}
        common = {"variant": variant, "model": args.model, "sequence": args.sequence, "batch": args.batch}
        rows += [{**common, "group": g, "ms": round(times[g], 3), "count": calls[g], **facts} for g in times]
        rows += [{**common, "group": name, "ms": None, "count": count, **facts} for name, count in counts.items()]
        table.add_column(variant, justify="right")
    names = sorted({name for column in columns.values() for name in column})
    for name in names:
        table.add_row(name, *(column.get(name, "") for column in columns.values()))
    Console().print(table)
    append_csv(args.csv or RESULTS / f"profile-{args.device}.csv", rows)
    return 0


if __name__ == "__main__":
    import datasets

    datasets.disable_progress_bars()
    raise SystemExit(main())
