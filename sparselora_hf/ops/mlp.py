"""The MLP on its kept channels, with an optional low-rank stand-in for the dropped ones: one function.

Without a stand-in ``y = (act(x G_Kᵀ) ⊙ (x U_Kᵀ)) D_Kᵀ`` with ``G_K``, ``U_K`` the kept rows of gate and up and
``D_K`` the kept columns of down. A stand-in ``h ≈ m + z Q`` with ``z = (x − μ) P`` makes the kept channels a
correction, ``y = z R + c + (h_K − m_K − z Q_K) D_Kᵀ`` with ``R = Q Dᵀ`` and ``c = m Dᵀ``: full width never appears.
Gate, up and ``P`` are one product, down and ``R`` another. Saved for backward: the two products at kept width.
A plain MLP has no gate: its activation is that of ``x U_Kᵀ``.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch

from ..kernels.choice import Choice, choose
from ..kernels.runtime import kernels_of
from ..kernels.tiles import tile_for
from .activations import activation_kind
from .linear import compute_dtype
from .once import once_differentiable
from .quant import FrozenWeight, QuantisedRows, QuantisedWeight
from .slices import column_slice, is_plain, row_slice

__all__ = ["KeptChannels", "MlpWeights", "Slices", "StandIn", "kept_mlp"]


@dataclasses.dataclass(frozen=True)
class StandIn:
    """Low-rank stand-in for the dropped channels of one MLP.

    Args:
        project: ``Pᵀ``, ``[r, H]``.
        shift: ``μ P``, ``[r]``.
        output: ``R``, ``[r, H]``.
        constant: ``c``, ``[H]``.
        mean: ``m``, ``[N]``, or None where `output` and `constant` stand for the dropped channels of a fixed set
            alone and nothing is to be corrected.
        channels: ``Q``, ``[r, N]``, or None likewise.
    """

    project: torch.Tensor
    shift: torch.Tensor
    output: torch.Tensor
    constant: torch.Tensor
    mean: torch.Tensor | None = None
    channels: torch.Tensor | None = None

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        """Stand-in activations ``m + z Q``: ``[T, H]`` to ``[T, N]``."""
        z = torch.addmm(self.shift, x, self.project.t(), beta=-1)
        return torch.addmm(self.mean, z, self.channels)

    def correction(self, x: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Apart from `kept_mlp`: output ``z R + c`` ``[T, H]``, and what kept channels must give up, ``[T, K]``."""
        z = x @ self.project.t().to(x.dtype) - self.shift.to(x.dtype)
        output = z @ self.output.to(x.dtype) + self.constant.to(x.dtype)
        if self.channels is None:
            return output, 0.0
        given_up = self.mean.index_select(0, index) + z @ self.channels.index_select(1, index).to(x.dtype)
        return output, given_up

    def to(self, device: torch.device, dtype: torch.dtype) -> "StandIn":
        """The same on a device, in a type."""
        tensors = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return StandIn(**{k: None if v is None else v.to(device, dtype) for k, v in tensors.items()})


