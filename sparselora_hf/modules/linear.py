"""A frozen linear that computes all channels for output rows and the kept ones for context rows."""

import torch

from ..ops.linear import gathered_columns, gathered_rows
from ..ops.quant import frozen_weight
from ..ops.rows import join_rows, scatter_channels, select_channels, split_rows
from .classes import Patched, link_of

__all__ = ["SparseLinear"]


class SparseLinear(Patched):
    """Mixin for the base linear of a q, k, v, fused qkv or o projection.

    Only products are dropped: a bias costs nothing and is added to every channel of every row.
    """

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """``[..., in]`` to ``[..., out]``; rows that the batch does not need come back as zero."""
        link = link_of(self)
        rows = link.rows(x, self.training)
        if rows is None:
            return self.dense_forward(x, *args, **kwargs)
        flat = x.reshape(-1, x.shape[-1])
        dense, context = split_rows(flat, rows.dense, rows.sparse)
        y_dense = self.dense_forward(dense, *args, **kwargs)
        y_context = self._sparse(context, link.role, link.channels()) if len(rows.sparse) else y_dense[:0]
        joined = join_rows(y_dense, y_context, rows.dense, rows.sparse, len(flat))
        return joined.view(*x.shape[:-1], joined.shape[-1])

    def _sparse(self, x: torch.Tensor, role: str, index: torch.Tensor) -> torch.Tensor:
        weight = frozen_weight(self)
        if role == "o":
            return gathered_columns(select_channels(x, index), weight, index, self.bias)
        y = scatter_channels(gathered_rows(x, weight, index), index, self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)
