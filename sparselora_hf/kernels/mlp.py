"""The MLP on its kept channels: gate, up and activation in one launch, and the activation alone, both ways.

Roundings are those of PyTorch's chain: the activated gate takes the type of the tensors before it meets up.

After the fused kernel there is one gather (`slices.py`) and one product left of the forward pass: three launches.
Backward needs the products of the slices anyway, so there only the activation is ours. Its derivative could close the
product before it, but the tile ``[T, K]`` it would save is a hundredth of what that product reads.
"""

import torch
import triton
import triton.language as tl

from .blocks import activate, activate_grad, multiply
from .runtime import launch, numerics
from .tiles import Tile, cover

__all__ = [
    "mlp_activation_bwd",
    "mlp_activation_bwd_kernel",
    "mlp_activation_fwd",
    "mlp_activation_fwd_kernel",
    "mlp_in_fwd",
    "mlp_in_fwd_kernel",
]


@triton.jit
def mlp_in_fwd_kernel(
    x_ptr,
    gate_ptr,
    up_ptr,
    gate_bias_ptr,
    up_bias_ptr,
    index_ptr,
    wide_ptr,
    hidden_ptr,
    T,
    H,
    K,
    stride_x,
    stride_weight,
    stride_wide,
    stride_hidden,
    GATED: tl.constexpr,
    BIASED: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Products with kept rows of gate and up, both written, and ``act(gate) ⊙ up``; without a gate ``act(up)``."""
    t = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_t, is_c = t < T, c < K
    channels = tl.load(index_ptr + c, mask=is_c, other=0)
    tokens = t.to(tl.int64)
    x_rows = x_ptr + tokens[:, None] * stride_x  # [T, 1]
    weight_rows = channels[None, :] * stride_weight  # [1, K]
    gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, H, BLOCK_K):
        h = start + tl.arange(0, BLOCK_K)
        is_h = h < H
        x = tl.load(x_rows + h[None, :], mask=is_t[:, None] & is_h[None, :], other=0.0)  # [T, H]
        inside = is_h[:, None] & is_c[None, :]
        up = multiply(x, tl.load(up_ptr + weight_rows + h[:, None], mask=inside, other=0.0), up, PRECISION, UPCAST)
        if GATED:
            weight = tl.load(gate_ptr + weight_rows + h[:, None], mask=inside, other=0.0)  # [H, K]
            gate = multiply(x, weight, gate, PRECISION, UPCAST)
    if BIASED:
        up += tl.load(up_bias_ptr + channels, mask=is_c, other=0.0).to(tl.float32)[None, :]
        if GATED:
            gate += tl.load(gate_bias_ptr + channels, mask=is_c, other=0.0).to(tl.float32)[None, :]
    inside = is_t[:, None] & is_c[None, :]
    narrow = wide_ptr.dtype.element_ty
    wide = wide_ptr + tokens[:, None] * stride_wide + c[None, :]  # [T, 2K] or [T, K]
    # rounded first: the activation is that of what backward will read
    up = up.to(narrow)
    if GATED:
        gate = gate.to(narrow)
        tl.store(wide, gate, mask=inside)
        tl.store(wide + K, up, mask=inside)
        hidden = activate(gate.to(tl.float32), KIND).to(narrow).to(tl.float32) * up.to(tl.float32)
    else:
        tl.store(wide, up, mask=inside)
        hidden = activate(up.to(tl.float32), KIND)
    tl.store(hidden_ptr + tokens[:, None] * stride_hidden + c[None, :], hidden.to(narrow), mask=inside)


@triton.jit
def mlp_activation_fwd_kernel(
    gate_ptr,
    up_ptr,
    given_up_ptr,
    hidden_ptr,
    T,
    K,
    R,
    stride_gate,
    stride_up,
    stride_given_up,
    stride_hidden,
    GATED: tl.constexpr,
    CORRECTED: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gate ``[T, K]`` and up ``[T, K + R]`` to ``[T, K + R]``: activations less ``given_up``, then up's last R."""
    t = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens, is_t = t.to(tl.int64), t < T
    is_kept = is_t[:, None] & (c < K)[None, :]
    inside = is_t[:, None] & (c < K + R)[None, :]
    up = tl.load(up_ptr + tokens[:, None] * stride_up + c[None, :], mask=inside, other=0.0)  # [T, K + R]
    narrow = up.dtype
    up = up.to(tl.float32)
    if GATED:
        gate = tl.load(gate_ptr + tokens[:, None] * stride_gate + c[None, :], mask=is_kept, other=0.0)  # [T, K]
        hidden = activate(gate.to(tl.float32), KIND).to(narrow).to(tl.float32) * up
    else:
        hidden = activate(up, KIND)
    if CORRECTED:
        given_up = tl.load(given_up_ptr + tokens[:, None] * stride_given_up + c[None, :], mask=is_kept, other=0.0)
        hidden -= given_up.to(tl.float32)
    out = hidden_ptr + tokens[:, None] * stride_hidden + c[None, :]
    tl.store(out, tl.where(is_kept, hidden, up).to(narrow), mask=inside)


@triton.jit
def mlp_activation_bwd_kernel(
    grad_ptr,
    gate_ptr,
    up_ptr,
    given_up_ptr,
    grad_gate_ptr,
    grad_up_ptr,
    T,
    K,
    R,
    stride_grad,
    stride_gate,
    stride_up,
    stride_given_up,
    stride_grad_gate,
    stride_grad_up,
    GATED: tl.constexpr,
    CORRECTED: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradient ``[T, K + R]`` to that of gate ``[T, K]`` and up ``[T, K + R]``; z loses ``given_up`` ``[T, R]``."""
    t = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens, is_t = t.to(tl.int64), t < T
    is_kept = is_t[:, None] & (c < K)[None, :]
    inside = is_t[:, None] & (c < K + R)[None, :]
    grad = tl.load(grad_ptr + tokens[:, None] * stride_grad + c[None, :], mask=inside, other=0.0)  # [T, K + R]
    narrow = grad.dtype
    grad = grad.to(tl.float32)
    up = tl.load(up_ptr + tokens[:, None] * stride_up + c[None, :], mask=is_kept, other=0.0).to(tl.float32)  # [T, K]
    if GATED:
        gate = tl.load(gate_ptr + tokens[:, None] * stride_gate + c[None, :], mask=is_kept, other=0.0)  # [T, K]
        gate = gate.to(tl.float32)
        grad_gate = (grad * up).to(narrow).to(tl.float32) * activate_grad(gate, KIND)
        grad_gate_rows = grad_gate_ptr + tokens[:, None] * stride_grad_gate
        tl.store(grad_gate_rows + c[None, :], grad_gate.to(narrow), mask=is_kept)
        grad_up = grad * activate(gate, KIND).to(narrow).to(tl.float32)
    else:
        grad_up = grad * activate_grad(up, KIND)
    if CORRECTED:
        given_up = given_up_ptr + tokens[:, None] * stride_given_up + (c[None, :] - K)
        grad -= tl.load(given_up, mask=inside & (c >= K)[None, :], other=0.0).to(tl.float32)
    out = grad_up_ptr + tokens[:, None] * stride_grad_up + c[None, :]
    tl.store(out, tl.where(is_kept, grad_up, grad).to(narrow), mask=inside)


def mlp_in_fwd(
    x: torch.Tensor,
    gate: torch.Tensor | None,
    up: torch.Tensor,
    index: torch.Tensor,
    kind: str,
    tile: Tile,
    gate_bias: torch.Tensor | None = None,
    up_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Products and activations at kept width.

    Args:
        x: ``[T, H]``, columns contiguous.
        gate: ``[N, H]``, or None.
        up: ``[N, H]``, strides as gate's.
        index: int64 ``[K]``.
        kind: name of the activation.
        tile: block sizes.
        gate_bias: ``[N]`` or None; both biases are there or neither.
        up_bias: likewise.

    Returns:
        ``[T, 2K]`` (``[T, K]`` without a gate) and ``[T, K]``.
    """
    (tokens, depth), keep = x.shape, index.shape[0]
    wide = x.new_empty(tokens, keep if gate is None else 2 * keep)
    hidden = x.new_empty(tokens, keep)
    launch(
        mlp_in_fwd_kernel,
        (cover(tokens, tile.m), cover(keep, tile.n)),
        x,
        x,
        up if gate is None else gate,
        up,
        x if gate_bias is None else gate_bias,
        x if up_bias is None else up_bias,
        index,
        wide,
        hidden,
        tokens,
        depth,
        keep,
        x.stride(0),
        up.stride(0),
        wide.stride(0),
        hidden.stride(0),
        GATED=gate is not None,
        BIASED=up_bias is not None,
        KIND=kind,
        **tile.options(x.element_size()),
        **numerics(x.dtype),
    )
    return wide, hidden


def mlp_activation_fwd(
    gate: torch.Tensor | None,
    up: torch.Tensor,
    keep: int,
    kind: str,
    tile: Tile,
    given_up: torch.Tensor | None = None,
) -> torch.Tensor:
    """Activations of products.

    Args:
        gate: ``[T, K]``, columns contiguous, or None.
        up: ``[T, K + r]``, columns contiguous; the last r are passed on as they are.
        keep: K.
        kind: name of the activation.
        tile: block sizes.
        given_up: ``[T, K]``, taken off the activations, or None.

    Returns:
        ``[T, K + r]``.
    """
    tokens, width = up.shape
    hidden = up.new_empty(tokens, width)
    launch(
        mlp_activation_fwd_kernel,
        (cover(tokens, tile.m), cover(width, tile.n)),
        up,
        up if gate is None else gate,
        up,
        up if given_up is None else given_up,
        hidden,
        tokens,
        keep,
        width - keep,
        0 if gate is None else gate.stride(0),
        up.stride(0),
        0 if given_up is None else given_up.stride(0),
        hidden.stride(0),
        GATED=gate is not None,
        CORRECTED=given_up is not None,
        KIND=kind,
        **tile.options(),
    )
    return hidden


def mlp_activation_bwd(
    grad: torch.Tensor,
    gate: torch.Tensor | None,
    up: torch.Tensor,
    grad_gate: torch.Tensor | None,
    grad_up: torch.Tensor,
    kind: str,
    tile: Tile,
    given_up: torch.Tensor | None = None,
) -> None:
    """Backward of `mlp_activation_fwd`; columns of all matrices are contiguous.

    Args:
        grad: ``[T, K + r]``.
        gate: ``[T, K]``, or None.
        up: its first K columns.
        grad_gate: takes the gradient of gate, ``[T, K]``; None without a gate.
        grad_up: takes that of up, ``[T, K + r]``.
        kind: name of the activation.
        tile: block sizes.
        given_up: ``[T, r]``, taken off the gradient of the last r columns, or None.
    """
    (tokens, width), keep = grad.shape, up.shape[1]
    launch(
        mlp_activation_bwd_kernel,
        (cover(tokens, tile.m), cover(width, tile.n)),
        grad,
        grad,
        up if gate is None else gate,
        up,
        grad if given_up is None else given_up,
        grad_up if grad_gate is None else grad_gate,
        grad_up,
        tokens,
        keep,
        width - keep,
        grad.stride(0),
        0 if gate is None else gate.stride(0),
        up.stride(0),
        0 if given_up is None else given_up.stride(0),
        0 if grad_gate is None else grad_gate.stride(0),
        grad_up.stride(0),
        GATED=gate is not None,
        CORRECTED=given_up is not None,
        KIND=kind,
        **tile.options(),
    )
