"""Products with some rows or some columns of a frozen weight.

What backward keeps is the weight itself and the index, never the gathered slice: an index of 144 channels is a
kilobyte, the slice of a 4096-wide weight more than a megabyte for each layer and micro-batch. Neither is an
activation, so they stay on the context: recomputation under checkpointing ends at the last saved tensor (`rows.py`).
"""

import torch

from .once import once_differentiable
from .quant import FrozenWeight, QuantisedWeight, read_columns, read_rows

__all__ = ["compute_dtype", "gathered_columns", "gathered_rows"]


class _GatheredRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, index):
        ctx.frozen = weight, index
        return x @ read_rows(weight, index, x.dtype).t()  # [T, H] [H, K]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        weight, index = ctx.frozen
        return grad @ read_rows(weight, index, grad.dtype), None, None


class _GatheredColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, index):
        ctx.frozen = weight, index
        return x @ read_columns(weight, index, x.dtype).t()  # [T, K] [K, H]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        weight, index = ctx.frozen
        return grad @ read_columns(weight, index, grad.dtype), None, None


def compute_dtype(x: torch.Tensor, weight: FrozenWeight) -> torch.dtype:
    """Type that a linear would compute in: the autocast type where autocast is on, else the weight's."""
    # autocast is off in backward: casting here, once, gives both passes the type that F.linear would use
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    if isinstance(weight, QuantisedWeight):
        return weight.product or x.dtype
    return weight.dtype


def gathered_rows(
    x: torch.Tensor, weight: FrozenWeight, index: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``x · weight[index]ᵀ + bias[index]``: the kept output channels of a frozen linear.

    Args:
        x: ``[T, H]``.
        weight: ``[N, H]``, frozen; quantised or not.
        index: int64 ``[K]``, distinct.
        bias: ``[N]``, frozen, or None.

    Returns:
        ``[T, K]``, in the autocast type where autocast is on, else in the weight's. Differentiable in ``x``.
    """
    y = _GatheredRows.apply(x.to(compute_dtype(x, weight)), weight, index)
    return y if bias is None else y + bias.index_select(0, index).to(y.dtype)


def gathered_columns(
    x: torch.Tensor, weight: FrozenWeight, index: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``x · weight[:, index]ᵀ + bias``: a frozen linear that is fed its kept input channels alone.

    Args:
        x: ``[T, K]``, the kept channels.
        weight: ``[H, N]``, frozen; quantised or not.
        index: int64 ``[K]``, distinct.
        bias: ``[H]``, frozen, or None.

    Returns:
        ``[T, H]``, typed as in `gathered_rows`. Differentiable in ``x``.
    """
    y = _GatheredColumns.apply(x.to(compute_dtype(x, weight)), weight, index)
    return y if bias is None else y + bias.to(y.dtype)
