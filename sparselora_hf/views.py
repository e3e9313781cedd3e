"""Views of a decoder layer: its projections by role, whatever the family calls them, seen through LoRA layers."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from .channels import ChannelSelection, HeadLayout, Share
from .families import ModelFamily
from .ops.linear import compute_dtype
from .ops.mlp import MlpWeights
from .ops.quant import FrozenWeight, QuantisedRows, QuantisedWeight, frozen_weight, read_whole

__all__ = ["AttentionView", "MlpView", "Projection", "base_linear", "part_of"]


def base_linear(module: nn.Module) -> nn.Module:
    """The frozen linear of a projection: PEFT's base layer where the projection carries an adapter."""
    if type(module) is nn.Linear:  # what follows takes longer
        return module
    from peft.tuners.tuners_utils import BaseTunerLayer

    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def part_of(module: nn.Module, family: ModelFamily, field: str) -> Any:
    """What a module has under the name that the family gives for a field, ``q`` say.

    Raises:
        ValueError: there is no such thing; the message names the module, the field and what there is instead.
    """
    try:
        return getattr(module, getattr(family, field))
    except AttributeError:
        there = ", ".join(name for name, _ in module.named_children())
        raise ValueError(
            f"ModelFamily {family.name!r}: {type(module).__name__} has no {getattr(family, field)!r}, which the "
            f"family gives as {field}. It has {there}. Describe the family with ModelFamily(..., {field}=...)."
        ) from None


def _side(part: nn.Module, family: ModelFamily, field: str, side: str) -> int:
    """Channels on one side of a projection, ``in_features`` or ``out_features``.

    Raises:
        ValueError: it is no linear, as GPT-2's `Conv1D`.
    """
    projection = base_linear(part_of(part, family, field))
    try:
        return getattr(projection, side)
    except AttributeError:
        raise ValueError(
            f"ModelFamily {family.name!r}: {getattr(family, field)!r} of {type(part).__name__}, which the family "
            f"gives as {field}, is a {type(projection).__name__}. Only linears can be sparse, so this model cannot be "
            "described."
        ) from None


def _activation(mlp: nn.Module, family: ModelFamily) -> Callable[[torch.Tensor], torch.Tensor]:
    """The activation of an MLP; where a fused one of another library has none, that of its configuration."""
    named = family.activation if family.activation in ACT2FN else None
    name = getattr(getattr(mlp, "config", None), "hidden_act", named)
    if hasattr(mlp, family.activation) or name is None:
        return part_of(mlp, family, "activation")
    return _activation_of_name(name)


@functools.cache
def _activation_of_name(name: str) -> nn.Module:
    return ACT2FN[name]


@dataclasses.dataclass(frozen=True)
class Projection:
    """One role's output channels of a linear: all of them, or a share of a fused one.

    Args:
        module: the linear as it stands in the model, a LoRA layer or a linear.
        share: where the role's channels lie in it; None where the linear is the role's own.
    """

    module: nn.Module
    share: Share | None = None

    @property
    def weight(self) -> FrozenWeight:
        """Frozen weight of the role, ``[out, in]``, as the sparse products take it."""
        weight = frozen_weight(base_linear(self.module))
        if self.share is None:
            return weight
        if isinstance(weight, QuantisedWeight):
            return QuantisedRows(weight, self.share.rows, self.share.width(weight.shape[0]))
        return self.share.take(weight)

    @property
    def bias(self) -> torch.Tensor | None:
        """Frozen bias of the role, ``[out]``."""
        bias = base_linear(self.module).bias
        return bias if bias is None or self.share is None else self.share.take(bias)

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Rows of the linear that hold the role's channels ``index``."""
        return index if self.share is None else self.share.rows(index)

    def product(self, x: torch.Tensor, biased: bool = True) -> torch.Tensor:
        """Output of the frozen linear, with its bias or without: ``[T, in]`` to ``[T, out]``."""
        weight, bias = self.weight, self.bias if biased else None
        dtype = compute_dtype(x, weight)
        bias = None if bias is None else bias.to(dtype)
        return nn.functional.linear(x.to(dtype), read_whole(weight, dtype), bias)


