"""Hooks that carry the batch from a layer's forward to its recomputation.

Checkpointing runs a layer's forward again in backward, with the arguments of the first time. The batch travels among
them, so a layer that is recomputed meets the plan and the channel sets of its own forward, even when other forwards
have come between, and runs dense again where it ran dense.
"""

from collections.abc import Iterable

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..state import SparseState

__all__ = ["RecallHooks"]

_KEY = "sparselora_batch"


class RecallHooks:
    """Forward pre-hooks on the decoder, called once per forward, and on each attention, called each time.

    Decoders hand keyword arguments on to their layers, and layers to attention. A hook on the layer itself would run
    again in recomputation with transformers before 5.17, and then send the batch that is in hand by that time.
    """

    def __init__(self, state: SparseState) -> None:
        self.state = state

    def register(self, decoder: nn.Module, attentions: Iterable[nn.Module]) -> list[RemovableHandle]:
        """Put the hooks on a decoder; returns what removes them."""
        receivers = [attention.register_forward_pre_hook(self.receive, with_kwargs=True) for attention in attentions]
        return [decoder.register_forward_pre_hook(self.send, with_kwargs=True), *receivers]

    @torch.compiler.disable
    def send(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Add the batch in hand to the decoder's arguments."""
        return args, {**kwargs, _KEY: self.state.batch}

    @torch.compiler.disable
    def receive(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Take the batch out of the attention's arguments and make it the one in hand."""
        if _KEY not in kwargs:
            return None
        kwargs = dict(kwargs)
        self.state.batch = kwargs.pop(_KEY)
        return args, kwargs
