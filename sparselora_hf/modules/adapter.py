"""The exact saving ``adapters``: plain LoRA layers of attention projections add their branch in place.

Queries, keys and values are computed together where they read the same: the first that is called computes for all.
PEFT's own forward runs wherever anything is out of the ordinary: another kind of layer or adapter, several of them,
dropout, a bias, mixed types without autocast, arguments, hooks on a part of the adapter or that see the base linear's
result.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from ..hooks import has_hooks
from ..ops.branch import Branch, add_branch, fork_branch
from ..ops.projection import Frozen, projections
from .classes import Patched, Patches, has_own_forward, link_of
from .linear import is_bare, mixed_rows, product_type

__all__ = ["lean_adapters"]

_SHARING = ("q", "k", "v")


class _Pending:
    """What one layer computed for others that have not had their turn yet.

    One serves all attentions of a model: where a forward ends in an error in between, the next one's first attention
    lets go of it, and of all activations below that hang on it.
    """

    def __init__(self) -> None:
        self.x: torch.Tensor | None = None
        self.results: dict[nn.Module, torch.Tensor] = {}

    def __reduce__(self):
        return _Pending, ()


class _Shared:
    """LoRA layers that mostly read the same, and what one of them computed for the others.

    Args:
        layers: the layers.
        pending: the model's.
    """

    def __init__(self, layers: list[nn.Module], pending: _Pending) -> None:
        self.layers = layers
        self.pending = pending

    def take(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
        """Result of a layer for ``x``, once, if it was computed already."""
        pending = self.pending
        y = pending.results.pop(layer, None) if pending.x is x else None
        if not pending.results:
            pending.x = None
        return y

    def compute(self, layer: nn.Module, x: torch.Tensor, linear: Frozen, dtype: torch.dtype) -> torch.Tensor:
        """Result of a layer for ``x``, and with it those of the others, unless they had their turn."""
        pending = self.pending
        if pending.x is x or not _is_unwatched(layer):
            return projections(x, [linear], dtype)[0]
        together = {layer: linear}
        for other in self.layers:
            if other is not layer and _is_unwatched(other):
                branch, other_type = _branch_and_type(other, x)
                alike = other_type == dtype and branch.a.dtype == linear.branch.a.dtype
                if alike and is_bare(other._modules["base_layer"], dtype):
                    together[other] = _frozen(other, x, branch, dtype)
        pending.x, pending.results = None, {}
        y, *results = projections(x, list(together.values()), dtype)
        pending.results = dict(zip(list(together)[1:], results, strict=True))
        pending.x = x if results else None
        return y


class _LeanLora(Patched):
    """Mixin of PEFT's LoRA linear; its link is what it shares with others, or None."""

    traced = True

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """``[..., in]`` to ``[..., out]``."""
        if not self.training or args or kwargs or torch.compiler.is_compiling():
            return self.dense_forward(x, *args, **kwargs)
        shared = link_of(self)
        y = None if shared is None else shared.take(self, x)
        if y is not None:
            return y
        branch, dtype = _branch_and_type(self, x)
        if dtype is None:
            return self.dense_forward(x)
        base = self._modules["base_layer"]
        if is_bare(base, dtype):
            linear = _frozen(self, x, branch, dtype)
            return projections(x, [linear], dtype)[0] if shared is None else shared.compute(self, x, linear, dtype)
        through, hidden = fork_branch(x, branch.a, dtype)
        y = base(through)
        if y._is_view() or not y.is_contiguous() or y.dtype != dtype:
            wide = nn.functional.linear(hidden, branch.b.to(dtype)) * branch.scaling
            return (y + wide.view(y.shape)).to(y.dtype)
        return add_branch(y, hidden, branch.b, branch.scaling)


def _branch_and_type(layer: nn.Module, x: torch.Tensor) -> tuple[Branch | None, torch.dtype | None]:
    """A layer's only adapter, and the type of its products with ``x``; no type where PEFT's own forward is to run."""
    branch = _plain_branch(layer)
    return branch, None if branch is None else product_type(x, branch.a, branch.b)


def _frozen(layer: nn.Module, x: torch.Tensor, branch: Branch, dtype: torch.dtype) -> Frozen:
    base = layer._modules["base_layer"]
    weight, bias = base._parameters["weight"], base._parameters["bias"]
    return Frozen(weight, bias, branch, mixed_rows(base, x, dtype))


def _is_unwatched(layer: nn.Module) -> bool:
    """Whether nobody prepares a LoRA layer for its call, which is not to come, or is told of it."""
    seen = layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return layer.training and not seen and not has_own_forward(layer)


# Asked of every projection of every step: parts are read from the dictionaries that `nn.Module.__getattr__` searches.


def _plain_branch(layer: nn.Module) -> Branch | None:
    """A layer's only adapter; None where it is not a plain one, or not alone."""
    parts = layer._modules
    inward = parts["lora_A"]._modules
    names = [name for name in layer.active_adapters if name in inward]
    if len(names) != 1 or layer.disable_adapters or layer.merged or names[0] in layer.lora_variant:
        return None
    [name] = names
    a, b = inward[name], parts["lora_B"]._modules[name]
    if not (_is_plain(a) and _is_plain(b)) or parts["base_layer"]._forward_hooks:
        return None
    dropout = parts["lora_dropout"]._modules[name]
    if not isinstance(dropout, nn.Identity) or has_hooks(dropout):
        return None
    return Branch(a._parameters["weight"], b._parameters["weight"], layer.scaling[name])


def _is_plain(linear: nn.Module) -> bool:
    """Whether a linear is a product with its weight and nothing else."""
    return type(linear) is nn.Linear and linear._parameters["bias"] is None and not has_hooks(linear)


def lean_adapters(attentions: Iterable[Mapping[str, nn.Module]]) -> Patches:
    """Make PEFT's LoRA linears lean, over a plain base or one of bitsandbytes.

    Args:
        attentions: the projections of each, by role.

    Returns:
        What undoes it.
    """
    patches, kinds, pending = Patches(), _kinds(), _Pending()
    for modules in attentions:
        lean = {role: module for role, module in modules.items() if type(module) in kinds}
        sharing = [module for role, module in lean.items() if role in _SHARING]
        shared = _Shared(sharing, pending) if len(sharing) > 1 else None
        for role, module in lean.items():
            patches.add(module, _LeanLora, shared if role in _SHARING else None)
    return patches


def _kinds() -> set[type]:
    """PEFT's LoRA linears whose forward is the base's and a branch added to it."""
    from peft.import_utils import is_bnb_4bit_available, is_bnb_available
    from peft.tuners.lora.layer import Linear

    kinds = {Linear}
    if is_bnb_available():
        from peft.tuners.lora import bnb

        kinds |= {bnb.Linear8bitLt, *([bnb.Linear4bit] if is_bnb_4bit_available() else [])}
    return kinds
