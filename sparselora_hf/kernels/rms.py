"""RMSNorm of whole rows, both ways: a block reads its rows once and writes them once.

PyTorch's operators make a dozen passes over memory, half of them in float32. Rows up to `MAX_WIDTH` wide fit a block;
sums and products are in float32. Backward computes ``1 / rms`` anew from ``x``.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from .runtime import launch
from .tiles import cover, row_tile

__all__ = ["rms_norm_bwd", "rms_norm_bwd_kernel", "rms_norm_fwd", "rms_norm_fwd_kernel"]


@triton.jit
def rms_norm_fwd_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    T,
    H,
    eps,
    stride_x,
    OFFSET: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``x / rms(x) · (weight + OFFSET)`` of ``[T, H]``; `EARLY`: rounded before it meets the weight."""
    t = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    h = tl.arange(0, BLOCK_N)
    tokens, is_h = t.to(tl.int64)[:, None], h < H
    inside = (t < T)[:, None] & is_h[None, :]
    x = tl.load(x_ptr + tokens * stride_x + h[None, :], mask=inside, other=0.0).to(tl.float32)  # [T, H]
    gain = tl.load(weight_ptr + h, mask=is_h, other=0.0).to(tl.float32) + OFFSET
    normed = x * tl.rsqrt(tl.sum(x * x, 1) / H + eps)[:, None]
    narrow = x_ptr.dtype.element_ty
    if EARLY:
        normed = normed.to(narrow).to(tl.float32)
    tl.store(y_ptr + tokens * H + h[None, :], (normed * gain[None, :]).to(narrow), mask=inside)


@triton.jit
def rms_norm_bwd_kernel(
    grad_ptr,
    x_ptr,
    weight_ptr,
    grad_x_ptr,
    T,
    H,
    eps,
    stride_grad,
    stride_x,
    OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradient of ``x`` ``[T, H]``: what is scaled less its part along ``x``."""
    t = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    h = tl.arange(0, BLOCK_N)
    tokens, is_h = t.to(tl.int64)[:, None], h < H
    inside = (t < T)[:, None] & is_h[None, :]
    x = tl.load(x_ptr + tokens * stride_x + h[None, :], mask=inside, other=0.0).to(tl.float32)  # [T, H]
    scaled = tl.load(grad_ptr + tokens * stride_grad + h[None, :], mask=inside, other=0.0).to(tl.float32)
    scaled *= (tl.load(weight_ptr + h, mask=is_h, other=0.0).to(tl.float32) + OFFSET)[None, :]
    inverse = tl.rsqrt(tl.sum(x * x, 1) / H + eps)  # [T]
    along = tl.sum(scaled * x, 1) * inverse * inverse / H
    grad_x = (scaled - x * along[:, None]) * inverse[:, None]
    tl.store(grad_x_ptr + tokens * H + h[None, :], grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)


def rms_norm_fwd(x: torch.Tensor, weight: torch.Tensor, offset: float, eps: float, early: bool) -> torch.Tensor:
    """``x / sqrt(mean(x²) + eps) · (weight + offset)``.

    Args:
        x: ``[..., H]``, H up to `MAX_WIDTH`.
        weight: ``[H]``, contiguous.
        offset: added to the weight.
        eps: as above.
        early: whether the normalised values are rounded to the type of ``x`` before they meet the weight.

    Returns:
        ``[..., H]``, contiguous, in the type of ``x``.
    """
    (rows, tokens, stride), width = _rows(x), x.shape[-1]
    height, options = _options(width)
    y, sizes = x.new_empty(x.shape), (tokens, width, eps, stride)
    grid = (cover(tokens, height),)
    launch(rms_norm_fwd_kernel, grid, x, rows, weight, y, *sizes, OFFSET=offset, EARLY=early, **options)
    return y


def rms_norm_bwd(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, offset: float, eps: float) -> torch.Tensor:
    """Backward of `rms_norm_fwd`: the gradient of ``x``, contiguous, in its type."""
    (grad_rows, _, stride_grad), (rows, tokens, stride), width = _rows(grad), _rows(x), x.shape[-1]
    height, options = _options(width)
    grad_x, sizes = x.new_empty(x.shape), (tokens, width, eps, stride_grad, stride)
    grid = (cover(tokens, height),)
    launch(rms_norm_bwd_kernel, grid, x, grad_rows, rows, weight, grad_x, *sizes, OFFSET=offset, **options)
    return grad_x


@functools.cache
def _options(width: int) -> tuple[int, dict[str, Any]]:
    """Rows of a block, and how it is launched."""
    tile = row_tile(width)
    return tile.m, tile.options()


def _rows(x: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """``[..., H]`` with columns contiguous, the number of rows, and the distance from one to the next."""
    width = x.shape[-1]
    if not x.is_contiguous():
        x = x.reshape(-1, width)
        if x.stride(1) == 1:
            return x, x.shape[0], x.stride(0)
        x = x.contiguous()
    return x, x.numel() // width, width
