"""A frozen linear of attention and the LoRA branch on it, for all rows of a batch, as one function.

Dense rows have all channels, context rows the kept ones, and the branch is added to both. As a chain of functions
(`fork_rows`, `context_linear`, `overlay_rows`, `fork_branch`, `add_branch`) the same costs a small batch more time on
the host than it saves on the device.
"""

import dataclasses

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .branch import Branch, branch_backward
from .context import ContextPart, context_backward, context_forward

__all__ = ["MixedRows", "projection"]


@dataclasses.dataclass(frozen=True)
class MixedRows:
    """How the rows of a batch go through a linear.

    Args:
        dense: int64 ``[A]``, rows that have all channels.
        part: context rows and their channels.
        stand_in: factors ``[r, in]`` and ``[out, r]`` for the dropped channels, or None.
    """

    dense: torch.Tensor
    part: ContextPart
    stand_in: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``[T, in]`` to ``[T, out]``."""
        y = context_forward(x, weight, bias, self.part)
        if self.stand_in is not None:
            down, up = self.stand_in
            y.addmm_(x @ down.t(), up.t())
        return y.index_copy_(0, self.dense, F.linear(x.index_select(0, self.dense), weight, bias))

    def backward(self, grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Gradient ``[T, out]`` to ``[T, in]``."""
        grad_x = context_backward(grad, weight, self.part, weight.shape[1])
        if self.stand_in is not None:
            down, up = self.stand_in
            grad_x.addmm_(grad @ up, down)
        return grad_x.index_copy_(0, self.dense, grad.index_select(0, self.dense) @ weight)


class _Projection(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, a, b, frozen, branch, rows, dtype):
        weight, bias = frozen
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        y = F.linear(flat, weight, bias) if rows is None else rows.forward(flat, weight, bias)
        ctx.kept = weight, branch, rows, dtype, x.dtype
        if branch is not None:
            narrow = a.to(dtype), b.to(dtype)
            hidden = torch.mm(flat, narrow[0].t())  # [T, r]
            y.addmm_(hidden, narrow[1].t(), alpha=branch.scaling)
            ctx.save_for_backward(x, hidden, *narrow)
        # not a view, on which others could not write
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        weight, branch, rows, dtype, type_of_x = ctx.kept
        shape, flat = (*grad.shape[:-1], weight.shape[1]), grad.reshape(-1, grad.shape[-1])
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.mm(flat, weight) if rows is None else rows.backward(flat, weight)
        if branch is not None:
            x, hidden, a, b = ctx.saved_tensors
            grad_hidden, grad_b = branch_backward(flat, hidden, b, branch.scaling)
            grad_a = torch.mm(grad_hidden.t(), x.reshape(-1, x.shape[-1]).to(dtype)).to(branch.a.dtype)
            grad_b = grad_b.to(branch.b.dtype)
            if grad_x is not None:
                grad_x.addmm_(grad_hidden, a)
        grad_x = None if grad_x is None else grad_x.view(shape).to(type_of_x)
        return grad_x, grad_a, grad_b, None, None, None, None


def projection(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    branch: Branch | None = None,
    rows: MixedRows | None = None,
) -> torch.Tensor:
    """``x Wᵀ + bias``, context rows on their kept channels alone, and a LoRA branch on top.

    Args:
        x: ``[..., in]``.
        weight: ``[out, in]``, frozen, of the type of the product.
        bias: ``[out]``, frozen, likewise, or None.
        dtype: type of the product and of the result.
        branch: the branch, or None.
        rows: how rows are computed; None is all of them with all channels.

    Returns:
        ``[..., out]``. Differentiable in ``x`` and in the branch's matrices.
    """
    a, b = (None, None) if branch is None else (branch.a, branch.b)
    return _Projection.apply(x, a, b, (weight, bias), branch, rows, dtype)
