"""A decoder layer that is replayed as CUDA graphs where its batch has been met before."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from ..state import SparseState
from .checkpointing import Exchange
from .classes import Patched, Patches, has_own_forward, link_of

__all__ = ["GraphedCheckpoints", "graphed_layers"]

_CHECKPOINT = "_sparselora_checkpoint"
_RECORDED = {"use_reentrant": False, "preserve_rng_state": True}  # the way of checkpointing that is recorded


class GraphedLayer(Patched):
    """Mixin of a decoder layer; its link is the model's state and the layer's number."""

    def forward(self, *args, **kwargs):
        """As the family's."""
        state, number = link_of(self)
        func, checkpointed = self.__dict__.pop(_CHECKPOINT, None), None
        if func is not None:
            checkpointed = functools.partial(func, functools.partial(self.dense_forward, **kwargs), *args)
        return state.graphs.run(self, number, state, self.dense_forward, args, kwargs, checkpointed)


class GraphedCheckpoints(Exchange):
    """Checkpointed layers are recorded and replayed with what they recompute."""

    def other(self, layer: nn.Module, func: Callable) -> Callable | None:
        """With the same keywords."""
        if not isinstance(layer, GraphedLayer) or not self.state.batch.may_replay:
            return None
        keywords = getattr(func, "keywords", {})
        if getattr(func, "func", None) is not checkpoint or {"preserve_rng_state": True} | keywords != _RECORDED:
            return None
        return functools.partial(_run_checkpointed, layer, func, **keywords)


def _run_checkpointed(layer: nn.Module, func: Callable, run: functools.partial, *args, **keywords) -> Any:
    """Run a layer, which checkpoints itself where it is not replayed: its own hooks are called once either way.

    Args:
        layer: the layer.
        func: what would checkpoint it.
        run: what `func` would be given: the layer's call, with what it is given by name.
        args: what the layer is given by place.
        keywords: of `func`, for those who look at them.
    """
    layer.__dict__[_CHECKPOINT] = func
    try:
        return run(*args)
    finally:
        layer.__dict__.pop(_CHECKPOINT, None)


def graphed_layers(state: SparseState, layers: Iterable[tuple[int, nn.Module]]) -> Patches:
    """Let layers be recorded and replayed.

    Args:
        state: the model's.
        layers: numbers and layers; those whose forward others have replaced are left alone.

    Returns:
        What undoes it.
    """
    patches = Patches()
    for number, layer in layers:
        if not has_own_forward(layer):
            patches.add(layer, GraphedLayer, (state, number))
    return patches
