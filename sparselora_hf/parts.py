"""The parts of a decoder layer that can be sparse, its attention and its MLP, and what becomes of each."""

import dataclasses

import torch
from torch import nn

from .config import SparseLoraConfig
from .decoder import Layer
from .families import ModelFamily
from .handle import Decision
from .layers import kept_channels
from .modules.lora import has_bare_matrices, ignores_base, is_plain_lora, is_trained_whole, rewrites_weight
from .ops.quant import why_unreadable
from .views import AttentionView, MlpView, base_linear
from .worth import Worth, attention_worth, mlp_worth, relative_rate

__all__ = ["Part", "attention_part", "decide", "mlp_part", "stand_in_rank"]

_MLP = ("gate", "up", "gate_up", "down")
_UNDESCRIBED = "it has no q, k, v and o that could drop channels"
_NORMALISED = "v and o alone: queries and keys are normalised"


@dataclasses.dataclass(frozen=True)
class Part:
    """Attention or MLP of one layer.

    Args:
        name: name in the model.
        module: the part.
        modules: its linears by role, as they stand in the model; of what is no attention with projections none.
        kinds: channel sets that it keeps: ``mlp``, or ``qk`` and ``vo``, or ``vo`` alone.
        width: its channels (kv channels of an attention).
        hidden: width of the residual stream, which it reads.
        keep: how many of them are to be kept.
        worth: what that would gain.
        note: what the report says of it where it is sparse.
    """

    name: str
    module: nn.Module
    modules: dict[str, nn.Module]
    kinds: tuple[str, ...]
    width: int
    hidden: int
    keep: int
    worth: Worth
    note: str = ""

    @property
    def is_mlp(self) -> bool:
        """Whether the part is an MLP."""
        return self.kinds == ("mlp",)


def attention_part(layer: Layer, family: ModelFamily, config: SparseLoraConfig, normalised: bool) -> Part:
    """The attention of a layer; with `normalised` queries and keys the values alone drop channels."""
    if not layer.attends:
        name = next(name for name, module in layer.module.named_children() if module is layer.attention)
        return Part(f"{layer.name}.{name}", layer.attention, {}, (), 0, 0, 0, Worth(0.0, 0.0, 0.0))
    view = AttentionView.of(layer.attention, family)
    keep = kept_channels(view.layout.kv_width, layer.attention_sparsity)
    kinds = ("vo",) if normalised else ("qk", "vo")
    rank, device = stand_in_rank(config), _device(view.o.module)
    rate = relative_rate(device)
    worth = attention_worth(view.hidden, view.layout, keep, device.type, len(kinds), rank, rate)
    name = f"{layer.name}.{family.attention}"
    note = _NORMALISED if normalised else ""
    return Part(name, layer.attention, view.modules, kinds, view.layout.kv_width, view.hidden, keep, worth, note)


def mlp_part(layer: Layer, family: ModelFamily, config: SparseLoraConfig) -> Part:
    """The MLP of a layer."""
    view = MlpView.of(layer.mlp, family)
    keep = kept_channels(view.width, layer.mlp_sparsity)
    rank, device = stand_in_rank(config), _device(view.down.module)
    rate = relative_rate(device)
    worth = mlp_worth(view.hidden, view.width, keep, rank, device.type, len(view.inputs) + 1, rate)
    name = f"{layer.name}.{layer.mlp_name}"
    return Part(name, layer.mlp, view.modules, ("mlp",), view.width, view.hidden, keep, worth)


def stand_in_rank(config: SparseLoraConfig) -> int:
    """Rank of the stand-ins, 0 where there are none."""
    return config.compensation_rank if config.compensation == "low_rank" else 0


def _device(module: nn.Module) -> torch.device:
    base = base_linear(module)  # of some quantisers it has no `weight`
    return next(tensor.device for tensor in (*base.parameters(), *base.buffers()))


def decide(part: Part, config: SparseLoraConfig) -> Decision:
    """What becomes of a part: sparse, exact savings alone, or dense."""
    otherwise = "exact" if config.exact else "dense"
    obstacle = _why_dense(part)
    if obstacle:
        return Decision(part.name, "dense", part.width, part.width, obstacle)
    if part.keep == part.width:
        return Decision(part.name, otherwise, part.width, part.width)
    if config.dense_if_slower and not part.worth.ever:
        return Decision(part.name, otherwise, part.width, part.width, "would not be faster sparse")
    return Decision(part.name, "sparse", part.width, part.keep, part.note)


def _why_dense(part: Part) -> str:
    """Reason why a part of a layer cannot be sparse; empty where it can."""
    if not part.modules:
        return _UNDESCRIBED
    for role, module in part.modules.items():
        base = base_linear(module)
        if is_trained_whole(module):
            return f"{role} is trained whole, by modules_to_save"
        unreadable = why_unreadable(base)
        if unreadable:
            return f"{role} is {unreadable}"
        if base.weight.requires_grad:
            return f"the weight of {role} is trained"
        if role in _MLP and not is_plain_lora(module):
            return f"the adapter on {role} is not plain LoRA"
        if role in _MLP and part.keep < part.width and has_bare_matrices(module):
            return f"the adapter on {role} is AdaLoRA, which has no branch of kept channels alone"
        if rewrites_weight(module):
            return f"the adapter on {role} is one of target_parameters, which changes the weight itself"
        if ignores_base(module):
            return f"the adapter on {role} is DoRA with dropout, which computes the dense product by itself"
    return ""
