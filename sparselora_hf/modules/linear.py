"""A frozen linear that computes all channels for output rows and the kept ones for context rows."""

import torch

from ..ops.context import add_stand_in, context_linear
from ..ops.quant import frozen_weight
from ..ops.rows import fork_rows, overlay_rows
from ..state import Rows
from .classes import Patched, link_of

__all__ = ["SparseLinear"]


class SparseLinear(Patched):
    """Mixin for the base linear of a q, k, v, fused qkv or o projection.

    Only products are dropped: a bias costs nothing and is added to every channel of every row.
    """

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """``[..., in]`` to ``[..., out]``; rows that the batch does not need come back as zero."""
        link = link_of(self)
        if link.role == "o" and link.state.config.compensation == "low_rank":
            link.observe("o", x.detach().reshape(-1, x.shape[-1]), self.training)
        rows = link.rows(x, self.training)
        if rows is None:
            return self.dense_forward(x, *args, **kwargs)
        flat = x.reshape(-1, x.shape[-1])
        whole, few = fork_rows(flat, rows.dense, apart=True)
        y_dense = self.dense_forward(few, *args, **kwargs)
        # a 4-bit linear computes in a type of its own and answers in that of its input
        y = self._context(whole, rows).to(y_dense.dtype)
        y = overlay_rows(y, y_dense, rows.dense, apart=True)
        # as a linear does it: an adapter's branch may be added in place, which on a view would copy gradients
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))

    def _context(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """All rows ``[T, out]``, of which the context rows alone are computed."""
        link, covered = link_of(self), len(rows.dense) + len(rows.sparse)
        # where there is no context row, no channel set was chosen
        index = link.channels() if len(rows.sparse) else rows.sparse
        options = {"over_outputs": link.role != "o", "covered": covered, "kernels": link.state.config.kernels}
        y = context_linear(x, rows.sparse, frozen_weight(self), index, self.bias, **options)
        stand_in = link.state.calibration.factor_stand_ins.get((link.layer, link.role))
        if stand_in is None or not len(rows.sparse):
            return y
        return add_stand_in(y, x, index, stand_in.down, stand_in.up, over_outputs=link.role != "o")
