"""Views of a decoder layer: its projections by role, whatever the family calls them, seen through LoRA layers."""

import dataclasses
from collections.abc import Callable

import torch
from torch import nn

from .channels import HeadLayout
from .families import ModelFamily
from .ops.linear import compute_dtype
from .ops.quant import frozen_weight, read_whole

__all__ = ["AttentionView", "MlpView", "base_linear"]


def base_linear(module: nn.Module) -> nn.Module:
    """The frozen linear of a projection: PEFT's base layer where the projection carries an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


@dataclasses.dataclass(frozen=True)
class MlpView:
    """Projections of a gated MLP, as they stand in the model (a LoRA layer or a linear), and its activation."""

    gate: nn.Module
    up: nn.Module
    down: nn.Module
    activation: Callable[[torch.Tensor], torch.Tensor]

    @classmethod
    def of(cls, mlp: nn.Module, family: ModelFamily) -> "MlpView":
        """Look the parts up in a module: nothing is kept, so a copied model never reaches into its original."""
        return cls(*(getattr(mlp, name) for name in (family.gate, family.up, family.down, family.activation)))

    @property
    def width(self) -> int:
        """Number of intermediate channels."""
        return base_linear(self.gate).out_features

    def channels(self, x: torch.Tensor) -> torch.Tensor:
        """True activations ``act(x W_gᵀ) ⊙ (x W_uᵀ)`` of the frozen weights: ``[T, H]`` to ``[T, N]``."""
        gate, up = (_product(base_linear(module), x, biased=True) for module in (self.gate, self.up))
        return self.activation(gate) * up


@dataclasses.dataclass(frozen=True)
class AttentionView:
    """Projections of an attention module, as they stand in the model, and the layout of its heads."""

    q: nn.Module
    k: nn.Module
    v: nn.Module
    o: nn.Module
    layout: HeadLayout

    @classmethod
    def of(cls, attention: nn.Module, family: ModelFamily) -> "AttentionView":
        """Look the parts up in a module."""
        q, k, v, o = (getattr(attention, name) for name in (family.q, family.k, family.v, family.o))
        head_dim = attention.head_dim
        q_width, kv_width = (base_linear(module).out_features for module in (q, k))
        return cls(q, k, v, o, HeadLayout(q_width // head_dim, kv_width // head_dim, head_dim))

    def project(self, role: str, x: torch.Tensor) -> torch.Tensor:
        """``x Wᵀ`` of the frozen projection ``q``, ``k`` or ``v``, without its bias."""
        return _product(base_linear(getattr(self, role)), x, biased=False)


def _product(linear: nn.Module, x: torch.Tensor, biased: bool) -> torch.Tensor:
    weight = frozen_weight(linear)
    dtype = compute_dtype(x, weight)
    bias = linear.bias if biased else None
    return nn.functional.linear(x.to(dtype), read_whole(weight, dtype), None if bias is None else bias.to(dtype))
