"""Scores of the SVD estimator: low-rank projection with its Gram matrix, and norms over tokens, two launches a set.

Sums over tokens are written by block and added up afterwards, in a fixed order: atomic additions would let two runs of
one seed choose different channels.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .blocks import activate, multiply
from .runtime import launch, numerics
from .tiles import Tile, cover

__all__ = [
    "MAX_RANK",
    "channel_norms",
    "gated_norms",
    "gated_norms_fwd_kernel",
    "gram_norms_fwd_kernel",
    "gram_options",
    "project_fwd_kernel",
]

MAX_RANK = 64  # a block holds all of a rank
_SPLITS = 16  # blocks that share the tokens of a set of channels


@triton.jit
def project_fwd_kernel(
    x_ptr,
    rows_ptr,
    down_ptr,
    out_ptr,
    T,
    H,
    R,
    stride_x,
    stride_down,
    PICKED: tl.constexpr,
    GRAM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``Z = X · downᵀ`` ``[T, R]``, or the block's share of ``ZᵀZ`` ``[blocks, BLOCK_N, BLOCK_N]``, in float32.

    X is all rows of a matrix, or those that are picked.
    """
    t = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.arange(0, BLOCK_N)
    tokens, is_t, is_r = t.to(tl.int64), t < T, r < R
    source = tl.load(rows_ptr + t, mask=is_t, other=0) if PICKED else tokens
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, H, BLOCK_K):
        h = start + tl.arange(0, BLOCK_K)
        is_h = h < H
        x = tl.load(x_ptr + source[:, None] * stride_x + h[None, :], mask=is_t[:, None] & is_h[None, :], other=0.0)
        down = tl.load(down_ptr + r[None, :] * stride_down + h[:, None], mask=is_h[:, None] & is_r[None, :], other=0.0)
        acc = multiply(x.to(down.dtype), down, acc, PRECISION, UPCAST)
    if GRAM:
        gram = tl.dot(tl.trans(acc), acc, input_precision="ieee")  # rows beyond T are zero
        place = r[:, None] * BLOCK_N + r[None, :]
        tl.store(out_ptr + tl.program_id(0).to(tl.int64) * BLOCK_N * BLOCK_N + place, gram)
    else:
        tl.store(out_ptr + tokens[:, None] * R + r[None, :], acc, mask=is_t[:, None] & is_r[None, :])


