"""Time of every operation that has a kernel, each way it can go, against what the device can do at all.

    python recipes/bench/kernel_times.py                       # on a GPU: Llama-3-8B shapes of the math protocol
    python recipes/bench/kernel_times.py --write-table         # and let the fastest ways decide from now on
    python recipes/bench/kernel_times.py --tiny                # anywhere: PyTorch alone, small

The ceilings are the device's own: a large copy, bytes read and written, and a large matrix product. `floor` is the
time that the operation's bytes and FLOPs would take at them, the larger of the two; `reached` is floor over time.
Bytes count every input read once and every output written once. Medians, on random data, caches flushed between
calls, the ways taking two turns of which the better counts: a host that is held up only adds. (Not named kernels.py:
transformers would take a module of that name for the package it looks for.)
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from step import RESULTS, append_csv, environment
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from sparselora_hf.kernels.choice import Choice, shape_key, write_table
from sparselora_hf.kernels.runtime import blocker, is_exact
from sparselora_hf.kernels.tiles import tiles_of
from sparselora_hf.ops.context import ContextPart, context_linear
from sparselora_hf.ops.estimator import channel_norms, gated_norms
from sparselora_hf.ops.gate import gated_activation
from sparselora_hf.ops.mlp import MlpWeights, StandIn, kept_mlp
from sparselora_hf.ops.rms import lean_rms_norm
from sparselora_hf.ops.rotary import lean_rotary

TURNS = 2
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclasses.dataclass(frozen=True)
class Shape:
    """Tokens, how many of them are context, and a layer's widths with what is kept of them."""

    tokens: int = 4096
    context: int = 3072
    hidden: int = 4096
    width: int = 14336
    mlp_keep: int = 144
    attention_keep: int = 1024
    rank: int = 8
    stand_in: int = 256


SHAPES = {
    "math": Shape(),
    "csr": Shape(context=4064, mlp_keep=432, attention_keep=3264),
    "1b": Shape(hidden=2048, width=8192, mlp_keep=80, attention_keep=512, context=3072),
    "short": Shape(tokens=512, context=384),
}
TINY = Shape(96, 64, 64, 160, 16, 16, 4, 8)


@dataclasses.dataclass(frozen=True)
class Subject:
    """One operation at one shape: a function of the way, what it moves and computes, and the entry it decides.

    `tiles` names the list of which the triton way takes its pick, if there is one; `elements_back` is what backward
    moves where that is another number; `outer` is the entry's first width where that is not the hidden size, `others`
    are leaves beside `x`, and `tokens` their number where `x` is more than a matrix.
    """

    name: str
    op: str
    run: Callable[[torch.Tensor, Choice], torch.Tensor | tuple[torch.Tensor, ...] | None]
    x: torch.Tensor
    keep: int
    flops: float
    elements: float
    ways: tuple[str, ...]
    tiles: str = ""
    backward: bool = True
    elements_back: float | None = None
    outer: int | None = None
    others: tuple[torch.Tensor, ...] = ()
    tokens: int | None = None

    def moved(self, direction: str) -> float:
        """Elements read and written."""
        return self.elements if direction == "forward" or self.elements_back is None else self.elements_back


