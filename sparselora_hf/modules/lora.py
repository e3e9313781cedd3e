"""The LoRA branch of an MLP projection on its kept channels: a full-width branch would undo the saving."""

from collections.abc import Iterable, Iterator

import torch
from torch import nn

__all__ = [
    "has_bare_matrices",
    "has_branch",
    "ignores_base",
    "is_merged",
    "is_plain_lora",
    "is_trained_whole",
    "kept_inputs",
    "kept_outputs",
    "rewrites_weight",
    "unmerge_disabled",
]


def is_plain_lora(module: nn.Module) -> bool:
    """Whether a projection has no adapter, or only adapters whose branch is ``B(A(dropout(x))) · scaling``.

    Those that act now are looked at.
    """
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(module, BaseTunerLayer):
        return True
    if not isinstance(module, LoraLayer) or isinstance(module, ParamWrapper):
        return False
    if module.disable_adapters or module.merged:
        return True
    return not any(name in module.lora_variant for name in module.active_adapters)


def has_bare_matrices(module: nn.Module) -> bool:
    """Whether an adapter's A and B are parameters and no linears, as AdaLoRA's are: no rows can be taken of them."""
    return isinstance(getattr(module, "lora_A", None), nn.ParameterDict)


def rewrites_weight(module: nn.Module) -> bool:
    """Whether an adapter adds to a projection's weight itself in each forward, as PEFT's `target_parameters` do."""
    from peft.tuners.lora.layer import ParamWrapper

    return isinstance(module, ParamWrapper)


def is_trained_whole(module: nn.Module) -> bool:
    """Whether PEFT trains a copy of a projection in its place, as `modules_to_save` has it."""
    from peft.utils import ModulesToSaveWrapper

    return isinstance(module, ModulesToSaveWrapper)


def ignores_base(module: nn.Module) -> bool:
    """Whether an adapter that acts on a projection computes the base product by itself, densely.

    PEFT's DoRA does so with dropout: its norm multiplies the base product of the *dropped* input.
    """
    from peft.tuners.lora.layer import LoraLayer
    from peft.tuners.lora.variants import DoraLinearVariant

    if not isinstance(module, LoraLayer):
        return False
    return any(
        isinstance(module.lora_variant.get(name), DoraLinearVariant)
        and not isinstance(module.lora_dropout[name], nn.Identity)
        for name in module.active_adapters
    )


def _branches(module: nn.Module) -> Iterator[tuple[nn.Module, nn.Module, nn.Module, float]]:
    """A, B, dropout and scaling of every adapter that acts, by PEFT's own rules."""
    from peft.tuners.lora import LoraLayer

    if not isinstance(module, LoraLayer) or module.disable_adapters or module.merged:
        return
    for name in module.active_adapters:
        if name in module.lora_A:
            yield module.lora_A[name], module.lora_B[name], module.lora_dropout[name], module.scaling[name]


def has_branch(module: nn.Module) -> bool:
    """Whether any adapter acts on a projection."""
    return next(_branches(module), None) is not None


def is_merged(module: nn.Module) -> bool:
    """Whether an adapter is merged into a projection's weight; PEFT writes to `data`, which PyTorch does not count."""
    return bool(getattr(module, "merged", False))


def unmerge_disabled(modules: Iterable[nn.Module]) -> None:
    """Take out adapters that are merged and disabled at once, before the weights of these projections are read.

    PEFT does so in its own forwards, which come later or not at all.
    """
    for module in modules:
        if is_merged(module) and module.disable_adapters:
            module.unmerge()


def kept_outputs(module: nn.Module, x: torch.Tensor, y: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Add the branch's kept output channels ``index`` ``[K]`` to ``y`` ``[T, K]``; ``x`` is ``[T, in]``."""
    for a, b, dropout, scaling in _branches(module):
        hidden = a(dropout(x.to(a.weight.dtype)))
        weight = b.weight.index_select(0, index)
        bias = None if b.bias is None else b.bias.index_select(0, index)
        y = y + (nn.functional.linear(hidden, weight, bias) * scaling).to(y.dtype)
    return y


def kept_inputs(module: nn.Module, x: torch.Tensor, y: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Add the branch, fed with its kept input channels ``x`` ``[T, K]`` alone, to ``y`` ``[T, out]``."""
    for a, b, dropout, scaling in _branches(module):
        hidden = nn.functional.linear(dropout(x.to(a.weight.dtype)), a.weight.index_select(1, index))
        y = y + (b(hidden) * scaling).to(y.dtype)
    return y
