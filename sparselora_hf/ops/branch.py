"""The LoRA branch as one function: ``y + scaling · (x Aᵀ) Bᵀ``, written into ``y``.

As a chain of operators it makes three matrices as wide as ``y`` forward and two backward; here it makes none and one.
"""

import torch
from torch.autograd.function import once_differentiable

__all__ = ["add_branch"]


class _AddBranch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, x, a, b, scaling):
        hidden = x.reshape(-1, x.shape[-1]) @ a.t()  # [T, r]
        ctx.save_for_backward(x, hidden, a, b)
        ctx.scaling = scaling
        ctx.mark_dirty(y)
        y.view(-1, y.shape[-1]).addmm_(hidden, b.t(), alpha=scaling)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, hidden, a, b = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        grad_hidden = (flat @ b).mul_(ctx.scaling)
        grad_x = (grad_hidden @ a).view(x.shape) if ctx.needs_input_grad[1] else None
        grad_a = grad_hidden.t() @ x.reshape(-1, x.shape[-1])
        return grad, grad_x, grad_a, (flat.t() @ hidden).mul_(ctx.scaling), None


def add_branch(y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """A frozen linear's result with a LoRA branch added, in place.

    Args:
        y: ``[..., out]``, contiguous, no view and of no further use to anyone.
        x: ``[..., in]``.
        a: ``[r, in]``.
        b: ``[out, r]``.
        scaling: of the branch.

    Returns:
        ``[..., out]``. Differentiable in all four.
    """
    return _AddBranch.apply(y, x, a, b, scaling)
