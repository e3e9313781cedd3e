"""Product of token rows with some rows or columns of a frozen weight: four products, one kernel.

With ``index`` the kept channels of a weight and ``rows`` the token rows in question, both read in place:

| product | index runs over | weight element of (n, k) |
|---|---|---|
| rows, forward: ``Y[rows, index] = X[rows] · W[index]ᵀ`` | N: output channels | ``W[index[n], k]`` |
| rows, backward: ``dX[rows] = dY[rows, index] · W[index]`` | K: input channels | ``W[index[k], n]`` |
| columns, forward: ``Y[rows] = X[rows, index] · W[:, index]ᵀ`` | K | ``W[n, index[k]]`` |
| columns, backward: ``dX[rows, index] = dY[rows] · W[:, index]`` | N | ``W[k, index[n]]`` |

Nothing is split, gathered or joined in memory: a tile of tokens is read through ``rows`` and written through it into
the joined output, whose other elements are left alone. Every second product reads weights across their rows, two
bytes at a time; there a slice that was gathered before (`slices.py`) is read instead (`INDEX_WEIGHT` false).
"""

import torch
import triton
import triton.language as tl

from .blocks import multiply
from .runtime import launch, numerics
from .tiles import Tile, cover

__all__ = ["gathered_product", "gathered_product_kernel"]


@triton.jit
def gathered_product_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    rows_ptr,
    index_ptr,
    M,
    N,
    K,
    stride_x,
    stride_weight_n,
    stride_weight_k,
    stride_out,
    INDEX_N: tl.constexpr,
    INDEX_WEIGHT: tl.constexpr,
    INDEX_TOKENS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile ``[BLOCK_M, BLOCK_N]`` of the output; see the table above for what `INDEX_N` selects."""
    # programs that follow each other share weights: GROUP_M tiles of tokens for each tile of channels
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // (GROUP_M * tiles_n)
    in_group = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    within = tl.program_id(0) % (GROUP_M * tiles_n)
    m = (group * GROUP_M + within % in_group) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (within // in_group) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_m, is_n = m < M, n < N
    tokens = m.to(tl.int64)
    if HAS_ROWS:
        tokens = tl.load(rows_ptr + m, mask=is_m, other=0)
    weight_n = n.to(tl.int64)
    out_n, bias_n = weight_n, weight_n
    if INDEX_N:
        kept_n = tl.load(index_ptr + n, mask=is_n, other=0)
        bias_n = kept_n
        weight_n = kept_n if INDEX_WEIGHT else weight_n
        out_n = kept_n if INDEX_TOKENS else out_n
    x_rows = x_ptr + tokens[:, None] * stride_x  # [M, 1]
    weight_columns = weight_ptr + weight_n[None, :] * stride_weight_n  # [1, N]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        is_k = k < K
        weight_k = k.to(tl.int64)
        x_k = weight_k
        if not INDEX_N:
            kept_k = tl.load(index_ptr + k, mask=is_k, other=0)
            weight_k = kept_k if INDEX_WEIGHT else weight_k
            x_k = kept_k if INDEX_TOKENS else x_k
        x = tl.load(x_rows + x_k[None, :], mask=is_m[:, None] & is_k[None, :], other=0.0)  # [M, K]
        weight = tl.load(
            weight_columns + weight_k[:, None] * stride_weight_k, mask=is_k[:, None] & is_n[None, :], other=0.0
        )  # [K, N]
        acc = multiply(x, weight.to(x.dtype), acc, PRECISION, UPCAST)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + bias_n, mask=is_n, other=0.0).to(tl.float32)[None, :]
    out = out_ptr + tokens[:, None] * stride_out + out_n[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=is_m[:, None] & is_n[None, :])


def gathered_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    index: torch.Tensor,
    out: torch.Tensor,
    tile: Tile,
    *,
    transposed: bool,
    over_outputs: bool,
    rows: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    index_weight: bool = True,
    index_tokens: bool = False,
) -> torch.Tensor:
    """Write one of the four products into ``out``.

    Args:
        x: tokens, ``[T, C]``, columns contiguous.
        weight: ``[A, B]``, columns contiguous; a slice of ``len(index)`` rows when `index_weight` is false.
        index: int64 ``[K]``, kept channels.
        out: ``[T, D]``, columns contiguous; elements that the product does not have are left alone.
        tile: block sizes.
        transposed: the weight's rows are output channels (``x · Wᵀ``), else input channels (``x · W``).
        over_outputs: ``index`` runs over output channels, else over input channels.
        rows: int64 token rows, or None for all.
        bias: one number per output channel of the whole weight, or None.
        index_weight: read the weight through ``index``.
        index_tokens: read ``x`` (or write ``out``) through ``index`` too: it has the full width.

    Returns:
        ``out``.
    """
    row_count, column_count = weight.shape
    outputs, inputs = (row_count, column_count) if transposed else (column_count, row_count)
    n, k = (len(index), inputs) if over_outputs else (outputs, len(index))
    m = len(x) if rows is None else len(rows)
    strides = (weight.stride(0), weight.stride(1))
    launch(
        gathered_product_kernel,
        (cover(m, tile.m) * cover(n, tile.n),),
        x,
        x,
        weight,
        bias if bias is not None else x,
        out,
        rows if rows is not None else index,
        index,
        m,
        n,
        k,
        x.stride(0),
        *(strides if transposed else strides[::-1]),
        out.stride(0),
        INDEX_N=over_outputs,
        INDEX_WEIGHT=index_weight,
        INDEX_TOKENS=index_tokens,
        HAS_ROWS=rows is not None,
        HAS_BIAS=bias is not None,
        GROUP_M=8,
        **tile.options(x.element_size()),
        **numerics(x.dtype),
    )
    return out
