"""Rotary position embedding of queries and keys, both ways, in one launch: every element is read and written once.

A block turns some heads of one token. Roundings are those of PyTorch's chain: both products, and their sum.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from .runtime import launch
from .tiles import cover, rotary_tile

__all__ = ["rotary", "rotary_kernel"]


@triton.jit
def _turn(
    x_ptr, y_ptr, block, H, HALF, stride_h, cos, sin, cos_2, sin_2, d, BLOCK_M: tl.constexpr
):  # y is [H, 2 HALF], contiguous
    h = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (h < H)[:, None] & (d < HALF)[None, :]
    x = x_ptr + h.to(tl.int64)[:, None] * stride_h + d[None, :]
    first = tl.load(x, mask=inside, other=0.0).to(tl.float32)  # [M, N]
    second = tl.load(x + HALF, mask=inside, other=0.0).to(tl.float32)
    narrow = y_ptr.dtype.element_ty
    y = y_ptr + h[:, None] * (2 * HALF) + d[None, :]
    turned = (first * cos[None, :]).to(narrow).to(tl.float32) + (second * sin[None, :]).to(narrow).to(tl.float32)
    tl.store(y, turned.to(narrow), mask=inside)
    turned = (second * cos_2[None, :]).to(narrow).to(tl.float32) + (first * sin_2[None, :]).to(narrow).to(tl.float32)
    tl.store(y + HALF, turned.to(narrow), mask=inside)


@triton.jit
def rotary_kernel(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    turned_q_ptr,
    turned_k_ptr,
    T,
    HQ,
    HK,
    HALF,
    stride_q_b,
    stride_q_h,
    stride_q_t,
    stride_k_b,
    stride_k_h,
    stride_k_t,
    stride_cos_b,
    stride_cos_t,
    BACKWARD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``x · cos + rotate_half(x) · sin`` of ``[B, H, T, 2 HALF]`` into ``[B, T, H, 2 HALF]``, or its gradient."""
    t, b, block = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    d = tl.arange(0, BLOCK_N)
    angle = b * stride_cos_b + t * stride_cos_t + d
    cos = tl.load(cos_ptr + angle, mask=d < HALF, other=0.0).to(tl.float32)  # [N]
    cos_2 = tl.load(cos_ptr + angle + HALF, mask=d < HALF, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle, mask=d < HALF, other=0.0).to(tl.float32)
    sin_2 = tl.load(sin_ptr + angle + HALF, mask=d < HALF, other=0.0).to(tl.float32)
    if BACKWARD:
        sin, sin_2 = sin_2, -sin
    else:
        sin = -sin
    blocks = tl.cdiv(HQ, BLOCK_M)
    token = (b * T + t) * (2 * HALF)
    if block < blocks:
        q_ptr += b * stride_q_b + t * stride_q_t
        _turn(q_ptr, turned_q_ptr + token * HQ, block, HQ, HALF, stride_q_h, cos, sin, cos_2, sin_2, d, BLOCK_M)
    else:
        k_ptr += b * stride_k_b + t * stride_k_t
        block -= blocks
        _turn(k_ptr, turned_k_ptr + token * HK, block, HK, HALF, stride_k_h, cos, sin, cos_2, sin_2, d, BLOCK_M)


def rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype, backward: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn queries and keys, or their gradients back.

    Args:
        q: ``[B, HQ, T, D]``, its last dimension contiguous.
        k: ``[B, HK, T, D]``, the same, in the type of ``q``.
        cos: ``[B or 1, T, D]``, its last dimension contiguous.
        sin: the same, strides too.
        dtype: type of what comes out, to which everything is rounded.
        backward: whether q and k are gradients of what was turned.

    Returns:
        Shapes as they came in, in memory as ``[B, T, H, D]``, which is how projections give them and take them back.
    """
    batch, heads, tokens, width = q.shape
    heads_k = k.shape[1]
    blocks, options = _options(heads, heads_k, width // 2)
    turned_q, turned_k = (
        torch.empty_strided(
            (batch, each, tokens, width), (tokens * each * width, width, each * width, 1), dtype=dtype, device=q.device
        )
        for each in (heads, heads_k)
    )
    stride_cos_b, stride_cos_t, _ = cos.stride()
    launch(
        rotary_kernel,
        (tokens if width else 0, batch, blocks),
        q,
        q,
        k,
        cos,
        sin,
        turned_q,
        turned_k,
        tokens,
        heads,
        heads_k,
        width // 2,
        *q.stride()[:3],
        *k.stride()[:3],
        stride_cos_b if len(cos) > 1 else 0,
        stride_cos_t,
        BACKWARD=backward,
        **options,
    )
    return turned_q, turned_k


@functools.cache
def _options(heads: int, heads_k: int, half: int) -> tuple[int, dict[str, Any]]:
    """Blocks of a token, and how they are launched."""
    tile = rotary_tile(heads, half)
    # a fused product and sum would leave out one of the family's roundings
    options = {**tile.options(), "enable_fp_fusion": False}
    return cover(heads, tile.m) + cover(heads_k, tile.m), options
