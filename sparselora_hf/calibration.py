"""What dense warm-up steps taught: fixed scores, whitened factors and stand-ins, fitted once when sparsity starts.

Belongs to the run: it is saved with the checkpoint, restored on resume, and never part of the adapter.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import torch

from .channels import top_channels
from .config import SparseLoraConfig
from .distributed import agree
from .ops.mlp import StandIn
from .ops.quant import frozen_weight, read_whole
from .reservoir import Reservoir
from .standin import fit_fixed_set, fit_stand_in
from .svd import LowRank, truncated_svd
from .views import AttentionView, MlpView, Projection, base_linear

__all__ = ["Calibration"]

_GATHERED = ("static", "output")  # criteria that score by norms of dense steps
_FIELDS = [field.name for field in dataclasses.fields(StandIn)]


class Calibration:
    """Sample of the dense steps, and what was fitted to it.

    Args:
        config: configuration of the run.

    Attributes:
        fitted: whether the fit is done; nothing is gathered any more then.
        scores: channel scores by (layer, kind), for ``static`` and ``output``; root mean squares for the MLPs of the
            latter, and under ``weight`` what a channel's miss counts.
        factors: whitened SVD factors by (layer, role), for ``svd_whitened``.
        stand_ins: stand-ins of MLPs by layer.
        factor_stand_ins: factors that stand in for the dropped channels of attention linears, by (layer, role).
    """

    def __init__(self, config: SparseLoraConfig) -> None:
        self.config = config
        self.scores: dict[tuple[int, str], torch.Tensor] = {}
        self.factors: dict[tuple[int, str], LowRank] = {}
        self.stand_ins: dict[int, StandIn] = {}
        self.factor_stand_ins: dict[tuple[int, str], LowRank] = {}
        self.reset()

    def reset(self) -> None:
        """Forget sample and fit: a new run starts from its own dense steps."""
        self.reservoir = Reservoir(self.config.calibration_tokens, self.config.seed)
        self.fitted = False
        for learned in (self.scores, self.factors, self.stand_ins, self.factor_stand_ins):
            learned.clear()

    @property
    def gathers(self) -> bool:
        """Whether dense steps are to fill the reservoir."""
        return self.config.needs_statistics and not self.fitted

    @property
    def is_blank(self) -> bool:
        """Whether statistics are asked for and nothing has been gathered, fitted or loaded."""
        return self.gathers and not len(self.reservoir)

    @torch.no_grad()
    def fit_mlp(self, layer: int, view: MlpView, keep: int) -> None:
        """Fit everything that the configuration asks for of one MLP that keeps ``keep`` channels."""
        x = self._sample(f"mlp.{layer}")
        h = view.channels(x).float()
        if self.config.criterion == "svd_whitened":
            self._whiten(layer, view.inputs, x)
        if self.config.criterion in _GATHERED:
            self._score_mlp(layer, h, h.new_ones(h.shape[1]))
        if self.config.compensation != "none":
            self.stand_ins[layer] = self._stand_in(layer, x.float(), h, read_whole(view.down.weight), keep)

    def _sample(self, key: str) -> torch.Tensor:
        """Sampled rows of one part, without those that a broken batch made NaN or infinite, or never filled."""
        x = self.reservoir.get(key) if key in self.reservoir.rows else torch.empty(0, 0, device="cpu")
        sound = x[x.isfinite().all(1)]
        if not len(sound):
            raise RuntimeError(
                f"{key}: dense steps have left no sample. Where hidden states hold NaN or infinity, training has "
                "diverged before sparsity started: lower the learning rate, or train in bf16 rather than fp16. Where "
                "every forward pass ended in an error, let one dense step run to its end. Where the sample is from a "
                "checkpoint of an older version, delete its sparselora_calibration.safetensors: another is gathered."
            )
        return sound

    def _stand_in(self, layer: int, x: torch.Tensor, h: torch.Tensor, down: torch.Tensor, keep: int) -> StandIn:
        rank = self.config.compensation_rank if self.config.compensation == "low_rank" else 0
        stand_in = fit_stand_in(x, h, down.float(), rank, self.config.seed)
        if self.config.criterion in _GATHERED:
            self._score_mlp(layer, h - stand_in.predict(x), down.float().norm(dim=0))
        if self.config.criterion == "static":
            index = top_channels(self.scores[layer, "mlp"], keep)
            stand_in = fit_fixed_set(x, h, down.float(), index, rank, self.config.seed)
        return stand_in.to(down.device, down.dtype)

    def _score_mlp(self, layer: int, missed: torch.Tensor, weight: torch.Tensor) -> None:
        """Scores from what each channel would be missed for, ``[n, N]``, and what a miss of it counts, ``[N]``."""
        self.scores[layer, "mlp"] = missed.norm(dim=0) * weight
        if self.config.criterion == "output":
            self.scores[layer, "mlp"] /= len(missed) ** 0.5
            self.scores[layer, "weight"] = weight

    @torch.no_grad()
    def fit_attention(self, layer: int, view: AttentionView, roles: Sequence[str]) -> None:
        """Fit what the configuration asks for of one attention module.

        Args:
            layer: its layer.
            view: the module.
            roles: linears of it that drop channels.
        """
        x = self._sample(f"attention.{layer}")
        if self.config.criterion == "svd_whitened":
            self._whiten(layer, view.inputs, x)
        if self.config.criterion in _GATHERED:
            self.scores[layer, "vo"] = view.project("v", x).float().norm(dim=0)
            if not {"q", "qkv"}.isdisjoint(roles):
                q, k = (view.project(role, x).float().norm(dim=0) for role in "qk")
                self.scores[layer, "qk"] = view.layout.pool_queries(q) * k
        if self.config.compensation == "low_rank":
            self._stand_in_by_factors(layer, view, roles)

    def _stand_in_by_factors(self, layer: int, view: AttentionView, roles: Iterable[str]) -> None:
        """Factors of whole linears: which of their channels are dropped, a batch decides."""
        roots: dict[str, torch.Tensor] = {}
        for role in roles:
            sample = f"o.{layer}" if role == "o" else f"attention.{layer}"
            if sample not in roots:
                roots[sample] = _root_of_moment(self._sample(sample))
            weight = frozen_weight(base_linear(view.modules[role]))
            rank = min(self.config.compensation_rank, *weight.shape)
            self.factor_stand_ins[layer, role] = _whitened(read_whole(weight), roots[sample], rank, self.config.seed)

    def _whiten(self, layer: int, inputs: dict[str, Projection], x: torch.Tensor) -> None:
        root = _root_of_moment(x)
        for role, projection in inputs.items():
            weight = read_whole(projection.weight)
            self.factors[layer, role] = _whitened(weight, root, self.config.rank, self.config.seed)

    def finish(self) -> int:
        """Close the fit: all ranks take rank 0's, the sample is dropped. Returns its number of tokens."""
        agree(tensor for _, tensor in self._fit_tensors())
        tokens, self.reservoir = len(self.reservoir), Reservoir(self.config.calibration_tokens, self.config.seed)
        self.fitted = True
        return tokens

    def tensors(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Everything a checkpoint must hold: the fit, or the sample where it is not done yet; every rank must call.

        Args:
            device: device of the model.
        """
        if not self.config.needs_statistics:
            return {}
        if not self.fitted:
            return {f"reservoir.{name}": tensor for name, tensor in self.reservoir.merged(device).tensors().items()}
        return dict(self._fit_tensors())

    def _fit_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for (layer, kind), scores in self.scores.items():
            yield f"scores.{layer}.{kind}", scores
        for (layer, role), factors in self.factors.items():
            yield f"factors.{layer}.{role}.down", factors.down
            yield f"factors.{layer}.{role}.up", factors.up
        for (layer, role), factors in self.factor_stand_ins.items():
            yield f"factor_stand_ins.{layer}.{role}.down", factors.down
            yield f"factor_stand_ins.{layer}.{role}.up", factors.up
        for layer, stand_in in self.stand_ins.items():
            for field in _FIELDS:
                if getattr(stand_in, field) is not None:
                    yield f"stand_in.{layer}.{field}", getattr(stand_in, field)

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take back what `tensors` gave."""
        sample = {k.removeprefix("reservoir."): v for k, v in tensors.items() if k.startswith("reservoir.")}
        if sample:
            self.reservoir.load(sample)
            return
        stand_ins: dict[int, dict[str, torch.Tensor]] = {}
        factors: dict[str, dict[tuple[int, str], dict[str, torch.Tensor]]] = {"factors": {}, "factor_stand_ins": {}}
        for name, tensor in tensors.items():
            kind, layer, *rest = name.split(".")
            if kind == "scores":
                self.scores[int(layer), rest[0]] = tensor
            elif kind in factors:
                factors[kind].setdefault((int(layer), rest[0]), {})[rest[1]] = tensor
            else:
                stand_ins.setdefault(int(layer), {})[rest[0]] = tensor
        for learned, kind in ((self.factors, "factors"), (self.factor_stand_ins, "factor_stand_ins")):
            learned.update({key: LowRank(**parts) for key, parts in factors[kind].items()})
        self.stand_ins.update({layer: StandIn(**parts) for layer, parts in stand_ins.items()})
        self.fitted = True  # also where nothing was to be fitted: means are of MLPs alone


def _root_of_moment(x: torch.Tensor) -> torch.Tensor:
    """``L`` with ``L Lᵀ`` the second moment of the inputs ``x`` ``[n, in]``, a little more on its diagonal."""
    x = x.float()
    moment = x.t() @ x / len(x)
    moment.diagonal().add_(1e-3 * moment.diagonal().mean() + torch.finfo(x.dtype).tiny)
    return torch.linalg.cholesky(moment)


def _whitened(weight: torch.Tensor, root: torch.Tensor, rank: int, seed: int) -> LowRank:
    """SVD of ``W L``: the factors of ``W`` err least where the inputs are."""
    factors = truncated_svd(weight.float() @ root, rank, seed)
    down = torch.linalg.solve_triangular(root, factors.down, upper=False, left=False)
    return LowRank(down.contiguous(), factors.up).to(weight.device, weight.dtype)
