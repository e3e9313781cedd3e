"""Hook on the decoder: rows padded on their right need no attention mask.

No token looks ahead, so none but padding ever meets padding. Without a mask PyTorch's attention knows that it is
causal and computes half of the square; with one it computes the whole.

In float32 alone: the kernels round gradients differently with grouped queries, no worse with one than with the other,
but 16-bit types show it.
"""

import torch
from torch import nn

from ..state import SparseState

__all__ = ["MaskHook"]


class MaskHook:
    """Forward pre-hook on the decoder, a part of the exact saving ``padding``."""

    def __init__(self, state: SparseState) -> None:
        self.state = state

    def register(self, decoder: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
        """Put the hook on a decoder, unless its tokens look ahead; returns what removes it."""
        config = decoder.config.to_dict()
        if config.get("use_bidirectional_attention") or not config.get("is_causal", True):
            return []
        return [decoder.register_forward_pre_hook(self, with_kwargs=True)]

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Take the mask out of the decoder's arguments."""
        batch, mask = self.state.batch, kwargs.get("attention_mask")
        if batch is None or "padding" not in batch.savings or not batch.plan.right_padded:
            return None
        # position_ids without a mask would be searched for documents packed into a row
        if (
            not isinstance(mask, torch.Tensor)
            or mask.shape != batch.plan.shape
            or kwargs.get("position_ids") is not None
        ):
            return None
        if module.dtype.itemsize < 4 or torch.is_autocast_enabled(mask.device.type):
            return None
        # other implementations take padding out by the mask, or compute the whole square anyway
        return (args, {**kwargs, "attention_mask": None}) if module.config._attn_implementation == "sdpa" else None
