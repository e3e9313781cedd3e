"""A frozen linear on context rows, with some of its channels, written into the joined output of all rows.

The result has the rows of the whole batch. Rows that are dense elsewhere are filled by `fork_rows` and `overlay_rows`
(`apart`), in either direction. On a GPU nothing is split or joined in memory. In plain PyTorch a few rows more in a
narrow product are cheaper than taking all others out and putting them back: two copies at full width less.
"""

import dataclasses
from collections.abc import Callable

import torch

from ..kernels.choice import Choice, choose
from ..kernels.runtime import kernels_of
from ..kernels.tiles import tile_for
from .linear import compute_dtype
from .once import once_differentiable
from .quant import FrozenWeight, read_columns, read_rows
from .rows import blank
from .slices import column_slice, row_slice

__all__ = ["ContextPart", "add_stand_in", "context_backward", "context_forward", "context_linear", "stand_in_factors"]

_IN_PLACE = 15 / 16  # share of context rows from which the product runs over all rows: even at 7/8 of width 1024


class _ContextLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, weight, part):
        ctx.frozen, ctx.width = (weight, part), x.shape[1]
        ctx.type = None if bias is None else bias.dtype
        return context_forward(x, weight, bias, part)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        weight, part = ctx.frozen
        grad_x = context_backward(grad, weight, part, ctx.width) if ctx.needs_input_grad[0] else None
        grad_bias = grad.index_select(0, part.rows).sum(0).to(ctx.type) if ctx.needs_input_grad[1] else None
        return grad_x, grad_bias, None, None


@dataclasses.dataclass(frozen=True)
class ContextPart:
    """The context rows of a batch and the channels that a frozen linear keeps for them.

    Args:
        rows: int64 ``[C]``, the context rows.
        index: int64 ``[K]``, distinct: kept output channels, or kept input channels.
        over_outputs: what ``index`` counts. Dropped output channels have no product, dropped input channels are
            taken for zero.
        covered: rows that are here or that are filled afterwards. Where these are all ``T``, the rest is not zeroed.
        kernels: as in `SparseLoraConfig`.
    """

    rows: torch.Tensor
    index: torch.Tensor
    over_outputs: bool
    covered: int = 0
    kernels: str | Choice = "auto"


def context_forward(
    x: torch.Tensor, weight: FrozenWeight, bias: torch.Tensor | None, part: ContextPart
) -> torch.Tensor:
    """``[T, in]`` to ``[T, out]``, see `context_linear`; no gradient."""
    product, way = _way(x, x.shape[1], part)
    args = (weight, part.index, bias, weight.shape[0], part.covered, way)
    return product(x, part.rows, *args, part.over_outputs, transposed=True)


def context_backward(grad: torch.Tensor, weight: FrozenWeight, part: ContextPart, width: int) -> torch.Tensor:
    """Gradient ``[T, out]`` of `context_forward` to that of its input, ``[T, width]``."""
    product, way = _way(grad, width, part)
    args = (weight, part.index, None, width, part.covered, way)
    return product(grad, part.rows, *args, not part.over_outputs, transposed=False)


def _way(x: torch.Tensor, width: int, part: ContextPart) -> tuple[Callable[..., torch.Tensor], Choice]:
    way = choose("rows" if part.over_outputs else "columns", x, width, len(part.index), part.kernels)
    return (_product_by_triton if way.way == "triton" else _product), way


def _product(x, rows, weight, index, bias, width, covered, way, over_outputs, transposed):
    """The definition: rows and channels are taken out, multiplied, spread and put back."""
    in_place = covered == len(x) and len(rows) >= _IN_PLACE * len(x)
    few = x if in_place else x.index_select(0, rows)
    if not over_outputs:
        few = few.index_select(1, index)
    kept_rows = over_outputs == transposed
    kept = read_rows(weight, index, x.dtype) if kept_rows else read_columns(weight, index, x.dtype)
    y = few @ (kept.t() if transposed else kept)
    if over_outputs:
        y = y.new_zeros(len(few), width).index_copy_(1, index, y)
    if bias is not None:
        y += bias.to(y.dtype)
    return y if in_place else blank(y, (len(x), width), covered).index_copy_(0, rows, y)


def _product_by_triton(x, rows, weight, index, bias, width, covered, way, over_outputs, transposed):
    """The same in place: at most one launch for a slice and one for the product."""
    x = x if x.stride(1) == 1 else x.contiguous()
    if over_outputs:  # dropped channels of context rows get no product, but their bias
        y = x.new_zeros(len(x), width)
        if bias is not None:
            y.index_copy_(0, rows, bias.to(x.dtype).expand(len(rows), -1))
    else:
        y = blank(x, (len(x), width), covered)
    in_place = over_outputs == transposed and isinstance(weight, torch.Tensor) and weight.stride(1) == 1
    if not in_place:
        kept_rows = over_outputs == transposed
        weight = row_slice((weight,), index, x.dtype, way) if kept_rows else column_slice(weight, index, x.dtype, way)
        transposed = over_outputs  # kept channels are the rows of a slice
    tile = tile_for("scatter_product" if over_outputs else "gather_product", x, way.tile)
    options = {"transposed": transposed, "over_outputs": over_outputs, "rows": rows, "bias": bias}
    product = kernels_of("product").gathered_product
    return product(x, weight, index, y, tile, index_weight=in_place, index_tokens=True, **options)


def context_linear(
    x: torch.Tensor, weight: FrozenWeight, bias: torch.Tensor | None, part: ContextPart
) -> torch.Tensor:
    """A frozen linear on the context rows of ``x`` with its kept channels.

    Args:
        x: ``[T, in]``.
        weight: ``[out, in]``, frozen.
        bias: ``[out]`` or None: added to every channel, kept or not.
        part: rows and channels.

    Returns:
        ``[T, out]``, typed as `gathered_rows` is; rows that are not of the part are zero, or arbitrary where all are
        covered. Differentiable in ``x`` and in ``bias``, which PEFT may train.
    """
    return _ContextLinear.apply(x.to(compute_dtype(x, weight)), bias, weight, part)


def add_stand_in(
    y: torch.Tensor, x: torch.Tensor, index: torch.Tensor, down: torch.Tensor, up: torch.Tensor, *, over_outputs: bool
) -> torch.Tensor:
    """Add to ``y``, in place, what the dropped channels of a linear owe by low-rank factors of its weight.

    Args:
        y: ``[T, out]``, as `context_linear` gives it.
        x: its input, ``[T, in]``.
        index: int64 ``[K]``, the kept channels.
        down: ``[r, in]``.
        up: ``[out, r]``.
        over_outputs: what ``index`` counts, output or input channels.

    Returns:
        ``y``. Differentiable in ``x``.
    """
    down, up = stand_in_factors(index, down, up, over_outputs=over_outputs)
    return y.addmm_(x.to(y.dtype) @ down.t().to(y.dtype), up.t().to(y.dtype))


def stand_in_factors(
    index: torch.Tensor, down: torch.Tensor, up: torch.Tensor, *, over_outputs: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors ``[r, in]`` and ``[out, r]`` with their kept channels ``index`` ``[K]`` set to zero."""
    return (down, up.index_fill(0, index, 0)) if over_outputs else (down.index_fill(1, index, 0), up)
