"""Frozen linears that read the same, and the LoRA branches on them, for all rows of a batch: one function.

Dense rows have all channels, context rows the kept ones, and the branch is added to both. As a chain of functions
(`fork_rows`, `context_linear`, `overlay_rows`, `fork_branch`, `add_branch`) the same costs a small batch more time on
the host than it saves on the device. Queries, keys and values share the product with their A matrices, and the
gradients that they give their input are summed as they are made.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

from .branch import Branch, branch_backward, cast
from .context import ContextPart, context_backward, context_forward
from .once import once_differentiable

__all__ = ["Frozen", "MixedRows", "projections"]


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


class Frozen(NamedTuple):
    """A frozen linear, and what goes with it.

    Args:
        weight: ``[out, in]``, of the type of the product.
        bias: ``[out]``, likewise, or None.
        branch: a LoRA branch on top, or None.
        rows: how rows are computed; None is all of them with all channels.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    branch: Branch | None = None
    rows: MixedRows | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in]`` to ``[..., out]``, no view, without the branch."""
        flat = x.reshape(-1, x.shape[-1])
        whole = self.rows is None
        y = F.linear(flat, self.weight, self.bias) if whole else self.rows.forward(flat, self.weight, self.bias)
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))  # a view others could not write on

    def backward(self, grad: torch.Tensor, onto: torch.Tensor | None) -> torch.Tensor:
        """Gradient ``[T, out]`` to ``[T, in]``, added to another one in place."""
        if self.rows is not None:
            grad_x = self.rows.backward(grad, self.weight)
            return grad_x if onto is None else onto.add_(grad_x)
        return torch.mm(grad, self.weight) if onto is None else onto.addmm_(grad, self.weight)


class _Projections(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, linears, dtype, *adapters):
        ctx.set_materialize_grads(False)
        wide = x.to(dtype)
        results = [linear.forward(wide) for linear in linears]
        scalings = [linear.branch.scaling for linear in linears if linear.branch is not None]
        ctx.linears = [linear._replace(branch=None) for linear in linears]  # what the branches hold is saved below
        ctx.types, ctx.scalings = (x.dtype, [adapter.dtype for adapter in (adapters[:1] + adapters[1::2])]), scalings
        if adapters:
            a, bs = _narrowed(adapters, dtype)
            hidden = torch.mm(wide.reshape(-1, x.shape[-1]), a.t())  # [T, all r]
            for y, part, b, scaling in zip(results, _parts(hidden, bs), bs, scalings, strict=True):
                y.view(-1, y.shape[-1]).addmm_(part, b.t(), alpha=scaling)
            ctx.save_for_backward(x, hidden, a, *bs)
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        shape = next((grad.shape[:-1] for grad in grads if grad is not None), None)
        if shape is None:
            return (None,) * len(ctx.needs_input_grad)
        grads = [None if grad is None else grad.reshape(-1, grad.shape[-1]) for grad in grads]
        grad_x, grad_adapters = None, []
        if ctx.needs_input_grad[0]:
            for grad, linear in zip(grads, ctx.linears, strict=True):
                grad_x = grad_x if grad is None else linear.backward(grad, grad_x)
        if ctx.scalings:
            x, hidden, a, *bs = ctx.saved_tensors
            grad_hidden, grad_bs = torch.empty_like(hidden), []
            parts = zip(_parts(hidden, bs), _parts(grad_hidden, bs), strict=True)
            for grad, b, scaling, (part, grad_part) in zip(grads, bs, ctx.scalings, parts, strict=True):
                grad_bs.append(None if grad is None else branch_backward(grad, part, b, scaling, grad_part))
                if grad is None:
                    grad_part.zero_()
            grad_a = torch.mm(grad_hidden.t(), x.reshape(-1, x.shape[-1]).to(hidden.dtype))
            grad_a, *grad_bs = cast([grad_a, *grad_bs], ctx.types[1])
            for part, grad_b in zip(_parts(grad_a.t(), bs), grad_bs, strict=True):
                grad_adapters += [part.t(), grad_b]
            if grad_x is not None:
                grad_x.addmm_(grad_hidden, a)
        grad_x = None if grad_x is None else grad_x.view(*shape, grad_x.shape[1]).to(ctx.types[0])
        return grad_x, None, None, *grad_adapters


def _narrowed(adapters: Sequence[torch.Tensor], dtype: torch.dtype) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """A matrices one under the other, ``[all r, in]``, and B matrices, in a type, from both by turns."""
    inward, outward = adapters[::2], adapters[1::2]
    if len(inward) == 1:
        a, b = cast(adapters, (dtype, dtype))
        return a, [b]
    heights = [a.shape[0] for a in inward]
    whole = inward[0].new_empty((sum(heights), inward[0].shape[1]), dtype=dtype)
    types = [dtype] * len(adapters)
    return whole, cast([*inward, *outward], types, whole.split_with_sizes(heights))[len(inward) :]


def _parts(hidden: torch.Tensor, bs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Columns of each branch, of which B is ``[out, r]``."""
    return (hidden,) if len(bs) == 1 else hidden.split_with_sizes([b.shape[1] for b in bs], 1)


def projections(x: torch.Tensor, linears: Sequence[Frozen], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """``x Wᵀ + bias`` of linears with the same input, context rows on their kept channels alone, LoRA branches on top.

    Args:
        x: ``[..., in]``.
        linears: one or several: all with a branch, their A matrices of one type, or all without.
        dtype: type of the products and of the results.

    Returns:
        ``[..., out]`` of each. Differentiable in ``x`` and in the branches' matrices.
    """
    adapters = [matrix for linear in linears if linear.branch is not None for matrix in linear.branch[:2]]
    return _Projections.apply(x, linears, dtype, *adapters)
