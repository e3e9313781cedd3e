"""The LoRA branch of a sparse attention projection, zero on dropped channels: the setting ``lora_branch: sliced``.

It saves nothing, since the branch is narrow anyway; it is there to be compared with the dense branch of the paper.
"""

import torch

from ..ops.rows import join_rows, scatter_channels, select_channels, split_rows
from ..state import LayerLink
from .classes import Patched, link_of

__all__ = ["SlicedInput", "SlicedOutput"]


def _slice(link: LayerLink, x: torch.Tensor, training: bool) -> torch.Tensor:
    """``x`` ``[..., C]`` with the dropped channels of its context rows set to zero."""
    rows = link.rows(x, training)
    if rows is None or not len(rows.sparse):
        return x
    flat = x.reshape(-1, x.shape[-1])
    dense, context = split_rows(flat, rows.dense, rows.sparse)
    index = link.channels()
    context = scatter_channels(select_channels(context, index), index, flat.shape[1])
    return join_rows(dense, context, rows.dense, rows.sparse, len(flat)).view(x.shape)


class SlicedOutput(Patched):
    """Mixin for the ``B`` of a q, k or v adapter: dropped output channels are zero."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., r]`` to ``[..., out]``."""
        return _slice(link_of(self), self.dense_forward(x), self.training)


class SlicedInput(Patched):
    """Mixin for the ``A`` of an o adapter: dropped input channels are zero."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in]`` to ``[..., r]``."""
        return self.dense_forward(_slice(link_of(self), x, self.training))
