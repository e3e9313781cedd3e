"""A gated MLP that computes all channels for output rows and the kept ones for context rows."""

import torch

from ..channels import ChannelSelection, top_channels
from ..ops.linear import gathered_columns, gathered_rows
from ..ops.mlp import MlpWeights, kept_mlp
from ..ops.quant import frozen_weight
from ..ops.rows import fork_rows, join_rows, overlay_rows
from ..state import Rows
from ..views import MlpView, base_linear
from .classes import Patched, link_of
from .lora import has_branch, kept_inputs, kept_outputs

__all__ = ["SparseMlp"]


class SparseMlp(Patched):
    """Mixin for the MLP of a decoder layer. Output rows run the family's own forward, adapters and all."""

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """``[..., H]`` to ``[..., H]``; rows that the batch does not need come back as zero or as context rows."""
        link, flat = link_of(self), x.reshape(-1, x.shape[-1])
        link.observe("mlp", flat.detach(), self.training)
        rows = link.rows(x, self.training)
        if rows is None:
            return self.dense_forward(x, *args, **kwargs)
        if not len(rows.sparse):
            dense = self.dense_forward(flat.index_select(0, rows.dense), *args, **kwargs)
            return join_rows(dense, dense[:0], rows.dense, rows.sparse, len(flat)).view(x.shape)
        whole, few = fork_rows(flat, rows.dense)
        sparse, dense = self._sparse(whole, rows), self.dense_forward(few, *args, **kwargs)
        # a 4-bit linear computes in a type of its own and answers in that of its input
        return overlay_rows(sparse.to(dense.dtype), dense, rows.dense).view(x.shape)

    def _sparse(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """All rows ``[T, H]`` on the channels that suit the context rows best."""
        link = link_of(self)
        view, stand_in = MlpView.of(self, link.family), link.state.calibration.stand_ins.get(link.layer)
        index = self._selection(view, x, rows).narrow
        linears = [base_linear(module) for module in (view.gate, view.up, view.down)]
        gate, up, down = map(frozen_weight, linears)
        biases = [linear.bias for linear in linears]
        if not any(has_branch(module) for module in (view.gate, view.up, view.down)):
            return kept_mlp(x, MlpWeights(gate, up, down, view.activation, *biases), index, stand_in)
        g = kept_outputs(view.gate, x, gathered_rows(x, gate, index, biases[0]), index)
        u = kept_outputs(view.up, x, gathered_rows(x, up, index, biases[1]), index)
        hidden = view.activation(g) * u  # [T, K]
        output, given_up = (0.0, 0.0) if stand_in is None else stand_in.correction(x.to(hidden.dtype), index)
        y = gathered_columns(hidden - given_up, down, index, biases[2]) + output
        return kept_inputs(view.down, hidden, y, index)

    @torch.no_grad()
    def _selection(self, view: MlpView, x: torch.Tensor, rows: Rows) -> ChannelSelection:
        link = link_of(self)
        batch, criterion = link.state.batch, link.state.criterion
        key = (link.layer, "mlp")
        if key not in batch.selections:  # recomputation meets the set of the first forward
            context = criterion.sample(x, rows.sparse, batch.plan.sequence, batch.plan.groups)
            scores = criterion.mlp(link.layer, view, context, batch.step)
            batch.selections[key] = ChannelSelection.of(top_channels(scores, link.keep))
        return batch.selections[key]
