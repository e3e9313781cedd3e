"""The MLP on its kept channels, with an optional low-rank stand-in for the dropped ones: one function.

Without a stand-in ``y = (act(x G_Kᵀ) ⊙ (x U_Kᵀ)) D_Kᵀ`` with ``G_K``, ``U_K`` the kept rows of gate and up and
``D_K`` the kept columns of down. A stand-in ``h ≈ m + z Q`` with ``z = (x − μ) P`` makes the kept channels a
correction, ``y = z R + c + (h_K − m_K − z Q_K) D_Kᵀ`` with ``R = Q Dᵀ`` and ``c = m Dᵀ``: full width never appears.
Gate, up and ``P`` are one product, down and ``R`` another. Saved for backward: the two products at kept width.
A plain MLP has no gate: its activation is that of ``x U_Kᵀ``.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable

from .linear import compute_dtype
from .quant import FrozenWeight, read_columns, read_rows

__all__ = ["MlpWeights", "StandIn", "kept_mlp"]


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
        return self.mean + (x @ self.project.t() - self.shift) @ self.channels

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

    def gather_in(self, index: torch.Tensor, stand_in: StandIn | None, dtype: torch.dtype) -> torch.Tensor:
        """Kept rows of gate and up, and the stand-in's projection: ``[M K + r, H]``."""
        parts = [read_rows(weight, index, dtype) for weight in (self.gate, self.up) if weight is not None]
        return torch.cat(parts if stand_in is None else [*parts, stand_in.project.to(dtype)])

    def gather_out(self, index: torch.Tensor, stand_in: StandIn | None, dtype: torch.dtype) -> torch.Tensor:
        """Kept columns of down as rows, and the stand-in's output map: ``[K + r, H]``."""
        kept = read_columns(self.down, index, dtype).t()
        return kept if stand_in is None else torch.cat([kept, stand_in.output.to(dtype)])

    def add_biases(self, wide: torch.Tensor, index: torch.Tensor) -> None:
        """Add the kept biases of gate and up to ``[T, M K + r]`` in place."""
        for bias, first in ((self.gate_bias, 0), (self.up_bias, (self.inward - 1) * len(index))):
            if bias is not None:
                wide[:, first : first + len(index)] += bias.index_select(0, index).to(wide.dtype)

    def channels(self, wide: torch.Tensor, keep: int) -> torch.Tensor:
        """Activations ``[T, K]`` from the products ``[T, M K + r]``."""
        activated = self.activation(wide[:, :keep])
        return activated if self.gate is None else activated * wide[:, keep : 2 * keep]


# Three functions, not one: recomputation under checkpointing ends once `wide` is saved, before the last product.


class _KeptIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weights, index, stand_in):
        ctx.kept = weights, index, stand_in
        wide = x @ weights.gather_in(index, stand_in, x.dtype).t()  # [T, M K + r]
        weights.add_biases(wide, index)
        if stand_in is not None:
            wide[:, weights.inward * len(index) :] -= stand_in.shift.to(x.dtype)
        return wide

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        weights, index, stand_in = ctx.kept
        return grad @ weights.gather_in(index, stand_in, grad.dtype), None, None, None


class _KeptActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, wide, weights, index, stand_in):
        keep, inward = len(index), weights.inward * len(index)
        ctx.kept = weights, index, stand_in
        ctx.save_for_backward(wide[:, :inward].contiguous())
        hidden = weights.channels(wide, keep)  # [T, K]
        if stand_in is None:
            return hidden
        z = wide[:, inward:]
        if stand_in.channels is not None:
            hidden -= stand_in.mean.index_select(0, index).to(wide.dtype)
            hidden -= z @ stand_in.channels.index_select(1, index).to(wide.dtype)
        return torch.cat([hidden, z], 1)  # [T, K + r]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        weights, index, stand_in = ctx.kept
        (wide,) = ctx.saved_tensors
        keep = len(index)
        grad_channels, grad_z = grad[:, :keep], grad[:, keep:]
        with torch.enable_grad():
            leaf = wide.detach().requires_grad_()
            (grad_wide,) = torch.autograd.grad(weights.channels(leaf, keep), leaf, grad_channels)
        if stand_in is not None:
            if stand_in.channels is not None:
                grad_z = grad_z - grad_channels @ stand_in.channels.index_select(1, index).to(grad.dtype).t()
            grad_wide = torch.cat([grad_wide, grad_z], 1)
        return grad_wide, None, None, None


class _KeptOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weights, index, stand_in):
        ctx.kept = weights, index, stand_in
        y = hidden @ weights.gather_out(index, stand_in, hidden.dtype)
        for constant in (weights.down_bias, None if stand_in is None else stand_in.constant):
            if constant is not None:
                y += constant.to(y.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        weights, index, stand_in = ctx.kept
        return grad @ weights.gather_out(index, stand_in, grad.dtype).t(), None, None, None


def kept_mlp(
    x: torch.Tensor, weights: MlpWeights, index: torch.Tensor, stand_in: StandIn | None = None
) -> torch.Tensor:
    """MLP of frozen weights on kept channels.

    Args:
        x: ``[T, H]``.
        weights: the MLP's.
        index: int64 ``[K]``, distinct; empty only with a stand-in.
        stand_in: what takes the place of the dropped channels, or None.

    Returns:
        ``[T, H]``. Differentiable in ``x``.
    """
    wide = _KeptIn.apply(x.to(compute_dtype(x, weights.up)), weights, index, stand_in)
    hidden = _KeptActivation.apply(wide, weights, index, stand_in)
    return _KeptOut.apply(hidden, weights, index, stand_in)
