"""How a decoder layer is checkpointed, and the exact saving ``recomputation``.

Non-reentrant checkpointing runs a layer's forward again in backward. With the saving, what attention gave is kept
from the first time, a matrix as large as the layer's input that is kept anyway, and the second forward takes it
instead of computing it. Everything else is recomputed, and no number changes by a bit.

On a GPU memory is why one checkpoints, and its attention is fast: the saving is for CPUs.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..families import ModelFamily
from ..state import SparseState
from ..views import part_of

__all__ = ["Exchange", "KeepAttention", "checkpoints", "is_reentrant"]

# q, k and v to output and logarithms of sums; in float32 and 16-bit types, without dropout
_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default

Outputs = list[tuple[torch.Tensor, ...]]


def checkpoints(layer: nn.Module) -> bool:
    """Whether a layer is checkpointed by transformers."""
    return getattr(layer, "gradient_checkpointing", False)


def is_reentrant(layer: nn.Module) -> bool:
    """Whether the layer is checkpointed the reentrant way, which has no backward without an input gradient."""
    keywords = getattr(layer._gradient_checkpointing_func, "keywords", {}) if checkpoints(layer) else None
    return keywords is not None and keywords.get("use_reentrant", True)


class _Keep(TorchDispatchMode):
    """Keeps what attention gives."""

    def __init__(self, kept: Outputs) -> None:
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        if func is _ATTENTION:
            self.kept.append(tuple(output.detach() for output in outputs))
        return outputs


class _Take(TorchDispatchMode):
    """Gives what was kept, in the same order, and computes the rest."""

    def __init__(self, kept: Outputs) -> None:
        super().__init__()
        self.kept = kept
        self.left: Iterator[tuple[torch.Tensor, ...]] = iter(())

    def __enter__(self):
        self.left = iter(self.kept)
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kept = next(self.left, None) if func is _ATTENTION else None
        return func(*args, **(kwargs or {})) if kept is None else kept


def _contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """For the first forward of a checkpointed layer and for its recomputation."""
    kept: Outputs = []
    return _Keep(kept), _Take(kept)


class Exchange:
    """Hooks on the decoder: while it runs on a training batch its layers are checkpointed in another way."""

    def __init__(self, state: SparseState, family: ModelFamily) -> None:
        self.state = state
        self.family = family
        self.exchanged: list[tuple[nn.Module, Callable, Callable]] = []  # layers, what they had, what they were given

    def other(self, layer: nn.Module, func: Callable) -> Callable | None:
        """What is to checkpoint a layer in place of `func`; None leaves it."""
        raise NotImplementedError

    def register(self, decoder: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
        """Put the hooks on a decoder; returns what removes them, and what a forward left that was interrupted."""
        enter = decoder.register_forward_pre_hook(self.enter)
        return [enter, decoder.register_forward_hook(self.leave, always_call=True), self]

    @torch.compiler.disable
    def enter(self, module: nn.Module, args: tuple) -> None:
        """Exchange what checkpoints the layers."""
        self.remove()  # after Ctrl-C no hook has been called
        if self.state.batch is None:
            return
        for layer in part_of(module, self.family, "layers"):
            if checkpoints(layer) and not is_reentrant(layer):
                func = layer._gradient_checkpointing_func
                if (other := self.other(layer, func)) is not None:
                    self.exchanged.append((layer, func, other))
                    layer._gradient_checkpointing_func = other

    @torch.compiler.disable
    def leave(self, module: nn.Module, args: tuple, output: object) -> None:
        """Give back what was exchanged."""
        self.remove()

    def remove(self) -> None:
        """Give the layers back what checkpoints them, unless they have been given something else since."""
        while self.exchanged:
            layer, func, other = self.exchanged.pop()
            if getattr(layer, "_gradient_checkpointing_func", None) is other:
                layer._gradient_checkpointing_func = func


class KeepAttention(Exchange):
    """Layers are checkpointed with the saving; contexts that are a user's own stay."""

    def other(self, layer: nn.Module, func: Callable) -> Callable | None:
        """With its contexts."""
        return None if "context_fn" in func.keywords else functools.partial(func, context_fn=_contexts)
