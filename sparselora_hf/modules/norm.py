"""Hook on the decoder's final norm: hands on the rows that enter the loss and no others."""

import torch
from torch import nn

from ..state import SparseState

__all__ = ["CompactHook"]


class CompactHook:
    """Forward pre-hook: hidden states ``[B, S, H]`` become the rows ``[1, L, H]`` that the state asks for.

    A decoder may call the same norm on its embeddings, too: nothing is left out before the last layer has been called.
    """

    def __init__(self, state: SparseState) -> None:
        self.state = state

    def register(self, norm: nn.Module, last: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
        """Put hooks on the norm and on the last layer; returns what removes them."""
        return [last.register_forward_pre_hook(self.reach), norm.register_forward_pre_hook(self)]

    @torch.compiler.disable
    def reach(self, module: nn.Module, args: tuple) -> None:
        """Note that the last layer is called."""
        if self.state.batch is not None:
            self.state.batch.is_at_last_layer = True

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple) -> tuple | None:
        """Replace the norm's input."""
        rows = self.state.head_rows
        if rows is None or self.state.batch is None or not self.state.batch.is_at_last_layer:
            return None
        hidden, *rest = args
        return (hidden.reshape(-1, hidden.shape[-1])[rows.to(hidden.device)][None], *rest)
