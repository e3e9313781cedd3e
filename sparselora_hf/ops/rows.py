"""Rows and channels taken out of a token matrix and put back: linear maps and their exact adjoints.

Each gather here is a partial permutation, so its backward is a copy into place, never an accumulation. Indices stay
on the context and not among the saved tensors: recomputation under checkpointing stops at the last saved tensor, and
an index saved behind the last product would make it run that product again for nothing.
"""

import torch

from .once import once_differentiable

__all__ = ["blank", "fork_rows", "join_rows", "overlay_rows", "scatter_channels", "select_channels", "split_rows"]


def blank(like: torch.Tensor, shape: tuple[int, ...], filled: int) -> torch.Tensor:
    """A matrix of zeros, or of anything where as many rows are about to be ``filled`` as it has."""
    # zeroing is a pass over memory: skipped where every row is about to be written
    return like.new_empty(shape) if filled == shape[0] else like.new_zeros(shape)


class _SplitRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, first, second):
        ctx.index = first, second
        ctx.rows = x.shape[0]
        return x.index_select(0, first), x.index_select(0, second)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_first, grad_second):
        first, second = ctx.index
        filled = len(first) + len(second)
        grad = blank(grad_first, (ctx.rows, grad_first.shape[1]), filled)
        grad.index_copy_(0, first, grad_first)
        grad.index_copy_(0, second, grad_second)
        return grad, None, None


class _JoinRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, first, second, first_rows, second_rows, rows):
        ctx.index = first_rows, second_rows
        joined = blank(first, (rows, first.shape[1]), len(first_rows) + len(second_rows))
        joined.index_copy_(0, first_rows, first)
        joined.index_copy_(0, second_rows, second)
        return joined

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        first_rows, second_rows = ctx.index
        return grad.index_select(0, first_rows), grad.index_select(0, second_rows), None, None, None


class _ForkRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rows, apart):
        ctx.rows, ctx.apart = rows, apart
        return x.view_as(x), x.index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_rows):
        # in place: the gradient of the whole comes fresh out of a product, nobody else holds it
        put = grad.index_copy_ if ctx.apart else grad.index_add_
        return put(0, ctx.rows, grad_rows.to(grad.dtype)), None, None


class _OverlayRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, base, patch, rows, apart):
        ctx.rows, ctx.apart = rows, apart
        ctx.mark_dirty(base)
        return base.index_copy_(0, rows, patch)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        base = grad if ctx.apart else grad.index_fill(0, ctx.rows, 0)
        return base, grad.index_select(0, ctx.rows), None, None


class _SelectChannels(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, index):
        ctx.index = index
        ctx.width = x.shape[1]
        return x.index_select(1, index)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad.new_zeros(grad.shape[0], ctx.width).index_copy_(1, ctx.index, grad), None


class _ScatterChannels(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, index, width):
        ctx.index = index
        return x.new_zeros(x.shape[0], width).index_copy_(1, index, x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad.index_select(1, ctx.index), None, None


def split_rows(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two disjoint sets of rows of ``x``.

    Args:
        x: token matrix ``[T, C]``.
        first: int64 rows ``[A]``.
        second: int64 rows ``[B]``, none of them in ``first``.

    Returns:
        ``[A, C]`` and ``[B, C]``. Rows in neither set get a zero gradient.
    """
    return _SplitRows.apply(x, first, second)


def join_rows(
    first: torch.Tensor, second: torch.Tensor, first_rows: torch.Tensor, second_rows: torch.Tensor, rows: int
) -> torch.Tensor:
    """Put two disjoint sets of rows in their places of a matrix ``[rows, C]``; rows of neither set are zero."""
    return _JoinRows.apply(first, second.to(first.dtype), first_rows, second_rows, rows)


def fork_rows(x: torch.Tensor, rows: torch.Tensor, *, apart: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` ``[T, C]`` itself and a copy of some of its rows ``[A, C]``, to be joined again by `overlay_rows`.

    The first result must meet a product before anything else: its gradient is written to in backward. With `apart`
    what is made of it neither reads those rows nor gives them a gradient, and says nothing of the gradient's value
    there either: it is replaced.
    """
    return _ForkRows.apply(x, rows, apart)


def overlay_rows(base: torch.Tensor, patch: torch.Tensor, rows: torch.Tensor, *, apart: bool = False) -> torch.Tensor:
    """``base`` ``[T, C]`` with ``rows`` replaced by ``patch`` ``[A, C]``, in place.

    Where few rows are dense this is cheaper than `split_rows` and `join_rows`: the sparse product, at one channel
    in a hundred, runs over every row, and neither its input nor its output is copied. With `apart` the rows of
    ``base`` depend on nothing, and their gradient is handed on without being zeroed: one copy of it less.
    """
    return _OverlayRows.apply(base, patch.to(base.dtype), rows, apart)


def select_channels(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Channels ``index`` ``[K]`` (distinct) of ``x`` ``[T, C]``, as ``[T, K]``."""
    return _SelectChannels.apply(x, index)


def scatter_channels(x: torch.Tensor, index: torch.Tensor, width: int) -> torch.Tensor:
    """Spread ``x`` ``[T, K]`` over channels ``index`` (distinct) of a matrix ``[T, width]`` of zeros."""
    return _ScatterChannels.apply(x, index, width)
