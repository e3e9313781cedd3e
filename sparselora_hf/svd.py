"""Truncated SVD of frozen weights, the training-free factors of the estimator (paper, section 3.2).

A weight ``W ≈ U S Vᵀ`` is kept as ``down = √S Vᵀ`` ``[r, in]`` and ``up = U √S`` ``[out, r]``: a rank-8 product
costs about 0.2 % of the full one at width 4096. Rank 8 needs no full SVD: a randomised range finder
(Halko et al., 2011) takes seconds for a whole 8B model.
"""

import dataclasses

import torch

from .ops.estimator import channel_norms
from .ops.seeded import seeded

__all__ = ["LowRank", "truncated_svd"]

_OVERSAMPLING = 8
_POWER_ITERATIONS = 4


@dataclasses.dataclass(frozen=True)
class LowRank:
    """Factors of a weight ``[out, in]``: ``W ≈ up · down`` with ``down`` ``[r, in]`` and ``up`` ``[out, r]``."""

    down: torch.Tensor
    up: torch.Tensor

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """``x · downᵀ``: ``[T, in]`` to ``[T, r]``."""
        return x.to(self.down.dtype) @ self.down.t()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Approximate product ``x Wᵀ``: ``[T, in]`` to ``[T, out]``."""
        return self.project(x) @ self.up.t()

    def channel_norms(self, x: torch.Tensor, kernels: str = "auto") -> torch.Tensor:
        """L2 norm over tokens of every output channel, ``[out]``."""
        return channel_norms(x, self.down, self.up, kernels)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "LowRank":
        """The factors on a device, in a type."""
        return LowRank(self.down.to(device, dtype), self.up.to(device, dtype))


@torch.no_grad()
def truncated_svd(weight: torch.Tensor, rank: int, seed: int = 0) -> LowRank:
    """Leading ``rank`` singular triplets of a weight ``[out, in]``, in float32.

    The same weight, rank and seed give the same factors, and the caller's random numbers are not disturbed.

    Raises:
        ValueError: the rank exceeds the weight's, or the weight holds NaN or infinity.
    """
    if rank > min(weight.shape):
        raise ValueError(
            f"rank {rank} exceeds the largest possible, {min(weight.shape)}, of a weight {tuple(weight.shape)}."
        )
    weight = weight.float()
    if not torch.isfinite(weight.sum()):
        raise ValueError("the weight holds NaN or infinity; the checkpoint is damaged: load it again.")
    with seeded(weight.device, seed), torch.autocast(weight.device.type, enabled=False):
        samples = min(rank + _OVERSAMPLING, *weight.shape)
        u, s, v = torch.svd_lowrank(weight, q=samples, niter=_POWER_ITERATIONS)
    root = s[:rank].sqrt()
    return LowRank(down=(v[:, :rank] * root).t().contiguous(), up=(u[:, :rank] * root).contiguous())
