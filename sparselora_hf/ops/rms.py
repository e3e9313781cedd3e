"""RMSNorm with its backward pass written out: a few passes over memory where autograd's chain of operators makes nine.

The forward pass is the module's own, bit for bit, or a kernel's that rounds where the module does. Saved for backward
is the input in its own type, without the copy in float32 that a norm of half-precision states makes.
"""

from collections.abc import Callable

import torch

from ..kernels.choice import Choice, choose
from ..kernels.runtime import kernels_of
from ..kernels.tiles import MAX_WIDTH
from .once import once_differentiable

__all__ = ["lean_rms_norm"]


class _LeanRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm, weight, offset, eps, early, way):
        ctx.save_for_backward(x)
        ctx.kept = weight, offset, eps, way
        if way and early is not None:
            return kernels_of("rms").rms_norm_fwd(x, weight, offset, eps, early)
        return norm(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        weight, offset, eps, way = ctx.kept
        return _backward(grad, x, weight, offset, eps, way), None, None, None, None, None, None


def _backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, offset: float, eps: float, way: Choice
) -> torch.Tensor:
    if way:
        return kernels_of("rms").rms_norm_bwd(grad, x, weight, offset, eps)
    precise = torch.promote_types(x.dtype, torch.float32)
    gain = weight.to(precise) + offset if offset else weight.to(precise)
    scaled, wide = grad.to(precise) * gain, x.to(precise)
    inverse = (torch.linalg.vecdot(wide, wide) / x.shape[-1] + eps).rsqrt_().unsqueeze(-1)  # 1 / rms, [..., 1]
    along = torch.linalg.vecdot(scaled, wide).unsqueeze(-1) * inverse.pow(3) / x.shape[-1]
    return scaled.mul_(inverse).addcmul_(wide, along, value=-1).to(x.dtype)


def lean_rms_norm(
    x: torch.Tensor,
    norm: Callable[[torch.Tensor], torch.Tensor],
    weight: torch.Tensor,
    offset: float,
    eps: float,
    early: bool | None = None,
    kernels: str | Choice = "auto",
) -> torch.Tensor:
    """``x / sqrt(mean(x²) + eps) · (weight + offset)`` over the last dimension.

    Args:
        x: ``[..., H]``.
        norm: computes just that.
        weight: ``[H]``, frozen.
        offset: added to the weight: 0, or 1 where it is stored as a difference from 1.
        eps: as above.
        early: where a kernel may take the place of `norm`, whether `norm` rounds the normalised values before they
            meet the weight, or the product alone; None where it may not.
        kernels: as in `SparseLoraConfig`.

    Returns:
        What `norm` makes of ``x``; by a kernel, the same to one rounding. Differentiable in ``x``.
    """
    return _LeanRmsNorm.apply(x, norm, weight, offset, eps, early, _way(x, weight, kernels))


def _way(x: torch.Tensor, weight: torch.Tensor, kernels: str | Choice) -> Choice:
    width = x.shape[-1]
    if x.dtype != weight.dtype or width > MAX_WIDTH:
        return Choice("torch")
    return choose("norm", x, width, width, kernels, tokens=x.numel() // width)
