"""Kept rows and columns of frozen weights as slices ``[K, ...]``: by PyTorch, or by a kernel in one launch."""

from collections.abc import Sequence

import torch

from ..kernels.choice import Choice
from ..kernels.runtime import kernels_of
from ..kernels.tiles import tile_for
from .quant import FrozenWeight, Weight4bit, read_columns, read_rows

__all__ = ["column_slice", "is_plain", "row_slice"]


def row_slice(
    weights: Sequence[FrozenWeight],
    index: torch.Tensor,
    dtype: torch.dtype,
    way: Choice,
    tail: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rows ``index`` of one or two weights ``[out, in]``, and a tail ``[r, in]``: ``[M K + r, in]``."""
    if way and all(is_plain(w, dtype) and w.stride() == weights[0].stride() for w in weights):
        return kernels_of("slices").gather_rows(tuple(weights), index, tile_for("slices", weights[0]), tail)
    rows = [_4bit(w, index, dtype) if way and _is_4bit(w) else read_rows(w, index, dtype) for w in weights]
    rows = rows if tail is None else [*rows, tail]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def column_slice(
    weight: FrozenWeight, index: torch.Tensor, dtype: torch.dtype, way: Choice, tail: torch.Tensor | None = None
) -> torch.Tensor:
    """Columns ``index`` of a weight ``[out, in]`` as rows, and a tail ``[r, out]`` under them: ``[K + r, out]``."""
    if way and is_plain(weight, dtype):
        return kernels_of("slices").gather_columns(weight, index, tile_for("slices", weight), tail)
    if way and _is_4bit(weight):
        kept = _4bit(weight, index, dtype, columns=True)
    else:
        kept = read_columns(weight, index, dtype).t()
    return kept if tail is None else torch.cat([kept, tail])


def is_plain(weight: FrozenWeight, dtype: torch.dtype) -> bool:
    """Whether a kernel can read a weight as it lies in memory: of the type of the product, rows contiguous."""
    return isinstance(weight, torch.Tensor) and weight.dtype == dtype and weight.stride(1) == 1


def _is_4bit(weight: FrozenWeight) -> bool:
    return isinstance(weight, Weight4bit) and weight.state.quant_type in ("nf4", "fp4")


def _4bit(weight: Weight4bit, index: torch.Tensor, dtype: torch.dtype, *, columns: bool = False) -> torch.Tensor:
    state, packed = weight.state, weight.packed
    gather, tile = kernels_of("nf4").nf4_gather, tile_for("slices", packed)
    options = {"columns": columns, "block": state.blocksize}
    return gather(packed, weight.scales(), state.code, tuple(weight.shape), index, dtype, tile, **options)
