"""Block sizes of the kernels, by class of chip.

The first tile of a list is used where nothing was measured. All of them are compiled for every chip of their class in
the tests, and their registers, spills and shared memory are held against its limits: none may spill. Reasoned, not
measured: tiles of 128 x 128 reach the matrix units' rate, narrower ones leave fewer idle where few channels are
kept, and stages fill what shared memory there is.
"""

import dataclasses
import functools
from typing import Any

import torch

from .runtime import is_exact

__all__ = [
    "CHIPS",
    "MAX_WIDTH",
    "TILES",
    "Chip",
    "Tile",
    "chip_of",
    "cover",
    "rotary_tile",
    "row_tile",
    "tile_for",
    "tiles_of",
]


@dataclasses.dataclass(frozen=True)
class Chip:
    """Limits of one compute capability.

    Args:
        shared: bytes of shared memory that one block may have.
        tiles: class of tiles that fits.
        types: types that its matrix units take.
    """

    shared: int
    tiles: str
    types: tuple[str, ...] = ("bf16", "fp16", "fp32")


# shared memory per block: CUDA C++ Programming Guide, table of technical specifications per compute capability
CHIPS = {
    75: Chip(65536, "fma", ("fp16", "fp32")),
    80: Chip(166912, "large"),
    86: Chip(101376, "small"),
    89: Chip(101376, "small"),
    90: Chip(232448, "large"),
    100: Chip(232448, "large"),
    120: Chip(101376, "small"),
}


@dataclasses.dataclass(frozen=True)
class Tile:
    """Tokens ``m``, channels ``n`` and depth ``k`` of a block; warps, and stages of the pipeline.

    ``k`` counts 2-byte elements: a tile of float32 is half as deep.
    """

    m: int
    n: int
    k: int = 0
    warps: int = 4
    stages: int = 3

    def options(self, itemsize: int = 2) -> dict[str, Any]:
        """As a kernel takes them."""
        depth = {"BLOCK_K": max(16, self.k * 2 // itemsize)} if self.k else {}
        return {"BLOCK_M": self.m, "BLOCK_N": self.n, **depth, "num_warps": self.warps, "num_stages": self.stages}


def cover(total: int, size: int) -> int:
    """Blocks of a size that cover a total; `triton.cdiv` takes a hundred times as long."""
    return -(-total // size)


MAX_WIDTH = 16384  # of a row that one block holds


def row_tile(width: int) -> Tile:
    """Rows of a width as a whole: 2048 elements or one row, 16 elements a thread; 32 of the widest, of 16 warps."""
    columns = 1 << (width - 1).bit_length()
    rows = max(1, 2048 // columns)
    return Tile(rows, columns, 0, min(16, rows * columns // 512), 1)


def rotary_tile(heads: int, half: int) -> Tile:
    """Heads of one token and half of their width: 2048 pairs of elements or one head, 16 pairs a thread."""
    columns = 1 << max(0, half - 1).bit_length()
    rows = max(1, min(2048 // columns, 1 << (heads - 1).bit_length()))
    return Tile(rows, columns, 0, max(1, min(4, rows * columns // 512)), 1)


# "fma": no matrix units, be it that the chip has none that Triton knows (Triton 3.9 multiplies element by element on
# sm_75) or that float32 is to keep its mantissa
TILES = {
    "scatter_product": {
        "large": (Tile(128, 64, 64, 8, 3), Tile(128, 64, 64, 4, 3)),
        "small": (Tile(128, 64, 64, 8, 3), Tile(64, 64, 64, 4, 3)),
        "fma": (Tile(32, 32, 32, 4, 2),),
    },
    "gather_product": {
        "large": (Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 8, 3)),
        "small": (Tile(128, 64, 64, 8, 3), Tile(64, 64, 64, 4, 3)),
        "fma": (Tile(32, 32, 32, 4, 2),),
    },
    "mlp_in": {
        "large": (Tile(128, 32, 64, 4, 4), Tile(64, 64, 64, 4, 4)),
        "small": (Tile(128, 32, 64, 4, 3), Tile(64, 32, 64, 4, 4)),
        "fma": (Tile(32, 32, 32, 4, 2),),
    },
    "activation": dict.fromkeys(("large", "small", "fma"), (Tile(16, 64),)),
    "slices": dict.fromkeys(("large", "small", "fma"), (Tile(16, 128),)),
    "project": {
        "large": (Tile(32, 16, 128, 4, 4), Tile(64, 16, 64, 4, 4)),
        "small": (Tile(32, 16, 128, 4, 3),),
        "fma": (Tile(32, 16, 64, 4, 2),),
    },
    "norms": {
        "large": (Tile(64, 64, 0, 4, 2),),
        "small": (Tile(64, 64, 0, 4, 2),),
        "fma": (Tile(32, 32, 0, 4, 2),),
    },
    # examples of `row_tile`, which decides: norms of queries and keys, hidden states, the widest
    "rms": dict.fromkeys(("large", "small", "fma"), tuple(map(row_tile, (128, 4096, MAX_WIDTH)))),
    # examples of `rotary_tile`: heads of 64, 128 and 256
    "rotary": dict.fromkeys(("large", "small", "fma"), tuple(rotary_tile(32, half) for half in (32, 64, 128))),
}


def chip_of(capability: tuple[int, int] | None) -> Chip:
    """Limits of a compute capability, of the nearest older one where it is unknown; None is the interpreter."""
    number = 90 if capability is None else capability[0] * 10 + capability[1]
    return CHIPS[max((known for known in CHIPS if known <= number), default=75)]


def tiles_of(op: str, capability: tuple[int, int] | None, exact: bool = False) -> tuple[Tile, ...]:
    """Tiles of an operation that fit a chip; ``exact`` is for float32 that keeps its mantissa."""
    return TILES[op]["fma" if exact else chip_of(capability).tiles]


def tile_for(op: str, tensor: torch.Tensor, number: int = 0) -> Tile:
    """Tile of an operation on the chip that holds a tensor, for its type; a number beyond the list is the last."""
    return _tile(op, tensor.device, is_exact(tensor.dtype), number)


@functools.cache
def _tile(op: str, device: torch.device, exact: bool, number: int) -> Tile:
    tiles = tiles_of(op, torch.cuda.get_device_capability(device) if device.type == "cuda" else None, exact)
    return tiles[min(number, len(tiles) - 1)]
