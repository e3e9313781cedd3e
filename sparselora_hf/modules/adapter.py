"""The exact saving ``adapters``: plain LoRA layers of attention projections add their branch in place.

PEFT's own forward runs wherever anything is out of the ordinary: another kind of layer or adapter, several of them,
dropout, a bias, mixed types without autocast, arguments, hooks that see the base linear's result.
"""

import dataclasses
from collections.abc import Iterable

import torch
from torch import nn

from ..ops.branch import add_branch, fork_branch
from .classes import Patched, Patches

__all__ = ["lean_adapters"]

_AUTOCAST = (torch.float32, torch.float16, torch.bfloat16)  # what autocast casts; it leaves float64 alone


@dataclasses.dataclass(frozen=True)
class _Branch:
    """A and B of the one adapter that acts, its scaling, and the type of its products."""

    a: nn.Parameter
    b: nn.Parameter
    scaling: float
    dtype: torch.dtype


class _LeanLora(Patched):
    """Mixin of PEFT's LoRA linear."""

    traced = True

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """``[..., in]`` to ``[..., out]``."""
        branch = None if args or kwargs or torch.compiler.is_compiling() else _plain_branch(self, x)
        if branch is None:
            return self.dense_forward(x, *args, **kwargs)
        through, hidden = fork_branch(x, branch.a, branch.dtype)
        y = self.base_layer(through)
        if y._is_view() or not y.is_contiguous() or y.dtype != branch.dtype:
            wide = nn.functional.linear(hidden, branch.b.to(branch.dtype)) * branch.scaling
            return (y + wide.view(y.shape)).to(y.dtype)
        return add_branch(y, hidden, branch.b, branch.scaling)


def _plain_branch(layer: nn.Module, x: torch.Tensor) -> _Branch | None:
    """A layer's only adapter; None where it is not a plain one, or not alone."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1 or layer.disable_adapters or layer.merged or names[0] in layer.lora_variant:
        return None
    [name] = names
    a, b = layer.lora_A[name], layer.lora_B[name]
    ordinary = all(type(part) is nn.Linear and part.bias is None and not part._forward_hooks for part in (a, b))
    dtype = _product_type(x, a.weight, b.weight)
    if not ordinary or dtype is None or layer.base_layer._forward_hooks:
        return None
    if not isinstance(layer.lora_dropout[name], nn.Identity):
        return None
    return _Branch(a.weight, b.weight, layer.scaling[name], dtype)


def _product_type(*tensors: torch.Tensor) -> torch.dtype | None:
    """Type in which a linear multiplies these: autocast's, or the one that all have; None where they differ."""
    dtypes, device = {tensor.dtype for tensor in tensors}, tensors[0].device.type
    if torch.is_autocast_enabled(device) and dtypes <= set(_AUTOCAST):
        return torch.get_autocast_dtype(device)
    return dtypes.pop() if len(dtypes) == 1 else None


def lean_adapters(modules: Iterable[nn.Module]) -> Patches:
    """Make PEFT's LoRA linears lean, over a plain base or one of bitsandbytes; returns what undoes it."""
    patches, kinds = Patches(), _kinds()
    for module in modules:
        if type(module) in kinds:
            patches.add(module, _LeanLora)
    return patches


def _kinds() -> set[type]:
    """PEFT's LoRA linears whose forward is the base's and a branch added to it."""
    from peft.import_utils import is_bnb_4bit_available, is_bnb_available
    from peft.tuners.lora import bnb
    from peft.tuners.lora.layer import Linear

    return {
        Linear,
        *([bnb.Linear8bitLt] if is_bnb_available() else []),
        *([bnb.Linear4bit] if is_bnb_4bit_available() else []),
    }
