"""The exact saving ``adapters``: plain LoRA layers of attention projections add their branch in place.

PEFT's own forward runs wherever anything is out of the ordinary: another kind of layer or adapter, several of them,
dropout, a bias, mixed types, autocast, arguments, hooks that see the base linear's result.
"""

from collections.abc import Iterable

import torch
from torch import nn

from ..ops.branch import add_branch
from .classes import Patched, Patches

__all__ = ["lean_adapters"]


class _LeanLora(Patched):
    """Mixin of PEFT's LoRA linear."""

    traced = True

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """``[..., in]`` to ``[..., out]``."""
        branch = None if args or kwargs or torch.compiler.is_compiling() else _plain_branch(self, x)
        if branch is None:
            return self.dense_forward(x, *args, **kwargs)
        y = self.base_layer(x)
        a, b, scaling = branch
        if y._is_view() or not y.is_contiguous() or y.dtype != x.dtype:
            return y + nn.functional.linear(nn.functional.linear(x, a), b) * scaling
        return add_branch(y, x, a, b, scaling)


def _plain_branch(layer: nn.Module, x: torch.Tensor) -> tuple[nn.Parameter, nn.Parameter, float] | None:
    """A, B and scaling of a layer's only adapter; None where it is not a plain one, or not alone."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1 or layer.disable_adapters or layer.merged or names[0] in layer.lora_variant:
        return None
    [name] = names
    a, b = layer.lora_A[name], layer.lora_B[name]
    ordinary = all(type(part) is nn.Linear and part.bias is None and not part._forward_hooks for part in (a, b))
    unseen = not layer.base_layer._forward_hooks and not torch.is_autocast_enabled(x.device.type)
    same = x.dtype == a.weight.dtype == b.weight.dtype
    if not (ordinary and unseen and same and isinstance(layer.lora_dropout[name], nn.Identity)):
        return None
    return a.weight, b.weight, layer.scaling[name]


def lean_adapters(modules: Iterable[nn.Module]) -> Patches:
    """Make projections lean that are PEFT's LoRA linears; returns what undoes it."""
    from peft.tuners.lora.layer import Linear

    patches = Patches()
    for module in modules:
        if type(module) is Linear:
            patches.add(module, _LeanLora)
    return patches