@dataclasses.dataclass(frozen=True)
class MlpWeights:
    """Frozen weights of an MLP: gate and up ``[N, H]``, down ``[H, N]``, their biases or None, the activation.

    A plain MLP has no gate. Weights may be quantised.
    """

    gate: FrozenWeight | None
    up: FrozenWeight
    down: FrozenWeight
    activation: Callable[[torch.Tensor], torch.Tensor]
    gate_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None

    @property
    def inward(self) -> int:
        """Matrices that lead into the MLP: M = 2, or 1 without a gate."""
        return 1 if self.gate is None else 2

    def state(self) -> list[tuple[int, int]]:
        """What changes when a weight or a bias does: addresses, and how often each was written to.

        Writes to a tensor's `data` are not counted.
        """
        parts = (self.gate, self.up, self.down, self.gate_bias, self.up_bias, self.down_bias)
        parts = [p.weight if isinstance(p, QuantisedRows) else p for p in parts]  # asked for its rows, it launches
        stored = [p.tensors()[0] if isinstance(p, QuantisedWeight) else p for p in parts if p is not None]
        return [(tensor.data_ptr(), tensor._version) for tensor in stored]

    @property
    def kind(self) -> str | None:
        """Name of the activation where kernels know it."""
        return activation_kind(self.activation)

    # what is gathered for one channel set: arguments are the same for all

    def gather_in(
        self, index: torch.Tensor, stand_in: StandIn | None, dtype: torch.dtype, way: Choice
    ) -> torch.Tensor:
        """Kept rows of gate and up, and the stand-in's projection: ``[M K + r, H]``."""
        weights = [weight for weight in (self.gate, self.up) if weight is not None]
        return row_slice(weights, index, dtype, way, None if stand_in is None else stand_in.project.to(dtype))

    def bias_in(
        self, index: torch.Tensor, stand_in: StandIn | None, dtype: torch.dtype, way: Choice
    ) -> torch.Tensor | None:
        """What goes with `gather_in`, ``[M K + r]``; None where that is zero."""
        biases = (self.gate_bias, self.up_bias)[-self.inward :]
        if stand_in is None and all(bias is None for bias in biases):
            return None
        zeros = torch.zeros(index.shape[0], device=index.device, dtype=dtype)
        parts = [zeros if bias is None else bias.index_select(0, index).to(dtype) for bias in biases]
        return torch.cat(parts if stand_in is None else [*parts, -stand_in.shift.to(dtype)])

    def gather_out(
        self, index: torch.Tensor, stand_in: StandIn | None, dtype: torch.dtype, way: Choice
    ) -> torch.Tensor:
        """Kept columns of down as rows, and the stand-in's output map: ``[K + r, H]``."""
        return column_slice(self.down, index, dtype, way, None if stand_in is None else stand_in.output.to(dtype))

    def bias_out(
        self, index: torch.Tensor, stand_in: StandIn | None, dtype: torch.dtype, way: Choice
    ) -> torch.Tensor | None:
        """What goes with `gather_out`, ``[H]``; None where that is zero."""
        biases = [
            b.to(dtype) for b in (self.down_bias, None if stand_in is None else stand_in.constant) if b is not None
        ]
        return sum(biases[1:], biases[0]) if biases else None

    def means(self, index: torch.Tensor, stand_in: StandIn, dtype: torch.dtype, way: Choice) -> torch.Tensor:
        """Mean of the kept channels that a stand-in for all of them knows, ``[K]``."""
        return stand_in.mean.index_select(0, index).to(dtype)

    def stood_in(self, index: torch.Tensor, stand_in: StandIn, dtype: torch.dtype, way: Choice) -> torch.Tensor:
        """What a stand-in for all channels makes of the kept ones, ``[r, K]``."""
        return stand_in.channels.index_select(1, index).to(dtype)

    def gate_and_up(self, wide: torch.Tensor, keep: int) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Parts of the products ``[T, M K + r]``: ``[T, K]`` or None, and ``[T, K + r]``."""
        return (None, wide) if self.gate is None else (wide[:, :keep], wide[:, keep:])

    def channels(self, wide: torch.Tensor, keep: int) -> torch.Tensor:
        """Activations ``[T, K]`` from the products ``[T, M K + r]``."""
        activated = self.activation(wide[:, :keep])
        return activated if self.gate is None else activated * wide[:, keep : 2 * keep]


# the share of channels up to which slices are kept: at most that share of the MLPs' weights is in memory twice
_FEW = 1 / 32


class KeptChannels(NamedTuple):
    """An MLP on its kept channels, into them and out of them, each way forward and backward, apart from autograd.

    Args:
        weights: the MLP's.
        index: int64 ``[K]``, distinct.
        stand_in: what takes the place of the dropped channels, or None.
        way: of kernels.
        gathered: slices of the same channels from earlier calls; None keeps none.
    """

    weights: MlpWeights
    index: torch.Tensor
    stand_in: StandIn | None
    way: Choice
    gathered: "Gathered | None" = None

    @classmethod
    def of(
        cls,
        weights: MlpWeights,
        index: torch.Tensor,
        stand_in: StandIn | None,
        way: Choice,
        slices: "Slices | None" = None,
    ) -> "KeptChannels":
        """With the slices that are known of a set; None knows none and keeps none."""
        return cls(weights, index, stand_in, way, None if slices is None else slices.of(weights, index, stand_in))

    def enter(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``[T, H]`` to the products ``[T, M K]`` that `enter_backward` needs, and activations ``[T, K + r]``."""
        weights, index, stand_in = self.weights, self.index, self.stand_in
        if self.way.way == "triton" and _can_fuse(x, weights, stand_in):
            x = x if x.stride(1) == 1 else x.contiguous()
            tile, biases = tile_for("mlp_in", x, self.way.tile), (weights.gate_bias, weights.up_bias)
            return kernels_of("mlp").mlp_in_fwd(x, weights.gate, weights.up, index, weights.kind, tile, *biases)
        inward = weights.inward * index.shape[0]
        wide = _affine(x, self._gather("gather_in", x.dtype).t(), self._gather("bias_in", x.dtype))  # [T, M K + r]
        hidden = self._activate(wide)
        return wide if wide.shape[1] == inward else wide[:, :inward].contiguous(), hidden

    def _activate(self, wide: torch.Tensor) -> torch.Tensor:
        weights, index, stand_in = self.weights, self.index, self.stand_in
        keep, given_up = index.shape[0], None
        inward = weights.inward * keep
        if stand_in is not None and stand_in.channels is not None:
            channels = self._gather("stood_in", wide.dtype)
            given_up = torch.addmm(self._gather("means", wide.dtype), wide[:, inward:], channels)
        if self.way and weights.kind:
            gate, up = weights.gate_and_up(wide, keep)
            tile = tile_for("activation", wide)
            return kernels_of("mlp").mlp_activation_fwd(gate, up, keep, weights.kind, tile, given_up)
        hidden = weights.channels(wide, keep)  # [T, K]
        if given_up is not None:
            hidden -= given_up
        return hidden if stand_in is None else torch.cat([hidden, wide[:, inward:]], 1)  # [T, K + r]

    def enter_backward(self, grad: torch.Tensor, wide: torch.Tensor) -> torch.Tensor:
        """Gradient of the activations ``[T, K + r]`` to that of the input ``[T, H]``, with the products of `enter`."""
        grad_wide = self._activate_backward(grad, wide)
        return grad_wide @ self._gather("gather_in", grad.dtype)

    def _activate_backward(self, grad: torch.Tensor, wide: torch.Tensor) -> torch.Tensor:
        weights, stand_in, keep, lost = self.weights, self.stand_in, self.index.shape[0], None
        if stand_in is not None and stand_in.channels is not None:
            lost = grad[:, :keep] @ self._gather("stood_in", grad.dtype).t()
        if self.way and weights.kind:
            grad_wide = grad.new_empty(grad.shape[0], grad.shape[1] + wide.shape[1] - keep)
            (gate, up), (grad_gate, grad_up) = weights.gate_and_up(wide, keep), weights.gate_and_up(grad_wide, keep)
            options = weights.kind, tile_for("activation", wide), lost
            kernels_of("mlp").mlp_activation_bwd(grad.contiguous(), gate, up, grad_gate, grad_up, *options)
            return grad_wide
        with torch.enable_grad():
            leaf = wide.detach().requires_grad_()
            (grad_wide,) = torch.autograd.grad(weights.channels(leaf, keep), leaf, grad[:, :keep])
        if stand_in is None:
            return grad_wide
        return torch.cat([grad_wide, grad[:, keep:] if lost is None else grad[:, keep:] - lost], 1)

    def leave(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[T, K + r]`` to ``[T, H]``."""
        return _affine(hidden, self._gather("gather_out", hidden.dtype), self._gather("bias_out", hidden.dtype))

    def leave_backward(self, grad: torch.Tensor) -> torch.Tensor:
        """Gradient ``[T, H]`` to ``[T, K + r]``."""
        return grad @ self._gather("gather_out", grad.dtype).t()

    def _gather(self, method: str, dtype: torch.dtype) -> torch.Tensor | None:
        """What a method of the weights gathers; of few channels it is kept."""
        known, key = self.gathered, (method, dtype)
        if known is not None and key in known:
            return known[key]
        result = getattr(self.weights, method)(self.index, self.stand_in, dtype, self.way)
        if known is not None:
            known[key] = result
        return result


Gathered = dict[tuple[str, torch.dtype], torch.Tensor | None]  # by the method that gathered, and the type


class Slices:
    """What was gathered of the weights of an MLP for one channel set, as long as nothing changes."""

    def __init__(self) -> None:
        self._source: tuple[list[tuple[int, int]], StandIn | None] | None = None
        self._gathered: Gathered = {}

    def of(self, weights: MlpWeights, index: torch.Tensor, stand_in: StandIn | None) -> Gathered | None:
        """What is known, and is to be kept; None where the set is of too many channels for that."""
        if index.shape[0] > _FEW * weights.up.shape[0]:
            return None
        state = weights.state()
        if self._source is None or self._source[0] != state or self._source[1] is not stand_in:
            self._source, self._gathered = (state, stand_in), {}  # what is under way keeps the old ones
        return self._gathered


def _affine(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x @ weight if bias is None else torch.addmm(bias, x, weight)


# Two functions, not one: recomputation under checkpointing ends once the products are saved, before the last one.


class _KeptIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kept):
        wide, hidden = kept.enter(x)
        ctx.kept = kept
        ctx.save_for_backward(wide)
        return hidden

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return ctx.kept.enter_backward(grad, *ctx.saved_tensors), None


class _KeptOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, kept):
        ctx.kept = kept
        return kept.leave(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return ctx.kept.leave_backward(grad), None


def _can_fuse(x: torch.Tensor, weights: MlpWeights, stand_in: StandIn | None) -> bool:
    """Whether one kernel makes products and activation: plain weights in the type of ``x``, a known activation."""
    if stand_in is not None or weights.kind is None:
        return False
    inputs = [weight for weight in (weights.gate, weights.up) if weight is not None]
    plain = all(is_plain(weight, x.dtype) and weight.stride() == inputs[0].stride() for weight in inputs)
    return plain and (weights.gate is None or (weights.gate_bias is None) == (weights.up_bias is None))


def kept_mlp(
    x: torch.Tensor,
    weights: MlpWeights,
    index: torch.Tensor,
    stand_in: StandIn | None = None,
    kernels: str | Choice = "auto",
    slices: Slices | None = None,
) -> torch.Tensor:
    """MLP of frozen weights on kept channels.

    Args:
        x: ``[T, H]``.
        weights: the MLP's.
        index: int64 ``[K]``, distinct; empty only with a stand-in.
        stand_in: what takes the place of the dropped channels, or None.
        kernels: as in `SparseLoraConfig`.
        slices: those of the index: of few channels they are kept; None keeps none.

    Returns:
        ``[T, H]``. Differentiable in ``x``.
    """
    x = x.to(compute_dtype(x, weights.up))
    way = choose("mlp", x, x.shape[1], len(index), kernels)
    kept = KeptChannels.of(weights, index, stand_in, way, slices)
    return _KeptOut.apply(_KeptIn.apply(x, kept), kept)
