"""The LoRA branch in two functions around the frozen product: ``y = x Wᵀ``, then ``y += scaling · (x Aᵀ) Bᵀ``.

As a chain of operators a branch makes several matrices as wide as ``x`` and ``y``, more of them under autocast, where
PEFT widens ``x`` to the type of the adapter and autocast narrows it again. Here it makes none: forward it is written
into ``y``, backward into the gradient that the frozen product gives ``x``.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .once import once_differentiable

__all__ = ["Branch", "add_branch", "branch_backward", "cast", "fork_branch"]


class Branch(NamedTuple):
    """``scaling · (x Aᵀ) Bᵀ`` with A ``[r, in]`` and B ``[out, r]``, of any type."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


class _ForkBranch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, a, dtype):
        ctx.set_materialize_grads(False)
        narrow = a.to(dtype)
        ctx.save_for_backward(x, narrow)
        ctx.type = a.dtype
        through = x.view_as(x)
        if not ctx.needs_input_grad[0]:  # else the frozen product would be asked for a gradient that nobody wants
            ctx.mark_non_differentiable(through)
        return through, x.reshape(-1, x.shape[-1]).to(dtype) @ narrow.t()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_hidden):
        x, a = ctx.saved_tensors
        if grad_hidden is None:
            return grad, None, None
        grad_a = (grad_hidden.t() @ x.reshape(-1, x.shape[-1]).to(a.dtype)).to(ctx.type)
        if not ctx.needs_input_grad[0]:
            return None, grad_a, None
        if grad is None:
            return (grad_hidden @ a).view(x.shape).to(x.dtype), grad_a, None
        if grad.dtype == a.dtype and grad.is_contiguous():
            # in place: it comes fresh out of the frozen product, nobody else holds it
            grad.view(-1, x.shape[-1]).addmm_(grad_hidden, a)
        else:
            grad = grad + (grad_hidden @ a).view(x.shape)
        return grad, grad_a, None


class _AddBranch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, hidden, b, scaling):
        narrow = b.to(hidden.dtype)
        ctx.save_for_backward(hidden, narrow)
        ctx.scaling, ctx.type = scaling, b.dtype
        ctx.mark_dirty(y)
        y.view(-1, y.shape[-1]).addmm_(hidden, narrow.t(), alpha=scaling)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden, b = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_b = branch_backward(grad.reshape(-1, grad.shape[-1]), hidden, b, ctx.scaling, grad_hidden)
        return grad, grad_hidden, grad_b.to(ctx.type), None


def branch_backward(
    grad: torch.Tensor, hidden: torch.Tensor, b: torch.Tensor, scaling: float, grad_hidden: torch.Tensor
) -> torch.Tensor:
    """Gradients in ``scaling · hidden bᵀ``.

    With `beta` 0 the first argument of `addmm` is not read, it gives its shape: the products come scaled.

    Args:
        grad: of the product, ``[T, out]``.
        hidden: ``[T, r]``.
        b: ``[out, r]``.
        scaling: of the branch.
        grad_hidden: gradient of ``hidden``, written to.

    Returns:
        Gradient of ``b``.
    """
    torch.addmm(hidden, grad, b, beta=0, alpha=scaling, out=grad_hidden)
    return torch.addmm(b, grad.t(), hidden, beta=0, alpha=scaling)


def cast(
    tensors: Sequence[torch.Tensor | None], dtypes: Sequence[torch.dtype], places: Sequence[torch.Tensor] = ()
) -> list[torch.Tensor | None]:
    """Tensors in other types, by one launch a type on a GPU.

    Args:
        tensors: any of them may be None.
        dtypes: of each.
        places: where the first of them go.

    Returns:
        The tensors; those of their type already, and None, as they are.
    """
    casts, by_type = list(places), {}  # some versions write as if all were of the first's type
    for number, (tensor, dtype) in enumerate(zip(tensors, dtypes, strict=True)):
        if number >= len(places):
            same = tensor is None or tensor.dtype is dtype
            casts.append(tensor if same else torch.empty_like(tensor, dtype=dtype))
        if casts[number] is not tensor:
            new, old = by_type.setdefault(dtype, ([], []))
            new.append(casts[number])
            old.append(tensor)
    for new, old in by_type.values():
        torch._foreach_copy_(new, old)
    return casts


def fork_branch(x: torch.Tensor, a: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` itself, for the frozen product and nothing else, and what the branch makes of it.

    Args:
        x: ``[..., in]``.
        a: ``[r, in]``, of any type.
        dtype: type of the branch's products.

    Returns:
        ``x``, whose gradient is written to in backward, and ``x Aᵀ``, ``[T, r]``. Differentiable in both arguments.
    """
    return _ForkBranch.apply(x, a, dtype)


def add_branch(y: torch.Tensor, hidden: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """A frozen linear's result with a LoRA branch added, in place.

    Args:
        y: ``[..., out]``, contiguous, of the type of ``hidden``, no view and of no further use to anyone.
        hidden: ``[T, r]`` of `fork_branch`.
        b: ``[out, r]``, of any type.
        scaling: of the branch.

    Returns:
        ``[..., out]``. Differentiable in all three.
    """
    return _AddBranch.apply(y, hidden, b, scaling)
