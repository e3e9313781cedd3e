"""Every kernel compiled to machine code for every chip, which needs no GPU, and what it takes of the chip.

A case is a kernel with its compile-time arguments, as the package launches it, and an operation of the tile table.
Registers and stack are read from the cubin, shared memory from the compiler's metadata. Stack means spilled
registers: tiles that spill are not in the table.
"""

import dataclasses
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import estimator, mlp, nf4, product, rms, rotary, slices
from .tiles import CHIPS, TILES, Tile

__all__ = ["CASES", "Case", "Resources", "compile_case", "jobs"]

_MAX_REGISTERS = 255
# arguments other than pointers of the type of the case and integers
_TYPES = {
    "rows_ptr": "*i64",
    "index_ptr": "*i64",
    "packed_ptr": "*u8",
    "code_ptr": "*fp32",
    "scale_ptr": "*fp32",
    "eps": "fp32",
}
# numbers that promise nothing; others are multiples of 16
_UNEVEN = ("M", "T", "R", "HQ", "HK", "BLOCKS", "SPLIT", "eps")


@dataclasses.dataclass(frozen=True)
class Case:
    """A kernel as it is launched: fixed arguments, the operation whose tiles it takes, pointers of another type."""

    name: str
    kernel: Any
    op: str
    fixed: dict[str, Any]
    float32: tuple[str, ...] = ()
    multiplies: bool = True
    rank: int | None = None


@dataclasses.dataclass(frozen=True)
class Resources:
    """What one block takes: registers of a thread, bytes of stack of a thread, bytes of shared memory."""

    registers: int
    stack: int
    shared: int

    def within(self, chip: int) -> bool:
        """Whether nothing spills and a block fits the chip."""
        return self.registers <= _MAX_REGISTERS and self.stack == 0 and self.shared <= CHIPS[chip].shared


def _product(name: str, op: str, unit: str, *, slice_: bool) -> Case:
    fixed = {
        "INDEX_N": op == "scatter_product",
        "INDEX_WEIGHT": not slice_,
        "INDEX_TOKENS": True,
        "HAS_ROWS": True,
        "HAS_BIAS": False,
        "GROUP_M": 8,
        f"stride_weight_{unit}": 1,
    }
    return Case(name, product.gathered_product_kernel, op, fixed)


_GATED = {"GATED": True, "KIND": "silu"}
CASES = (
    _product("rows_fwd", "scatter_product", "k", slice_=False),
    _product("rows_bwd", "gather_product", "n", slice_=False),
    _product("columns_fwd", "gather_product", "n", slice_=True),
    _product("columns_bwd", "scatter_product", "k", slice_=True),
    Case("mlp_in_fwd", mlp.mlp_in_fwd_kernel, "mlp_in", {**_GATED, "BIASED": False}),
    Case("mlp_activation_fwd", mlp.mlp_activation_fwd_kernel, "activation", {**_GATED, "CORRECTED": True}, (), False),
    Case("mlp_activation_bwd", mlp.mlp_activation_bwd_kernel, "activation", {**_GATED, "CORRECTED": True}, (), False),
    Case("gather_rows", slices.gather_rows_kernel, "slices", {"SECOND": True}, (), False),
    Case("gather_columns", slices.gather_columns_kernel, "slices", {}, (), False),
    Case("nf4_rows", nf4.nf4_gather_kernel, "slices", {"BLOCK": 64, "stride_along": 1}, (), False),
    Case("nf4_columns", nf4.nf4_gather_kernel, "slices", {"BLOCK": 64, "stride_kept": 1}, (), False),
    Case("rms_norm_fwd", rms.rms_norm_fwd_kernel, "rms", {"OFFSET": 0.0, "EARLY": True}, (), False),
    Case("rms_norm_bwd", rms.rms_norm_bwd_kernel, "rms", {"OFFSET": 0.0}, (), False),
    Case("rotary_fwd", rotary.rotary_kernel, "rotary", {"BACKWARD": False}, (), False),
    Case("rotary_bwd", rotary.rotary_kernel, "rotary", {"BACKWARD": True}, (), False),
    Case("project_gram_fwd", estimator.project_fwd_kernel, "project", {"PICKED": False, "GRAM": True}, ("out_ptr",)),
    Case("project_fwd", estimator.project_fwd_kernel, "project", {"PICKED": True, "GRAM": False}, ("out_ptr",)),
    Case("gram_norms_fwd", estimator.gram_norms_fwd_kernel, "norms", {}, ("grams_ptr", "out_ptr"), False, 16),
    Case(
        "gated_norms_fwd",
        estimator.gated_norms_fwd_kernel,
        "norms",
        {"BIASED": False, "KIND": "silu"},
        ("z_ptr", "out_ptr"),
        False,
        16,
    ),
)


def jobs() -> Iterator[tuple[Case, int, str, Tile]]:
    """Every case on every chip: all tiles in the chip's half type, and in exact float32 what multiplies."""
    for case in CASES:
        for number, chip in CHIPS.items():
            for tile in TILES[case.op][chip.tiles]:
                yield case, number, chip.types[0], tile
            if case.multiplies:
                yield case, number, "fp32", TILES[case.op]["fma"][0]


def _arguments(case: Case, dtype: str, tile: Tile) -> dict[str, Any]:
    options = tile.options(4 if dtype == "fp32" else 2)
    fixed = {**case.fixed, **{name: value for name, value in options.items() if name.startswith("BLOCK")}}
    fixed |= {"PRECISION": "ieee" if dtype == "fp32" else "tf32", "UPCAST": False, "BLOCK_R": case.rank}
    return {name: fixed[name] for name in case.kernel.arg_names if name in fixed}


def compile_case(case: Case, chip: int, dtype: str, tile: Tile) -> Resources:
    """Compile one job and read what it takes."""
    names, fixed = case.kernel.arg_names, _arguments(case, dtype, tile)
    signature, aligned = {}, {}
    for place, name in enumerate(names):
        if name in fixed:
            signature[name] = "constexpr"
            continue
        usual = f"*{dtype}" if name.endswith("_ptr") else "i32"
        signature[name] = "*fp32" if name in case.float32 else _TYPES.get(name, usual)
        if name not in _UNEVEN:
            aligned[(place,)] = [["tt.divisibility", 16]]
    constants = {(names.index(name),): value for name, value in fixed.items()}
    options = {name: value for name, value in tile.options().items() if name.startswith("num")}
    source = ASTSource(case.kernel, signature, constants, aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
    registers, stack = _resource_usage(binary.asm["cubin"])
    return Resources(registers, stack, binary.metadata.shared)


def _resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of a thread, as the disassembler that comes with Triton lists them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    figures = dict(part.split(":", 1) for part in listing.stdout.split() if part.startswith(("REG:", "STACK:")))
    return int(figures["REG"]), int(figures["STACK"])
