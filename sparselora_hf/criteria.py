"""Channel criteria: how the channels of a layer are scored for one batch. Every score is an L2 norm over tokens.

* MLP: ``‖act(x W_gᵀ) ⊙ (x W_uᵀ)‖`` per intermediate channel, ``‖act(x W_uᵀ)‖`` without a gate.
* VO: ``‖x W_vᵀ‖`` per value channel.
* QK: ``‖x W_qᵀ‖ · ‖x W_kᵀ‖`` per key channel, the query norms pooled over the heads that share it.

The criteria differ in where the products come from: low-rank factors (the paper), true activations, or nowhere.
"""

import zlib
from collections.abc import Callable

import torch

from .calibration import Calibration
from .config import SparseLoraConfig
from .ops.activations import activation_kind
from .ops.estimator import gated_norms
from .ops.transfer import to_device
from .svd import LowRank
from .views import AttentionView, MlpView

__all__ = ["CRITERIA", "Criterion"]

_CHUNK = 1024  # tokens scored at a time: bounds the token × channel matrix of the MLP criterion


class Criterion:
    """Scores from true products with the frozen weights; subclasses replace where the products come from.

    Args:
        factors: SVD factors by (layer, role), for criteria with `needs_factors`.
        calibration: what was fitted to dense steps.
        config: configuration of the run.
    """

    needs_rank = False
    needs_factors = False
    reads_output = False
    default_tokens: int | None = None

    def __init__(
        self, factors: dict[tuple[int, str], LowRank], calibration: Calibration, config: SparseLoraConfig
    ) -> None:
        self.factors = factors
        self.calibration = calibration
        self.score_tokens = config.score_tokens or self.default_tokens
        self.seed = config.seed
        self.kernels = config.kernels
        self._picked: tuple[torch.Tensor, torch.Tensor] | None = None

    def mlp_of_context(
        self,
        layer: int,
        view: MlpView,
        x: torch.Tensor,
        rows: torch.Tensor,
        step: int,
        sequence: torch.Tensor,
        groups: int,
    ) -> torch.Tensor:
        """`mlp` of what `sample` takes out of all rows ``x`` ``[T, H]``."""
        return self.mlp(layer, view, self.sample(x, rows, sequence, groups), step)

    def sample(
        self, x: torch.Tensor, rows: torch.Tensor, sequence: torch.Tensor, groups: int | None = None
    ) -> torch.Tensor:
        """What enters the scores: the context rows ``rows`` ``[C]`` of ``x`` ``[T, H]``, or some of them.

        ``sequence`` ``[C]`` numbers the sequence of each context row, ascending; ``groups`` is how many different
        ones there are, counted where it is None, which waits for the device.
        """
        return x.index_select(0, self._few(rows))

    def _few(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows, or `score_tokens` of them that lie evenly among them."""
        if self.score_tokens is None or len(rows) <= self.score_tokens:
            return rows
        if self._picked is None or self._picked[0] is not rows:  # the layers of a batch have the same ones
            places = torch.linspace(0, len(rows) - 1, self.score_tokens, device=rows.device).long()
            self._picked = rows, rows[places]
        return self._picked[1]

    def mlp(self, layer: int, view: MlpView, x: torch.Tensor, step: int) -> torch.Tensor:
        """Scores of MLP channels, ``[N]``."""
        return self._missed(layer, view.channels, x)

    def _missed(self, layer: int, channels: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """Norms of the channels, less what the layer's stand-in makes up for."""
        stand_in = self.calibration.stand_ins.get(layer)
        if stand_in is None:
            return _token_norms(channels, x)
        return _token_norms(lambda rows: channels(rows) - stand_in.predict(rows.to(stand_in.mean.dtype)), x)

    def vo(self, layer: int, view: AttentionView, x: torch.Tensor, step: int) -> torch.Tensor:
        """Scores of value channels, ``[kv]``."""
        return self.norms(layer, view, "v", x)

    def qk(self, layer: int, view: AttentionView, x: torch.Tensor, step: int) -> torch.Tensor:
        """Scores of key channels, ``[kv]``."""
        queries = view.layout.pool_queries(self.norms(layer, view, "q", x))
        return queries * self.norms(layer, view, "k", x)

    def norms(self, layer: int, view: AttentionView, role: str, x: torch.Tensor) -> torch.Tensor:
        """Norm over tokens of each output channel of one projection."""
        return view.project(role, x).float().norm(dim=0)


class OracleCriterion(Criterion):
    """True activations of all context tokens: as dear as the dense product, for comparison (paper, section 3.2)."""


class SampledCriterion(Criterion):
    """True activations of a few context tokens."""

    default_tokens = 64


class SvdCriterion(Criterion):
    """Rank-r factors in place of the weights, all context tokens scored: the paper's estimator (section 3.2)."""

    needs_rank = True
    needs_factors = True

    def __init__(
        self, factors: dict[tuple[int, str], LowRank], calibration: Calibration, config: SparseLoraConfig
    ) -> None:
        super().__init__(factors, calibration, config)
        self._joined: dict[int, tuple[LowRank, LowRank, torch.Tensor]] = {}

    def mlp_of_context(
        self,
        layer: int,
        view: MlpView,
        x: torch.Tensor,
        rows: torch.Tensor,
        step: int,
        sequence: torch.Tensor,
        groups: int,
    ) -> torch.Tensor:
        """The same, by a kernel that reads the rows where they are, if there is one."""
        fused = self._fused(layer, view, x, self._few(rows))
        if fused is not None:
            return fused
        return super().mlp_of_context(layer, view, x, rows, step, sequence, groups)

    def mlp(self, layer: int, view: MlpView, x: torch.Tensor, step: int) -> torch.Tensor:
        """Scores of MLP channels from the factors of its inputs, ``[N]``."""
        fused = self._fused(layer, view, x)
        if fused is not None:
            return fused
        inputs = [(self._factor(layer, role, x.device), projection.bias) for role, projection in view.inputs.items()]

        def channels(rows: torch.Tensor) -> torch.Tensor:
            return view.combine([_biased(factor(rows), bias) for factor, bias in inputs])

        return self._missed(layer, channels, x)

    def _fused(
        self, layer: int, view: MlpView, x: torch.Tensor, rows: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """Scores of a gated MLP's channels without a stand-in, by a kernel; None where there is none."""
        if len(view.inputs) < 2 or layer in self.calibration.stand_ins:
            return None
        gate, up = self._factor(layer, "gate", x.device), self._factor(layer, "up", x.device)
        joined = self._joined.get(layer)
        if joined is None or joined[0] is not gate or joined[1] is not up:
            joined = self._joined[layer] = gate, up, torch.cat([gate.down, up.down])
        biases = view.inputs["gate"].bias, view.inputs["up"].bias
        return gated_norms(x, joined[2], gate.up, up.up, biases, activation_kind(view.activation), self.kernels, rows)

    def norms(self, layer: int, view: AttentionView, role: str, x: torch.Tensor) -> torch.Tensor:
        """Norm over tokens of each output channel, through the Gram matrix of the projected tokens."""
        return self._factor(layer, role, x.device).channel_norms(x, self.kernels)

    def _factor(self, layer: int, role: str, device: torch.device) -> LowRank:
        """Factors of a weight, which follow the tokens: an engine may move the model after it was made sparse."""
        held = self._held()
        if held[layer, role].down.device != device:
            held[layer, role] = held[layer, role].to(device)
        return held[layer, role]

    def _held(self) -> dict[tuple[int, str], LowRank]:
        return self.factors


class SvdMeanCriterion(SvdCriterion):
    """The reference code's estimator: the tokens of each sequence are averaged before they are scored."""

    mlp_of_context = Criterion.mlp_of_context

    def sample(
        self, x: torch.Tensor, rows: torch.Tensor, sequence: torch.Tensor, groups: int | None = None
    ) -> torch.Tensor:
        """One row per sequence that has context: the mean of its context rows."""
        x = x.index_select(0, rows)
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # a bf16 sum of some hundred rows loses its last ones
        sequence = sequence.to(x.device)  # the layers may be spread over devices
        starts = sequence != sequence.roll(1)
        starts[:1] = False  # the first sequence is number 0
        group = starts.cumsum(0)
        groups = int(group[-1]) + 1 if groups is None else groups
        member = (group == torch.arange(groups, device=x.device)[:, None]).to(x.dtype)  # [groups, C]
        with torch.autocast(x.device.type, enabled=False):
            # a product: atomic additions would let two runs of one seed choose different channels
            return member @ x / member.sum(1, keepdim=True)


class WhitenedSvdCriterion(SvdCriterion):
    """SVD factors that err least on the inputs seen in dense steps."""

    needs_factors = False

    def _held(self) -> dict[tuple[int, str], LowRank]:
        return self.calibration.factors


class _Tokenless(Criterion):
    """Scores that no token of the batch enters."""

    def sample(
        self, x: torch.Tensor, rows: torch.Tensor, sequence: torch.Tensor, groups: int | None = None
    ) -> torch.Tensor:
        """No rows at all."""
        return x[:0]


class StaticCriterion(_Tokenless):
    """One fixed set per layer, from norms gathered in dense steps: no cost per batch."""

    def mlp(self, layer: int, view: MlpView, x: torch.Tensor, step: int) -> torch.Tensor:
        """Fixed scores, ``[N]``."""
        return self.calibration.scores[layer, "mlp"]

    def vo(self, layer: int, view: AttentionView, x: torch.Tensor, step: int) -> torch.Tensor:
        """Fixed scores, ``[kv]``."""
        return self.calibration.scores[layer, "vo"]

    def qk(self, layer: int, view: AttentionView, x: torch.Tensor, step: int) -> torch.Tensor:
        """Fixed scores, ``[kv]``."""
        return self.calibration.scores[layer, "qk"]


class OutputCriterion(StaticCriterion):
    """Scores of dense steps, moved by the MLP activations of the batch's output rows: sets that follow the data.

    Output rows run through all channels anyway. Measured on the small checkpoints (`recipes/bench/estimators.py`) they
    rank the channels of the context before them nearly as well as the context itself; where a batch has few of them,
    or none, the dense steps have the say. Attention keeps fixed sets.
    """

    reads_output = True
    default_tokens = 512
    prior_tokens = 128  # what the dense steps weigh, in output rows; chosen on the checkpoints and texts named above

    def mlp_of_output(self, layer: int, x: torch.Tensor, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Scores of MLP channels, ``[N]``.

        Args:
            layer: number of the layer.
            x: input of its MLP, ``[T, H]``.
            hidden: activations of the same tokens, ``[T, N]``.
            rows: those of them that are output tokens, ``[A]``, ascending.
        """
        rows, stand_in = self._few(rows), self.calibration.stand_ins.get(layer)
        if len(rows) < len(hidden):
            x, hidden = x.index_select(0, rows), hidden.index_select(0, rows)
        if stand_in is not None:
            hidden = hidden - stand_in.predict(x.to(stand_in.mean.dtype))
        seen = torch.linalg.vector_norm(hidden, dim=0, dtype=torch.promote_types(hidden.dtype, torch.float32))
        prior, weight = self.calibration.scores[layer, "mlp"], self.calibration.scores[layer, "weight"]
        return torch.hypot(self.prior_tokens**0.5 * prior, weight * seen)


class RandomCriterion(_Tokenless):
    """Random channels, afresh for each batch and layer: the floor every other criterion must beat."""

    def mlp(self, layer: int, view: MlpView, x: torch.Tensor, step: int) -> torch.Tensor:
        """Random scores, ``[N]``."""
        return self._draw(view.width, "mlp", layer, step, x.device)

    def vo(self, layer: int, view: AttentionView, x: torch.Tensor, step: int) -> torch.Tensor:
        """Random scores, ``[kv]``."""
        return self._draw(view.layout.kv_width, "vo", layer, step, x.device)

    def qk(self, layer: int, view: AttentionView, x: torch.Tensor, step: int) -> torch.Tensor:
        """Random scores, ``[kv]``."""
        return self._draw(view.layout.kv_width, "qk", layer, step, x.device)

    def _draw(self, width: int, part: str, layer: int, step: int, device: torch.device) -> torch.Tensor:
        # a pure function of seed, step, layer and part: the same after a resume
        seed = zlib.crc32(f"{self.seed}/{step}/{layer}/{part}".encode())
        return to_device(torch.rand(width, generator=torch.Generator().manual_seed(seed), device="cpu"), device)


CRITERIA: dict[str, type[Criterion]] = {
    "oracle": OracleCriterion,
    "output": OutputCriterion,
    "random": RandomCriterion,
    "sampled": SampledCriterion,
    "static": StaticCriterion,
    "svd": SvdCriterion,
    "svd_mean": SvdMeanCriterion,
    "svd_whitened": WhitenedSvdCriterion,
}


def _biased(product: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return product if bias is None else product + bias.to(product.dtype)


def _token_norms(channels: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Norm over tokens of each channel, a chunk of tokens at a time: ``[T, H]`` to ``[N]``."""
    squares = [channels(rows).float().square().sum(0) for rows in x.split(_CHUNK)]
    return torch.stack(squares).sum(0).sqrt()
