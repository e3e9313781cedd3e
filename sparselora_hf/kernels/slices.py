"""Slices of frozen weights, gathered contiguous in one launch, so that the library's product can take over.

What leads into an MLP comes out as ``[M K + r, H]``: kept rows of gate and up and the stand-in's projection. What
leads out comes as ``[K + r, H]``: kept columns of down, turned, and the stand-in's output map.
"""

import torch
import triton
import triton.language as tl

from .runtime import launch
from .tiles import Tile, cover

__all__ = ["gather_columns", "gather_columns_kernel", "gather_rows", "gather_rows_kernel"]


@triton.jit
def gather_rows_kernel(
    first_ptr,
    second_ptr,
    tail_ptr,
    index_ptr,
    out_ptr,
    K,
    R,
    H,
    stride_weight,
    stride_tail,
    SECOND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Rows ``index`` of one or two weights ``[N, H]``, one under the other, and a tail ``[R, H]``."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    h = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    kept = K
    is_h = (h < H)[None, :]
    in_first = row < K
    source = tl.load(index_ptr + row, mask=in_first, other=0)
    values = tl.load(
        first_ptr + source[:, None] * stride_weight + h[None, :], mask=in_first[:, None] & is_h, other=0.0
    )
    if SECOND:
        kept = 2 * K
        in_second = (row >= K) & (row < kept)
        source = tl.load(index_ptr + row - K, mask=in_second, other=0)
        second = second_ptr + source[:, None] * stride_weight + h[None, :]
        values = tl.where(in_first[:, None], values, tl.load(second, mask=in_second[:, None] & is_h, other=0.0))
    in_tail = (row >= kept) & (row < kept + R)
    tail = tail_ptr + (row - kept).to(tl.int64)[:, None] * stride_tail + h[None, :]
    values = tl.where((row < kept)[:, None], values, tl.load(tail, mask=in_tail[:, None] & is_h, other=0.0))
    out = out_ptr + row.to(tl.int64)[:, None] * H + h[None, :]
    tl.store(out, values, mask=(row < kept + R)[:, None] & is_h)


@triton.jit
def gather_columns_kernel(
    weight_ptr,
    tail_ptr,
    index_ptr,
    out_ptr,
    K,
    R,
    H,
    stride_weight,
    stride_tail,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Columns ``index`` of a weight ``[H, N]`` as rows, and a tail ``[R, H]`` under them."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    h = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_h = (h < H)[None, :]
    is_kept = row < K
    column = tl.load(index_ptr + row, mask=is_kept, other=0)
    source = weight_ptr + h.to(tl.int64)[None, :] * stride_weight + column[:, None]
    values = tl.load(source, mask=is_kept[:, None] & is_h, other=0.0)
    in_tail = (row >= K) & (row < K + R)
    tail = tail_ptr + (row - K).to(tl.int64)[:, None] * stride_tail + h[None, :]
    values = tl.where(is_kept[:, None], values, tl.load(tail, mask=in_tail[:, None] & is_h, other=0.0))
    tl.store(out_ptr + row.to(tl.int64)[:, None] * H + h[None, :], values, mask=(row < K + R)[:, None] & is_h)


def gather_rows(
    weights: tuple[torch.Tensor, ...], index: torch.Tensor, tile: Tile, tail: torch.Tensor | None = None
) -> torch.Tensor:
    """Rows ``index`` ``[K]`` of one or two weights ``[N, H]`` of the same strides, and a tail ``[r, H]`` or None.

    Returns:
        ``[M K + r, H]``, contiguous.
    """
    first, keep, rest = weights[0], index.shape[0], 0 if tail is None else tail.shape[0]
    height, hidden = len(weights) * keep + rest, first.shape[1]
    out = first.new_empty(height, hidden)
    launch(
        gather_rows_kernel,
        (cover(height, tile.m), cover(hidden, tile.n)),
        first,
        first,
        weights[-1],
        first if tail is None else tail,
        index,
        out,
        keep,
        rest,
        hidden,
        first.stride(0),
        0 if tail is None else tail.stride(0),
        SECOND=len(weights) == 2,
        **tile.options(),
    )
    return out


def gather_columns(
    weight: torch.Tensor, index: torch.Tensor, tile: Tile, tail: torch.Tensor | None = None
) -> torch.Tensor:
    """Columns ``index`` ``[K]`` of a weight ``[H, N]`` as rows, and a tail ``[r, H]`` or None: ``[K + r, H]``."""
    hidden, keep, rest = weight.shape[0], index.shape[0], 0 if tail is None else tail.shape[0]
    height = keep + rest
    out = weight.new_empty(height, hidden)
    launch(
        gather_columns_kernel,
        (cover(height, tile.m), cover(hidden, tile.n)),
        weight,
        weight,
        weight if tail is None else tail,
        index,
        out,
        keep,
        rest,
        hidden,
        weight.stride(0),
        0 if tail is None else tail.stride(0),
        **tile.options(),
    )
    return out
