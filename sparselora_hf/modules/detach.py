"""Hook on the lowest decoder layer with a trainable parameter: gradients end there, not at the embeddings.

Checkpointing with PEFT makes the embedding's output require a gradient (only the reentrant kind needs that), and
backward then runs through frozen layers for nothing.
"""

import torch
from torch import nn

from ..state import SparseState
from .checkpointing import is_reentrant

__all__ = ["DetachHook"]


class DetachHook:
    """Forward pre-hook: hidden states enter the layer without a gradient while a planned batch is under way.

    Unless a parameter has a part in them: what is below may be unfrozen, or given an adapter, while training goes on.
    Embeddings that the caller gave, and may want the gradient of, are the batch's to know.
    """

    def __init__(self, state: SparseState) -> None:
        self.state = state

    def register(self, layer: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
        """Put the hook on a decoder layer; returns what removes it."""
        return [layer.register_forward_pre_hook(self)]

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple) -> tuple | None:
        """Replace the layer's hidden states, its first argument."""
        batch = self.state.batch
        if batch is None or "frozen_below" not in batch.savings or not args:
            return None
        if is_reentrant(module) or _reaches_parameter(args[0]):
            return None
        return (args[0].detach(), *args[1:])


def _reaches_parameter(x: torch.Tensor) -> bool:
    """Whether the gradient of a tensor is a parameter's too; that of an input made to require one is nobody's."""
    nodes = [x.grad_fn] if x.grad_fn is not None else []
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if isinstance(getattr(node, "variable", None), nn.Parameter):
            return True
        nodes += (new := {parent for parent, _ in node.next_functions if parent is not None} - seen)
        seen |= new
    return False
