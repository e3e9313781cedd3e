"""A frozen linear on context rows, with some of its channels, written into the joined output of all rows.

The result has the rows of the whole batch. Rows that are dense elsewhere are filled by `fork_rows` and `overlay_rows`
(`apart`), in either direction. On a GPU nothing is split or joined in memory. In plain PyTorch a few rows more in a
narrow product are cheaper than taking all others out and putting them back: two copies at full width less.
"""

import torch
from torch.autograd.function import once_differentiable

from ..kernels.choice import Choice, choose
from ..kernels.tiles import tile_for
from .linear import compute_dtype
from .quant import FrozenWeight, read_columns, read_rows
from .rows import blank
from .slices import column_slice, row_slice

__all__ = ["add_stand_in", "context_linear"]

_IN_PLACE = 15 / 16  # share of context rows from which the product runs over all rows: even at 7/8 of width 1024


class _ContextLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rows, frozen, over_outputs, covered, mode):
        weight, index, bias = frozen
        ctx.frozen, ctx.width = (rows, weight, index, over_outputs, covered, mode), x.shape[1]
        way = choose("rows" if over_outputs else "columns", x, x.shape[1], len(index), mode)
        product = _product_by_triton if way.way == "triton" else _product
        return product(x, rows, weight, index, bias, weight.shape[0], covered, way, over_outputs, transposed=True)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows, weight, index, over_outputs, covered, mode = ctx.frozen
        way = choose("rows" if over_outputs else "columns", grad, ctx.width, len(index), mode)
        product = _product_by_triton if way.way == "triton" else _product
        args = (rows, weight, index, None, ctx.width, covered, way)
        return product(grad, *args, not over_outputs, transposed=False), None, None, None, None, None


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
    from ..kernels.product import gathered_product

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
    return gathered_product(x, weight, index, y, tile, index_weight=in_place, index_tokens=True, **options)


def context_linear(
    x: torch.Tensor,
    rows: torch.Tensor,
    weight: FrozenWeight,
    index: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    over_outputs: bool,
    covered: int = 0,
    kernels: str | Choice = "auto",
) -> torch.Tensor:
    """A frozen linear on the rows ``rows`` of ``x`` with its kept channels.

    Args:
        x: ``[T, in]``.
        rows: int64 ``[C]``, the context rows.
        weight: ``[out, in]``, frozen.
        index: int64 ``[K]``, distinct: kept output channels, or kept input channels.
        bias: ``[out]``, frozen, or None: added to every channel, kept or not.
        over_outputs: what ``index`` counts. Dropped output channels have no product, dropped input channels are
            taken for zero.
        covered: rows that are here or that `overlay_rows` fills. Where these are all ``T``, the rest is not zeroed.
        kernels: as in `SparseLoraConfig`.

    Returns:
        ``[T, out]``, typed as `gathered_rows` is; rows that are not in ``rows`` are zero, or arbitrary where all are
        covered. Differentiable in ``x``.
    """
    x = x.to(compute_dtype(x, weight))
    return _ContextLinear.apply(x, rows, (weight, index, bias), over_outputs, covered, kernels)


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
    if over_outputs:
        up = up.index_fill(0, index, 0)
    else:
        down = down.index_fill(1, index, 0)
    return y.addmm_(x.to(y.dtype) @ down.t().to(y.dtype), up.t().to(y.dtype))
