"""Kept rows or columns of a weight stored in 4 bits (NF4), read and dequantised alone.

Two values share a byte, the earlier one in its upper half, and ``block`` values that follow each other row by row
share a scale. Rows touch only their own bytes and scales. Of a column every byte holds a neighbour and the scale is
another in each row, still a hundredth of what dequantising the whole weight would move.
"""

import torch
import triton
import triton.language as tl

from .runtime import launch
from .tiles import Tile, cover

__all__ = ["nf4_gather", "nf4_gather_kernel"]


@triton.jit
def nf4_gather_kernel(
    packed_ptr,
    scale_ptr,
    code_ptr,
    index_ptr,
    out_ptr,
    K,
    L,
    stride_kept,
    stride_along,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``[K, L]``: K kept rows (or columns) of L elements; strides count elements of the weight."""
    k = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    along = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (k < K)[:, None] & (along < L)[None, :]
    kept = tl.load(index_ptr + k, mask=k < K, other=0)
    place = kept[:, None] * stride_kept + along.to(tl.int64)[None, :] * stride_along  # [K, L]
    byte = tl.load(packed_ptr + place // 2, mask=inside, other=0).to(tl.int32)
    nibble = tl.where(place % 2 == 0, byte >> 4, byte & 15)
    scale = tl.load(scale_ptr + place // BLOCK, mask=inside, other=0.0)
    values = tl.load(code_ptr + nibble) * scale
    tl.store(out_ptr + k.to(tl.int64)[:, None] * L + along[None, :], values.to(out_ptr.dtype.element_ty), mask=inside)


def nf4_gather(
    packed: torch.Tensor,
    scales: torch.Tensor,
    code: torch.Tensor,
    shape: tuple[int, int],
    index: torch.Tensor,
    dtype: torch.dtype,
    tile: Tile,
    *,
    columns: bool = False,
    block: int = 64,
) -> torch.Tensor:
    """Rows ``index`` ``[K]`` of a 4-bit weight ``[A, B]``, or its columns as rows.

    Args:
        packed: uint8, ``A · B / 2`` bytes.
        scales: float32, one per block, ``A · B / block``.
        code: float32 ``[16]``, value of each 4-bit code.
        shape: ``(A, B)``.
        index: int64 ``[K]``.
        dtype: type of the result.
        tile: block sizes.
        columns: gather columns.
        block: values that share a scale, a power of 2.

    Returns:
        ``[K, B]``, or ``[K, A]`` with `columns`.
    """
    length = shape[0] if columns else shape[1]
    out = torch.empty(len(index), length, dtype=dtype, device=packed.device)
    launch(
        nf4_gather_kernel,
        (cover(len(index), tile.m), cover(length, tile.n)),
        packed,
        packed,
        scales,
        code,
        index,
        out,
        len(index),
        length,
        *((1, shape[1]) if columns else (shape[1], 1)),
        BLOCK=block,
        **tile.options(),
    )
    return out
