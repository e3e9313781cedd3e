"""A frozen gated MLP for all rows of a batch, dense rows on all channels and the others on kept ones.

As a chain of functions (`fork_rows`, three products, `gated_activation`, `kept_mlp`, `overlay_rows`) the same costs a
small batch more time on the host than it saves on the device. Rows do not meet in an MLP: backward computes the dense
ones on kept channels too, and writes over them.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional as F

from ..kernels.choice import choose
from .gate import activate, activate_backward
from .mlp import KeptChannels, MlpWeights, Slices, StandIn
from .once import once_differentiable

__all__ = ["FrozenMlp", "mixed_mlp"]


class FrozenMlp(NamedTuple):
    """A gated MLP of frozen weights.

    Args:
        inputs: weight and bias or None of gate and up, or of the one linear that is both, gate first.
        weights: the same by role, and down's.
        kind: activation, by its name in `activation_kind`.
        dtype: type of all products.
        stand_in: what takes the place of dropped channels, or None.
        kernels: as in `SparseLoraConfig`.
    """

    inputs: list[tuple[torch.Tensor, torch.Tensor | None]]
    weights: MlpWeights
    kind: str
    dtype: torch.dtype
    stand_in: StandIn | None
    kernels: str


# two functions: recomputation under checkpointing ends once the products are saved, before the last ones


class _MixedIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, mlp, rows, select):
        flat = x.reshape(-1, x.shape[-1]).to(mlp.dtype)
        few = flat.index_select(0, rows)
        products = [F.linear(few, *linear) for linear in mlp.inputs]
        hidden, way = activate(products, mlp.kind, mlp.kernels)  # [A, N]
        index, slices = select(flat, few, hidden)
        kept_way = choose("mlp", flat, flat.shape[1], index.shape[0], mlp.kernels)
        kept = KeptChannels.of(mlp.weights, index, mlp.stand_in, kept_way, slices)
        wide, kept_hidden = kept.enter(flat)  # [T, 2K], [T, K + r]
        ctx.save_for_backward(*products, wide)
        ctx.kept = kept, way, mlp, rows, x.shape, x.dtype
        return hidden, kept_hidden, kept

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_kept, _):
        *products, wide = ctx.saved_tensors
        kept, way, mlp, rows, shape, dtype = ctx.kept
        first, *rest = zip(activate_backward(grad, products, mlp.kind, way), mlp.inputs, strict=True)
        grad_few = first[0] @ first[1][0]
        for grad_product, (weight, _) in rest:
            grad_few.addmm_(grad_product, weight)
        grad_x = kept.enter_backward(grad_kept, wide).index_copy_(0, rows, grad_few)
        return grad_x.view(shape).to(dtype), None, None, None


class _MixedOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, kept_hidden, kept, rows, shape):
        ctx.kept = kept, rows
        y = kept.leave(kept_hidden)
        y.index_copy_(0, rows, F.linear(hidden, kept.weights.down, kept.weights.down_bias))
        # not a view, on which others could not write
        return torch.ops.aten._unsafe_view(y, shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        kept, rows = ctx.kept
        flat = grad.reshape(-1, grad.shape[-1])
        return flat.index_select(0, rows) @ kept.weights.down, kept.leave_backward(flat), None, None, None


def mixed_mlp(
    x: torch.Tensor,
    mlp: FrozenMlp,
    rows: torch.Tensor,
    select: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, Slices | None]],
) -> torch.Tensor:
    """Output of an MLP, ``rows`` with all channels and every other row with kept ones.

    Args:
        x: ``[..., H]``.
        mlp: the MLP.
        rows: int64 ``[A]``.
        select: from all rows ``[T, H]``, those with all channels ``[A, H]`` and their activations ``[A, N]`` to the
            channels to keep, int64 ``[K]``, distinct, and their slices, or None. It is called without gradients.

    Returns:
        ``[..., H]``, in the MLP's type. Differentiable in ``x``.
    """
    hidden, kept_hidden, kept = _MixedIn.apply(x, mlp, rows, select)
    return _MixedOut.apply(hidden, kept_hidden, kept, rows, x.shape)
