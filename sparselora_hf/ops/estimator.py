"""Norms over tokens of what a low-rank estimator predicts, per channel. No gradient flows through them."""

import torch

from ..kernels.choice import Choice, choose
from ..kernels.runtime import kernels_of
from ..kernels.tiles import tile_for

__all__ = ["channel_norms", "gated_norms"]


def channel_norms(
    x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, kernels: str | Choice = "auto"
) -> torch.Tensor:
    """L2 norm over tokens of every channel of ``x · downᵀ · upᵀ``, through the r × r Gram matrix alone.

    ``‖(Z Bᵀ)_c‖² = b_c · ZᵀZ · b_c``: exact, and no token × channel matrix is formed.

    Args:
        x: ``[T, H]``.
        down: ``[r, H]``.
        up: ``[N, r]``.
        kernels: as in `SparseLoraConfig`.

    Returns:
        ``[N]``, in float32 or better.
    """
    way = choose("estimator", x, x.shape[1], len(down), kernels)
    if way and _fits(len(down)):
        fused = kernels_of("estimator").channel_norms
        return fused(_rows_contiguous(x), down, up, tile_for("project", down, way.tile), tile_for("norms", down))
    z, up = (x.to(down.dtype) @ down.t()).float(), up.float()
    with torch.autocast(x.device.type, enabled=False):  # sums over all tokens do not fit float16
        return ((up @ (z.t() @ z)) * up).sum(1).clamp(min=0).sqrt()


def gated_norms(
    x: torch.Tensor,
    down: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    biases: tuple[torch.Tensor | None, torch.Tensor | None],
    kind: str | None,
    kernels: str | Choice = "auto",
    rows: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Norm over tokens of ``act(gate) ⊙ up`` of two low-rank products, by a kernel.

    Args:
        x: ``[T, H]``.
        down: inward factors ``[r, H]`` of gate and of up, one under the other.
        gate: outward factor ``[N, r]`` of gate.
        up: likewise.
        biases: of gate and up.
        kind: name of the activation, or None.
        kernels: as in `SparseLoraConfig`.
        rows: int64 ``[C]``, the tokens that count; None is all.

    Returns:
        float32 ``[N]``, or None where no kernel does it and the activations are to be formed.
    """
    rank = down.shape[0]
    way = choose("estimator", x, x.shape[1], rank, kernels, None if rows is None else rows.shape[0])
    one_bias = (biases[0] is None) != (biases[1] is None)
    if not way or kind is None or one_bias or not _fits(rank):
        return None
    fused = kernels_of("estimator").gated_norms
    tiles = tile_for("project", down, way.tile), tile_for("norms", down)
    return fused(_rows_contiguous(x), down, gate, up, kind, *tiles, *biases, rows)


def _fits(rank: int) -> bool:
    return rank <= kernels_of("estimator").MAX_RANK


def _rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(1) == 1 else x.contiguous()