@triton.jit
def gram_norms_fwd_kernel(
    grams_ptr,
    up_ptr,
    out_ptr,
    BLOCKS,
    N,
    R,
    stride_up,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``√(b · G · b)`` for every row b of ``up`` ``[N, R]``, with G the sum of the blocks' shares."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    gram = tl.zeros((BLOCK_R, BLOCK_R), dtype=tl.float32)
    for block in range(BLOCKS):
        gram += tl.load(grams_ptr + block * BLOCK_R * BLOCK_R + r[:, None] * BLOCK_R + r[None, :])
    inside = (n < N)[:, None] & (r < R)[None, :]
    up = tl.load(up_ptr + n.to(tl.int64)[:, None] * stride_up + r[None, :], mask=inside, other=0.0).to(tl.float32)
    square = tl.sum(tl.dot(up, gram, input_precision="ieee") * up, axis=1)
    tl.store(out_ptr + n, tl.sqrt(tl.maximum(square, 0.0)), mask=n < N)


@triton.jit
def gated_norms_fwd_kernel(
    z_ptr,
    gate_ptr,
    up_ptr,
    gate_bias_ptr,
    up_bias_ptr,
    out_ptr,
    T,
    N,
    R,
    SPLIT,
    stride_gate,
    stride_up,
    BIASED: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Norm over a split's tokens of ``act(z_g · b_g) · z_u · b_u`` per channel: ``[splits, N]``; for NaN zero."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    is_n, is_r = n < N, r < R
    channels = n.to(tl.int64)
    inside = is_r[:, None] & is_n[None, :]
    gate = tl.load(gate_ptr + channels[None, :] * stride_gate + r[:, None], mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + channels[None, :] * stride_up + r[:, None], mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    first = tl.program_id(1) * SPLIT
    for start in range(first, tl.minimum(first + SPLIT, T), BLOCK_M):
        t = start + tl.arange(0, BLOCK_M)
        is_t = (t < tl.minimum(first + SPLIT, T))[:, None]
        z = z_ptr + t.to(tl.int64)[:, None] * (2 * R) + r[None, :]  # [T, R]
        g = tl.dot(tl.load(z, mask=is_t & is_r[None, :], other=0.0), gate, input_precision="tf32")  # [T, N]
        u = tl.dot(tl.load(z + R, mask=is_t & is_r[None, :], other=0.0), up, input_precision="tf32")
        if BIASED:
            g += tl.load(gate_bias_ptr + n, mask=is_n, other=0.0).to(tl.float32)[None, :]
            u += tl.load(up_bias_ptr + n, mask=is_n, other=0.0).to(tl.float32)[None, :]
        h = tl.where(is_t, activate(g, KIND) * u, 0.0)
        total += tl.sum(h * h, axis=0)
    norm = tl.where(total == total, tl.sqrt(total), 0.0)
    tl.store(out_ptr + tl.program_id(1).to(tl.int64) * N + n, norm, mask=is_n)


def _padded(rank: int) -> int:
    return max(16, 1 << (rank - 1).bit_length())


def gram_options(rank: int, tile: Tile) -> dict[str, Any]:
    """Block sizes and options of `gram_norms_fwd_kernel`; the Gram matrix of a large rank spills out of 4 warps."""
    padded = _padded(rank)
    return {"BLOCK_N": tile.n, "BLOCK_R": padded, "num_warps": 4 if padded <= 32 else 8, "num_stages": tile.stages}


def _project(
    x: torch.Tensor, down: torch.Tensor, tile: Tile, rows: torch.Tensor | None = None, *, gram: bool
) -> torch.Tensor:
    """Blocks' Gram matrices ``[blocks, padded r, padded r]`` or projected tokens ``[T, r]``."""
    (rank, hidden), tokens = down.shape, (x if rows is None else rows).shape[0]
    blocks, padded = cover(tokens, tile.m), _padded(rank)
    shape = (blocks, padded, padded) if gram else (tokens, rank)
    out = torch.empty(shape, dtype=torch.float32, device=x.device)
    options = {**tile.options(down.element_size()), "BLOCK_N": padded}
    launch(
        project_fwd_kernel,
        (blocks,),
        x,
        x,
        x if rows is None else rows,
        down,
        out,
        tokens,
        hidden,
        rank,
        x.stride(0),
        down.stride(0),
        PICKED=rows is not None,
        GRAM=gram,
        **options,
        **numerics(down.dtype),
    )
    return out


def channel_norms(x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, tile: Tile, norms_tile: Tile) -> torch.Tensor:
    """Norm over tokens of every channel of ``x · downᵀ · upᵀ``.

    Args:
        x: ``[T, H]``, columns contiguous.
        down: ``[r, H]``, r at most `MAX_RANK`.
        up: ``[N, r]``.
        tile: block sizes of the projection.
        norms_tile: of the second launch.

    Returns:
        float32 ``[N]``.
    """
    grams = _project(x, down, tile, gram=True)
    out = torch.empty(len(up), dtype=torch.float32, device=x.device)
    launch(
        gram_norms_fwd_kernel,
        (cover(len(up), norms_tile.n),),
        x,
        grams,
        up,
        out,
        len(grams),
        len(up),
        up.shape[1],
        up.stride(0),
        **gram_options(up.shape[1], norms_tile),
    )
    return out


def gated_norms(
    x: torch.Tensor,
    down: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    kind: str,
    tile: Tile,
    norms_tile: Tile,
    gate_bias: torch.Tensor | None = None,
    up_bias: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Norm over tokens of ``act(x · A_gᵀ · gateᵀ) ⊙ (x · A_uᵀ · upᵀ)`` per channel.

    Args:
        x: ``[T, H]``, columns contiguous.
        down: ``A_g`` over ``A_u``, ``[2r, H]``, 2r at most `MAX_RANK`.
        gate: ``[N, r]``.
        up: ``[N, r]``.
        kind: name of the activation.
        tile: block sizes of the projection.
        norms_tile: of the second launch.
        gate_bias: ``[N]`` or None; both biases are there or neither.
        up_bias: likewise.
        rows: int64 ``[C]``, the tokens that count; None is all.

    Returns:
        float32 ``[N]``, never NaN: parts of the tokens whose norm would be count for nothing.
    """
    z = _project(x, down, tile, rows, gram=False)
    (width, rank), tokens = gate.shape, z.shape[0]
    splits = min(_SPLITS, cover(max(1, tokens), norms_tile.m))
    norms = torch.empty(splits, width, dtype=torch.float32, device=x.device)
    launch(
        gated_norms_fwd_kernel,
        (cover(width, norms_tile.n), splits),
        x,
        z,
        gate,
        up,
        gate if gate_bias is None else gate_bias,
        up if up_bias is None else up_bias,
        norms,
        tokens,
        width,
        rank,
        cover(tokens, splits),
        gate.stride(0),
        up.stride(0),
        BIASED=gate_bias is not None,
        KIND=kind,
        BLOCK_R=_padded(rank),
        **norms_tile.options(),
    )
    return torch.linalg.vector_norm(norms, dim=0)
