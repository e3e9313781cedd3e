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
    rank = min(rank, x.shape[1], y.shape[1])
    if rank == 0:
        empty = x.new_zeros(x.shape[1], 0), y.new_zeros(0, y.shape[1])
        return Regression(x.mean(0), y.mean(0), *empty)
    judges = torch.arange(len(x), device=x.device) % _HELD_OUT == 0
    ridge = _RIDGES[-1]
    if judges.sum() > 1 and (~judges).sum() > 1:
        trials = ((_solve(x[~judges], y[~judges], rank, ridge, seed), ridge) for ridge in _RIDGES)
        ridge = min(trials, key=lambda trial: float((trial[0](x[judges]) - y[judges]).square().sum()))[1]
    return _solve(x, y, rank, ridge, seed)


def _solve(x: torch.Tensor, y: torch.Tensor, rank: int, ridge: float, seed: int) -> Regression:
    shift, mean = x.mean(0), y.mean(0)
    x, y = x - shift, y - mean
    gram = x.t() @ x / len(x)
    gram.diagonal().add_(ridge * gram.diagonal().mean() + torch.finfo(x.dtype).tiny)
    factor = torch.linalg.cholesky(gram)
    weights = torch.cholesky_solve(x.t() @ y / len(x), factor)  # [H, M]
    fitted = factor.t() @ weights  # same right singular vectors as the predictions
    with seeded(x.device, seed):
        _, _, v = torch.svd_lowrank(fitted, q=min(rank + 8, *fitted.shape), niter=4)
    v = v[:, :rank]
    return Regression(shift, mean, weights @ v, v.t().contiguous())


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
