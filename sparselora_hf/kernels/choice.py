"""Which way an operation goes on a device, for a shape: a table, never a clock.

* ``torch``: gathers and splits by PyTorch, products by cuBLAS.
* ``slices``: slices of weights and activations by Triton, products by cuBLAS.
* ``triton``: products by Triton too, reading weights and token rows in place.

Measured entries come from ``recipes/bench/kernel_times.py --write-table`` on a GPU: those that ship with the package
(`measured.json`) and those of this machine, in the cache folder, which win. Where nothing was measured the table of
reasons decides. Tuning is that command and nothing else: no training step ever stops to time kernels, and a run that
is resumed goes the way it went before.
"""

import dataclasses
import functools
import json
from pathlib import Path

import torch

from ..cache import default_cache_dir
from ..files import write_atomically
from .runtime import blocker, interpreting, is_exact
from .tiles import chip_of

__all__ = ["MODES", "OPERATIONS", "Choice", "choose", "machine_table", "shape_key", "write_table"]

MODES = ("auto", "torch", "triton")


@dataclasses.dataclass(frozen=True)
class Choice:
    """A way, the number of the tile in `tiles.TILES`, and whether it was measured."""

    way: str
    tile: int = 0
    measured: bool = False

    def __bool__(self) -> bool:
        return self.way != "torch"


# Reasons from an H200 (`recipes/bench/results/kernels-cuda.csv`), by class of chip where they differ. Attention: of
# 4096 x 4096 projections with a quarter of the channels kept for 3072 tokens, a gathered product that reads tokens and
# channels where they lie takes 0.14 to 1.1 ms, copies and cuBLAS 0.13 to 0.17. MLP: with 1 channel in 100 kept both
# products are narrow, which cuBLAS splits along the depth and a plain tile does not. Estimator: ten launches become
# two. Norm: 0.24 and 0.44 ms become 0.02 and 0.12. Activation: 0.33 and 0.68 become 0.10 and 0.16. Rotary: 0.20 and
# 0.35 become 0.03 and 0.16.
_HALF = {
    "rows": "torch",
    "columns": "torch",
    "mlp": "slices",
    "estimator": "triton",
    "nf4": "triton",
    "norm": "triton",
    "activation": "triton",
    "rotary": "triton",
}
# without matrix units in Triton's reach cuBLAS makes every product
_REASONED = {"large": _HALF, "small": _HALF, "fma": {**_HALF, "estimator": "torch"}}
# where `kernels="triton"` overrules a reason for torch
_FORCED = dict.fromkeys(_HALF, "triton")
OPERATIONS = tuple(_HALF)
_TORCH = Choice("torch")
_SHIPPED = Path(__file__).parent / "measured.json"


def shape_key(op: str, dtype: torch.dtype, tokens: int, outer: int, keep: int) -> str:
    """Key of a measured entry; token counts are rounded up to a power of 2, other numbers are a model's own."""
    return f"{op}/{str(dtype).removeprefix('torch.')}/{1 << max(0, tokens - 1).bit_length()}x{outer}x{keep}"


def machine_table() -> Path:
    """File of what was measured on this machine."""
    return default_cache_dir() / "kernels.json"


def write_table(entries: dict[str, dict[str, list]], path: Path | None = None) -> Path:
    """Add measured entries ``{chip: {key: [way, tile]}}`` to a table, this machine's by default; returns its file."""
    path = path or machine_table()
    table = _read(path)
    for chip, rows in entries.items():
        table.setdefault(chip, {}).update(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(table, indent=1, sort_keys=True).encode() + b"\n")
    _measured.cache_clear()
    _choose.cache_clear()
    return path


def _read(path: Path) -> dict[str, dict[str, list]]:
    try:
        # to open a pipe would wait for ever
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError):
        return {}  # a table that is missing or damaged costs speed, not the run


@functools.cache
def _measured(shipped: Path, machine: Path, chip: str) -> dict[str, list]:
    return {**_read(shipped).get(chip, {}), **_read(machine).get(chip, {})}


def choose(
    op: str, x: torch.Tensor, outer: int, keep: int, mode: str | Choice = "auto", tokens: int | None = None
) -> Choice:
    """The way of an operation.

    Args:
        op: one of `OPERATIONS`.
        x: the tokens ``[T, ...]``: their count, type and device.
        outer: width that does not depend on what is kept.
        keep: kept channels.
        mode: ``auto``, ``torch`` or ``triton``, as in `SparseLoraConfig.kernels`; a choice is taken as it is.
        tokens: their count where ``x`` has more dimensions before the last.

    Returns:
        The choice; ``torch`` wherever Triton cannot run.
    """
    if isinstance(mode, Choice):
        return mode
    if mode == "torch" or not (x.is_cuda or interpreting()):
        return _TORCH
    tokens = len(x) if tokens is None else tokens
    return _choose(op, x.device, x.dtype, 1 << max(0, tokens - 1).bit_length(), outer, keep, mode)


@functools.lru_cache(maxsize=4096)
def _choose(
    op: str, device: torch.device, dtype: torch.dtype, tokens: int, outer: int, keep: int, mode: str
) -> Choice:
    if blocker(device, dtype):
        return _TORCH
    capability = None if interpreting() else torch.cuda.get_device_capability(device)
    if mode == "triton":
        return Choice(_FORCED[op])
    chip = "interpreter" if capability is None else f"sm_{capability[0]}{capability[1]}"
    entry = _measured(_SHIPPED, machine_table(), chip).get(shape_key(op, dtype, tokens, outer, keep))
    if entry is not None:
        return Choice(entry[0], entry[1], measured=True)
    return Choice(_REASONED["fma" if is_exact(dtype) else chip_of(capability).tiles][op])
