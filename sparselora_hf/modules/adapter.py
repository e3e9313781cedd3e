"""The exact saving ``adapters``: plain LoRA layers of attention projections add their branch in place.

PEFT's own forward runs wherever anything is out of the ordinary: another kind of layer or adapter, several of them,
dropout, a bias, mixed types without autocast, arguments, hooks that see the base linear's result.
"""

from collections.abc import Iterable

import torch
from torch import nn

from ..ops.branch import Branch, add_branch, fork_branch
from ..ops.projection import projection
from .classes import Patched, Patches
from .linear import is_bare, mixed_rows, product_type

__all__ = ["lean_adapters"]


class _LeanLora(Patched):
    """Mixin of PEFT's LoRA linear."""

    traced = True

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """``[..., in]`` to ``[..., out]``."""
        lean = self.training and not (args or kwargs or torch.compiler.is_compiling())
        branch = _plain_branch(self) if lean else None
        dtype = None if branch is None else product_type(x, branch.a, branch.b)
        if dtype is None:
            return self.dense_forward(x, *args, **kwargs)
        base = self._modules["base_layer"]
        if is_bare(base, dtype):
            weight, bias = base._parameters["weight"], base._parameters["bias"]
            return projection(x, weight, bias, dtype, branch, mixed_rows(base, x, dtype))
        through, hidden = fork_branch(x, branch.a, dtype)
        y = base(through)
        if y._is_view() or not y.is_contiguous() or y.dtype != dtype:
            wide = nn.functional.linear(hidden, branch.b.to(dtype)) * branch.scaling
            return (y + wide.view(y.shape)).to(y.dtype)
        return add_branch(y, hidden, branch.b, branch.scaling)


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
    if not isinstance(parts["lora_dropout"]._modules[name], nn.Identity):
        return None
    return Branch(a._parameters["weight"], b._parameters["weight"], layer.scaling[name])


def _is_plain(linear: nn.Module) -> bool:
    """Whether a linear is a product with its weight and nothing else."""
    return type(linear) is nn.Linear and linear._parameters["bias"] is None and not linear._forward_hooks


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
    from peft.tuners.lora.layer import Linear

    kinds = {Linear}
    if is_bnb_available():
        from peft.tuners.lora import bnb

        kinds |= {bnb.Linear8bitLt, *([bnb.Linear4bit] if is_bnb_4bit_available() else [])}
    return kinds