def subjects(shape: Shape, device: str, dtype: torch.dtype) -> Iterator[Subject]:
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=device, generator=generator).mul_(size[-1] ** -0.5).to(dtype)

    def subset(total: int, count: int) -> torch.Tensor:
        return torch.randperm(total, device=device, generator=generator)[:count].sort().values

    t, c, h, n, k, a, r = dataclasses.astuple(shape)[:7]
    x, context = draw(t, h), subset(t, c)
    weight, channels = draw(h, h), subset(h, a)
    both = ("torch", "triton")
    for op, over_outputs in (("rows", True), ("columns", False)):

        def attention(x, way, over_outputs=over_outputs):
            return context_linear(x, weight, None, ContextPart(context, channels, over_outputs, t, way))

        tiles = "scatter_product" if over_outputs else "gather_product"
        yield Subject(op, op, attention, x, a, 2.0 * c * h * a, c * (h + a) + a * h, both, tiles)
    weights, index = MlpWeights(draw(n, h), draw(n, h), draw(h, n), F.silu), subset(n, k)
    three = ("torch", "slices", "triton")
    yield Subject(
        "mlp", "mlp", lambda x, way: kept_mlp(x, weights, index, None, way), x, k, 6.0 * t * h * k,
        2 * t * h + 3 * k * h, three, "mlp_in",
    )  # fmt: skip
    s = shape.stand_in
    stand_in = StandIn(draw(s, h), draw(s), draw(s, h), draw(h))
    yield Subject(
        "mlp with stand-in", "mlp", lambda x, way: kept_mlp(x, weights, index, stand_in, way), x, k,
        2.0 * t * h * (3 * k + 2 * s), 2 * t * h + (3 * k + 2 * s) * h, three[:2], "activation",
    )  # fmt: skip
    down, up, wide = draw(r, h), draw(h, r), (draw(n, r), draw(n, r))
    few = x[:c]
    yield Subject(
        "norms", "estimator", lambda x, way: channel_norms(x, down, up, way), few, r, 2.0 * c * h * r, c * h, both,
        "project", backward=False,
    )  # fmt: skip

    def gated(x, way):
        fused = gated_norms(x, torch.cat([down, down]), *wide, (None, None), "silu", way)
        if fused is not None:
            return fused
        z = x @ down.t()
        return (F.silu(z @ wide[0].t()) * (z @ wide[1].t())).float().norm(dim=0)

    flops = 2.0 * c * r * (2 * h + 2 * n)
    yield Subject("gated norms", "estimator", gated, few, 2 * r, flops, c * h, both, "project", backward=False)
    norm = LlamaRMSNorm(h).to(device, dtype).requires_grad_(False)
    yield Subject(
        "rms norm", "norm", lambda x, way: lean_rms_norm(x, norm, norm.weight, 0.0, norm.variance_epsilon, True, way),
        x, h, 0.0, 2 * t * h, both, elements_back=3 * t * h,
    )  # fmt: skip
    yield Subject(
        "activation", "activation", lambda x, way: gated_activation([x], "silu", way), draw(t, 2 * n), n, 0.0,
        3 * t * n, both, "activation", elements_back=5 * t * n, outer=n,
    )  # fmt: skip
    d = min(128, h // 4)
    q, keys, angles = (draw(1, t, heads, d).transpose(1, 2) for heads in (h // d, h // d // 4, 2))
    keys.requires_grad_()
    cos, sin = angles.unbind(1)
    yield Subject(
        "rotary", "rotary", lambda q, way: lean_rotary(q, keys, cos, sin, way), q, h // 4, 0.0,
        2 * t * (h + h // 4 + d), both, others=(keys,), tokens=t,
    )  # fmt: skip


def median_ms(run: Callable[[], object], device: str) -> float:
    """Median time of a call in milliseconds."""
    if device == "cuda":
        from triton.testing import do_bench

        return do_bench(run, warmup=5, rep=25, return_mode="median")
    run()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def ceilings(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes and FLOPs per millisecond of a large copy and a large product."""
    size, side = (2**30, 8192) if device == "cuda" else (2**24, 256)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2.0 * size / median_ms(lambda: target.copy_(source), device)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return copy, 2.0 * side**3 / median_ms(lambda: a @ b, device)


def ways_of(subject: Subject) -> Iterator[Choice]:
    device, dtype = subject.x.device, subject.x.dtype
    yield Choice("torch")
    if blocker(device, dtype):
        return
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    for way in subject.ways[1:]:
        tiles = len(tiles_of(subject.tiles, capability, is_exact(dtype))) if way == "triton" and subject.tiles else 1
        yield from (Choice(way, number) for number in range(tiles))


def times_of(subject: Subject, device: str) -> Iterator[tuple[Choice, str, float]]:
    """Milliseconds of every way, by direction."""
    ways, times = list(ways_of(subject)), {}
    for _ in range(TURNS):
        for way in ways:
            for direction, ms in _turn(subject, way, device):
                times[way, direction] = min(ms, times.get((way, direction), ms))
    for (way, direction), ms in times.items():
        yield way, direction, ms


def _turn(subject: Subject, way: Choice, device: str) -> Iterator[tuple[str, float]]:
    with torch.no_grad():
        yield "forward", median_ms(lambda: subject.run(subject.x, way), device)
    if subject.backward:
        leaf = subject.x.detach().requires_grad_()
        y, leaves = subject.run(leaf, way), (leaf, *subject.others)
        y = y if isinstance(y, tuple) else (y,)
        grads = [torch.randn_like(each) for each in y]
        yield "backward", median_ms(lambda: torch.autograd.grad(y, leaves, grads, retain_graph=True), device)


def measure(name: str, shape: Shape, device: str, dtype: torch.dtype, limits: tuple[float, float]) -> Iterator[dict]:
    facts = environment(device)
    for subject in subjects(shape, device, dtype):
        for way, direction, ms in times_of(subject, device):
            moved = subject.moved(direction) * dtype.itemsize
            floor = max(moved / limits[0], subject.flops / limits[1])
            yield {
                "shape": name,
                "operation": subject.name,
                "direction": direction,
                "way": way.way,
                "tile": way.tile,
                "dtype": str(dtype).removeprefix("torch."),
                "ms": round(ms, 4),
                "gb_per_s": round(moved / ms / 1e6, 1),
                "tflop_per_s": round(subject.flops / ms / 1e9, 2),
                "floor_ms": round(floor, 4),
                "reached": round(floor / ms, 3),
                "copy_gb_per_s": round(limits[0] / 1e6, 1),
                "matmul_tflop_per_s": round(limits[1] / 1e9, 2),
                **facts,
                "key": shape_key(
                    subject.op,
                    dtype,
                    subject.tokens or len(subject.x),
                    subject.outer or shape.hidden,
                    subject.keep,
                ),
            }


def fastest(rows: list[dict]) -> dict[str, list]:
    """Per entry the way whose forward and backward together take least."""
    totals: dict[str, dict[tuple[str, int], float]] = {}
    for row in rows:
        if row["operation"] in ("mlp with stand-in", "gated norms"):
            continue  # goes as its operation goes
        ways = totals.setdefault(row["key"], {})
        ways[row["way"], row["tile"]] = ways.get((row["way"], row["tile"]), 0.0) + row["ms"]
    return {key: list(min(ways, key=ways.get)) for key, ways in totals.items()}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tiny", action="store_true", help="one small shape")
    parser.add_argument("--write-table", action="store_true", help="keep the fastest ways for this machine's runs")
    parser.add_argument("--table", type=Path, help="write them to this file instead, the package's own say")
    parser.add_argument("--csv", type=Path)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    dtype = DTYPES[args.dtype]
    limits = ceilings(args.device, dtype)
    shapes = {"tiny": TINY} if args.tiny else {name: SHAPES[name] for name in args.shapes}
    rows, path = [], args.csv or RESULTS / f"kernels-{args.device}.csv"
    for name, shape in shapes.items():
        for row in measure(name, shape, args.device, dtype, limits):
            append_csv(path, [row])  # as it comes: what was measured stays where time runs out
            rows.append(row)
        if args.write_table and args.device == "cuda":
            chip = "sm_{}{}".format(*torch.cuda.get_device_capability())
            Console().print(f"written to {write_table({chip: fastest(rows)}, args.table)}")
    table = Table(title=f"copy {limits[0] / 1e6:.0f} GB/s, product {limits[1] / 1e9:.1f} TFLOP/s")
    columns = ("shape", "operation", "direction", "way", "tile", "ms", "floor_ms", "reached")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(str(row[column]) for column in columns))
    Console().print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
