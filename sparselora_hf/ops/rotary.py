"""Rotary position embedding of queries and keys as one function, its backward pass written out.

Half-split: dimension d turns with d + D/2. Forward and backward give what the families' chain of operators gives, bit
for bit: ``x · cos`` and ``rotate_half(x) · sin`` are rounded before they are added.
"""

import torch

from ..kernels.choice import Choice, choose
from ..kernels.runtime import kernels_of
from .once import once_differentiable

__all__ = ["lean_rotary", "turns"]


class _LeanRotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, way):
        ctx.save_for_backward(cos, sin)
        ctx.kept = q.dtype, way
        dtype = q.dtype if q.dtype is cos.dtype else torch.promote_types(q.dtype, cos.dtype)
        return _turned(q, k, cos, sin, dtype, way, backward=False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_q, grad_k):
        dtype, way = ctx.kept
        return *_turned(grad_q, grad_k, *ctx.saved_tensors, dtype, way, backward=True), None, None, None


def _turned(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    dtype: torch.dtype,
    way: Choice,
    backward: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    if way:
        return kernels_of("rotary").rotary(_along(q), _along(k), cos, sin, dtype, backward)
    cos, first, second = cos.unsqueeze(1), *sin.unsqueeze(1).chunk(2, -1)  # [B or 1, 1, T, D], halves of it
    if backward:
        first, second = -second, -first  # what a half gave to the other comes back times the same sine
    return _turn(q, cos, first, second, dtype), _turn(k, cos, first, second, dtype)


def _turn(
    x: torch.Tensor, cos: torch.Tensor, first: torch.Tensor, second: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    y = (x * cos).to(dtype)
    (x_first, x_second), (y_first, y_second) = x.chunk(2, -1), y.chunk(2, -1)
    y_first -= (x_second * first).to(dtype)
    y_second += (x_first * second).to(dtype)
    return y


def _along(x: torch.Tensor) -> torch.Tensor:
    """The same with its last dimension contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def turns(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """Whether `lean_rotary` takes these: shapes as it says, and no gradient asked for the angles."""
    if q.dim() != 4 or q.dtype is not k.dtype or cos.dtype is not sin.dtype or cos.requires_grad or sin.requires_grad:
        return False
    batch, _, tokens, width = q.shape
    angles = cos.shape
    return (
        angles == sin.shape
        and angles in ((batch, tokens, width), (1, tokens, width))
        and width % 2 == 0
        and k.shape == (batch, k.shape[1], tokens, width)
    )


def lean_rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, kernels: str | Choice = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x · cos + rotate_half(x) · sin`` of queries and of keys.

    Args:
        q: ``[B, HQ, T, D]``, D even.
        k: ``[B, HK, T, D]``, in the type of ``q``.
        cos: ``[B or 1, T, D]``, no gradient.
        sin: the same, in the type of ``cos``.
        kernels: as in `SparseLoraConfig`.

    Returns:
        Both turned, in the wider of the two types; differentiable in ``q`` and ``k``.
    """
    return _LeanRotary.apply(q, k, cos, sin, _way(q, k, cos, sin, kernels))


def _way(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, kernels: str | Choice) -> Choice:
    batch, heads, tokens, width = q.shape
    if cos.dtype not in (q.dtype, torch.float32) or cos.stride() != sin.stride() or cos.stride(-1) != 1:
        return Choice("torch")
    return choose("rotary", q, heads * width, k.shape[1] * width, kernels, tokens=batch * tokens)