@dataclasses.dataclass(frozen=True)
class MlpView:
    """Projections of an MLP, its activation and the dropout of its output.

    Args:
        inputs: what reads the MLP's input: ``gate`` and ``up``, or ``up`` alone.
        down: what writes its output.
        activation: of the first of `inputs`.
        dropout: probability.
        modules: linears as they stand in the model, by role; a fused one is ``gate_up``.
    """

    inputs: dict[str, Projection]
    down: Projection
    activation: Callable[[torch.Tensor], torch.Tensor]
    dropout: float
    modules: dict[str, nn.Module]

    @classmethod
    def of(cls, mlp: nn.Module, family: ModelFamily) -> "MlpView":
        """Look the parts up in a module."""
        roles = ("gate_up",) if family.gate_up else ("gate", "up") if family.gate else ("up",)
        modules = {role: part_of(mlp, family, role) for role in (*roles, "down")}
        width = _side(mlp, family, "down", "in_features")
        if family.gate_up:
            shares = {"gate": Share(0, width, 2 * width), "up": Share(width, width, 2 * width)}
            inputs = {role: Projection(modules["gate_up"], share) for role, share in shares.items()}
        else:
            inputs = {role: Projection(modules[role]) for role in roles}
        dropout = part_of(mlp, family, "dropout") if family.dropout else 0.0
        return cls(inputs, Projection(modules["down"]), _activation(mlp, family), dropout, modules)

    def is_of(self, mlp: nn.Module, family: ModelFamily) -> bool:
        """Whether this is what `of` would make of a module now."""
        named = mlp._modules
        return (
            all(named.get(getattr(family, role)) is module for role, module in self.modules.items())
            and _activation(mlp, family) is self.activation
            and (not family.dropout or part_of(mlp, family, "dropout") == self.dropout)
        )

    @property
    def width(self) -> int:
        """Number of intermediate channels."""
        return base_linear(self.down.module).in_features

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return base_linear(self.down.module).out_features

    def combine(self, products: Sequence[torch.Tensor]) -> torch.Tensor:
        """Activations from the outputs of `inputs`, ``[T, K]`` each."""
        activated = self.activation(products[0])
        return activated * products[1] if len(products) > 1 else activated

    def channels(self, x: torch.Tensor) -> torch.Tensor:
        """True activations of the frozen weights: ``[T, H]`` to ``[T, N]``."""
        return self.combine([projection.product(x) for projection in self.inputs.values()])

    def kept_inputs(self, index: torch.Tensor) -> list[tuple[nn.Module, torch.Tensor]]:
        """Each linear that reads the input, once, with the rows of it that the channels ``index`` keep."""
        rows: dict[nn.Module, list[torch.Tensor]] = {}
        for projection in self.inputs.values():
            rows.setdefault(projection.module, []).append(projection.rows(index))
        return [(module, torch.cat(parts)) for module, parts in rows.items()]

    def weights(self) -> MlpWeights:
        """Frozen weights, for the MLP without adapters."""
        gate, up = self.inputs.get("gate"), self.inputs["up"]
        return MlpWeights(
            None if gate is None else gate.weight,
            up.weight,
            self.down.weight,
            self.activation,
            None if gate is None else gate.bias,
            up.bias,
            self.down.bias,
        )


@dataclasses.dataclass(frozen=True)
class AttentionView:
    """Projections of an attention module and the layout of its heads.

    Args:
        inputs: ``q``, ``k`` and ``v``.
        o: output projection.
        layout: of the heads.
        modules: linears as they stand in the model, by role; a fused one is ``qkv``.
    """

    inputs: dict[str, Projection]
    o: Projection
    layout: HeadLayout
    modules: dict[str, nn.Module]

    @classmethod
    def of(cls, attention: nn.Module, family: ModelFamily) -> "AttentionView":
        """Look the parts up in a module."""
        roles = ("qkv", "o") if family.qkv else ("q", "k", "v", "o")
        modules = {role: part_of(attention, family, role) for role in roles}
        head_dim = part_of(attention, family, "head_dim")
        heads = _side(attention, family, "o", "in_features") // head_dim
        if family.qkv:
            fused = _side(attention, family, "qkv", "out_features")
            layout = HeadLayout(heads, (fused // head_dim - heads) // 2, head_dim)
            shares = _fused_shares(layout, family.qkv_by_head)
            inputs = {role: Projection(modules["qkv"], share) for role, share in shares.items()}
        else:
            layout = HeadLayout(heads, _side(attention, family, "k", "out_features") // head_dim, head_dim)
            inputs = {role: Projection(modules[role]) for role in "qkv"}
        return cls(inputs, Projection(modules["o"]), layout, modules)

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return base_linear(self.o.module).out_features

    def fused_rows(self, sets: dict[str, ChannelSelection], device: torch.device) -> torch.Tensor:
        """Rows of a fused projection that the sets ``qk`` and ``vo`` keep, sorted; without a set all of its rows."""
        everything = torch.arange(self.layout.kv_width, device=device)
        whole = ChannelSelection.of(everything, self.layout)
        qk, vo = sets.get("qk", whole), sets.get("vo", whole)
        kept = {"q": qk.wide, "k": qk.narrow, "v": vo.narrow}
        return torch.cat([self.inputs[role].rows(index) for role, index in kept.items()]).sort().values

    def project(self, role: str, x: torch.Tensor) -> torch.Tensor:
        """``x Wᵀ`` of the frozen projection ``q``, ``k`` or ``v``, without its bias."""
        return self.inputs[role].product(x, biased=False)


def _fused_shares(layout: HeadLayout, by_head: bool) -> dict[str, Share]:
    """Where queries, keys and values lie in a fused projection, which has them in this order."""
    blocks = layout.kv_heads if by_head else 1
    spans = [layout.heads * layout.head_dim // blocks, *[layout.kv_width // blocks] * 2]
    firsts = [0, spans[0], spans[0] + spans[1]]
    return {role: Share(first, span, sum(spans)) for role, first, span in zip("qkv", firsts, spans, strict=True)}
