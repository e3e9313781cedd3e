"""Closed-form fit of the stand-in for an MLP's dropped channels, on activations of the dense warm-up steps.

Reduced-rank ridge regression: with centred inputs ``X`` and targets ``Y``, ``B = (XᵀX + λI)⁻¹ XᵀY`` and the best
map of rank r is ``P R`` with ``R`` the leading right singular vectors of ``X B`` and ``P = B Rᵀ``. No training.

* For sets that change with the batch the targets are the activations ``h``, weighted by the column norms of
  `down_proj`, and kept channels correct the stand-in.
* For a fixed set the targets are what the dropped channels add to the MLP's output: nothing is left to correct.
"""

import dataclasses

import torch

from .ops.mlp import StandIn
from .ops.seeded import seeded

__all__ = ["Regression", "fit_fixed_set", "fit_stand_in", "reduced_rank"]

_RIDGES = (1e-3, 1e-2, 1e-1)  # relative to the mean variance of the inputs
_HELD_OUT = 8  # every eighth row judges the ridge


@dataclasses.dataclass(frozen=True)
class Regression:
    """``y ≈ mean + (x − shift) · inward · outward``, with ``inward`` ``[H, r]`` and ``outward`` ``[r, M]``."""

    shift: torch.Tensor
    mean: torch.Tensor
    inward: torch.Tensor
    outward: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Predict ``[n, M]`` from ``[n, H]``."""
        return self.mean + (x - self.shift) @ self.inward @ self.outward


def reduced_rank(x: torch.Tensor, y: torch.Tensor, rank: int, seed: int = 0) -> Regression:
    """Best linear map of a rank from ``x`` ``[n, H]`` to ``y`` ``[n, M]``, both float32; rank 0 is the mean.

    The ridge is the one of three that predicts every eighth row best from the others.
    """
    if rank == 0:
        empty = x.new_zeros(x.shape[1], 0), y.new_zeros(0, y.shape[1])
        return Regression(x.mean(0), y.mean(0), *empty)
    return _Moments.of(x, y).regression(rank, _best_ridge(x, y, rank, seed), seed)


def _best_ridge(x: torch.Tensor, y: torch.Tensor, rank: int, seed: int) -> float:
    judges = torch.arange(len(x), device=x.device) % _HELD_OUT == 0
    if judges.sum() < 2 or (~judges).sum() < 2:
        return _RIDGES[-1]
    others = _Moments.of(x[~judges], y[~judges])

    def error(ridge: float) -> float:
        return float((others.regression(rank, ridge, seed)(x[judges]) - y[judges]).square().sum())

    return min(_RIDGES, key=error)


@dataclasses.dataclass(frozen=True)
class _Moments:
    """What a regression needs to know of its sample: means, ``XᵀX / n`` ``[H, H]`` and ``XᵀY / n`` ``[H, M]``."""

    shift: torch.Tensor
    mean: torch.Tensor
    gram: torch.Tensor
    cross: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor, y: torch.Tensor) -> "_Moments":
        shift, mean = x.mean(0), y.mean(0)
        x, y = x - shift, y - mean
        return cls(shift, mean, x.t() @ x / len(x), x.t() @ y / len(x))

    def regression(self, rank: int, ridge: float, seed: int) -> Regression:
        gram, spread = self.gram.clone(), self.gram.diagonal().mean()
        gram.diagonal().add_(ridge * spread + torch.finfo(gram.dtype).tiny)
        factor = torch.linalg.cholesky(gram)
        # L⁻¹ XᵀY / n = Lᵀ B: the same right singular vectors as the predictions
        fitted = torch.linalg.solve_triangular(factor, self.cross, upper=False)
        with seeded(gram.device, seed):
            _, _, v = torch.svd_lowrank(fitted, q=min(rank + 8, *fitted.shape), niter=4)
        v = v[:, :rank]
        inward = torch.linalg.solve_triangular(factor.t(), fitted @ v, upper=True)
        return Regression(self.shift, self.mean, inward, v.t().contiguous())


def fit_stand_in(x: torch.Tensor, h: torch.Tensor, down: torch.Tensor, rank: int, seed: int = 0) -> StandIn:
    """Stand-in for sets that change: inputs ``[n, H]``, activations ``[n, N]``, `down_proj` ``[H, N]``, float32."""
    scale = down.norm(dim=0).clamp(min=torch.finfo(h.dtype).eps)
    fit = reduced_rank(x, h * scale, rank, seed)
    mean, channels = fit.mean / scale, fit.outward / scale
    return StandIn(
        project=fit.inward.t().contiguous(),
        shift=fit.shift @ fit.inward,
        output=channels @ down.t(),
        constant=down @ mean,
        mean=mean,
        channels=channels,
    )


def fit_fixed_set(
    x: torch.Tensor, h: torch.Tensor, down: torch.Tensor, index: torch.Tensor, rank: int, seed: int = 0
) -> StandIn:
    """Stand-in for what the channels outside the fixed set ``index`` add to the output; shapes as above."""
    dropped = h.clone()
    dropped[:, index] = 0
    fit = reduced_rank(x, dropped @ down.t(), rank, seed)
    return StandIn(
        project=fit.inward.t().contiguous(), shift=fit.shift @ fit.inward, output=fit.outward, constant=fit.mean
    )
