"""RMSNorm with its backward pass written out: a few passes over memory where autograd's chain of operators makes nine.

The forward pass is the module's own, bit for bit. Saved for backward is the input in its own type, without the copy in
float32 that a norm of half-precision states makes.
"""

from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable

__all__ = ["lean_rms_norm"]


class _LeanRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm, weight, offset, eps):
        ctx.save_for_backward(x)
        ctx.kept = weight, offset, eps
        return norm(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        weight, offset, eps = ctx.kept
        precise = torch.promote_types(x.dtype, torch.float32)
        gain = weight.to(precise) + offset if offset else weight.to(precise)
        scaled, wide = grad.to(precise) * gain, x.to(precise)
        inverse = (torch.linalg.vecdot(wide, wide) / x.shape[-1] + eps).rsqrt_().unsqueeze(-1)  # 1 / rms, [..., 1]
        along = torch.linalg.vecdot(scaled, wide).unsqueeze(-1) * inverse.pow(3) / x.shape[-1]
        return scaled.mul_(inverse).addcmul_(wide, along, value=-1).to(x.dtype), None, None, None, None


def lean_rms_norm(
    x: torch.Tensor,
    norm: Callable[[torch.Tensor], torch.Tensor],
    weight: torch.Tensor,
    offset: float,
    eps: float,
) -> torch.Tensor:
    """``x / sqrt(mean(x²) + eps) · (weight + offset)`` over the last dimension.

    Args:
        x: ``[..., H]``.
        norm: computes just that.
        weight: ``[H]``, frozen.
        offset: added to the weight: 0, or 1 where it is stored as a difference from 1.
        eps: as above.

    Returns:
        What `norm` makes of ``x``. Differentiable in ``x``.
    """
    return _LeanRmsNorm.apply(x, norm, weight, offset, eps)
