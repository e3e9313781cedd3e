"""An MLP that computes all channels for output rows and the kept ones for context rows."""

import functools

import torch
from torch import nn

from ..channels import ChannelSelection
from ..ops.activations import activation_kind
from ..ops.linear import gathered_columns, gathered_rows
from ..ops.mixed_mlp import FrozenMlp, mixed_mlp
from ..ops.mlp import Slices, StandIn, kept_mlp
from ..ops.quant import frozen_weight
from ..ops.rows import fork_rows, join_rows, overlay_rows
from ..state import Rows
from ..views import MlpView, base_linear
from .classes import link_of
from .gate import LeanMlp, view_of
from .linear import is_bare, product_type
from .lora import has_branch, is_merged, is_plain_lora, kept_inputs, kept_outputs, unmerge_disabled

__all__ = ["SparseMlp"]


class SparseMlp(LeanMlp):
    """Mixin for the MLP of a decoder layer. Output rows run the family's own forward, adapters and all."""

    traced = False

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """``[..., H]`` to ``[..., H]``; rows that the batch does not need come back as zero or as context rows."""
        link = link_of(self)
        link.observe("mlp", x)
        rows = link.rows(x, self.training)
        if rows is None:
            return self.dense_forward(x, *args, **kwargs)
        if len(rows.sparse):
            frozen = None if args or kwargs else self._frozen(x)
            if frozen is not None:
                return mixed_mlp(x, frozen, rows.dense, functools.partial(self._select, rows))
            unmerge_disabled(view_of(self).modules.values())
            if not self._can_be_sparse():
                return self.dense_forward(x, *args, **kwargs)
        flat = x.reshape(-1, x.shape[-1])
        if not len(rows.sparse):
            dense = self.dense_forward(flat.index_select(0, rows.dense), *args, **kwargs)
            return join_rows(dense, dense[:0], rows.dense, rows.sparse, len(flat)).view(x.shape)
        whole, few = fork_rows(flat, rows.dense)
        if link.state.criterion.reads_output:
            sparse, dense = self._led_by_output(whole, few, rows, *args, **kwargs)
        else:  # recomputation under checkpointing ends inside the latter, before its last product
            sparse, dense = self._sparse(whole, rows), self.dense_forward(few, *args, **kwargs)
        # a 4-bit linear computes in a type of its own and answers in that of its input
        return overlay_rows(sparse.to(dense.dtype), dense, rows.dense).view(x.shape)

    def _frozen(self, x: torch.Tensor) -> FrozenMlp | None:
        """The MLP as frozen weights, if it is no more than that: known by trial, and nobody watches its linears."""
        link, view = link_of(self), view_of(self)
        *inputs, down = view.modules.values()
        if not link.lean or view.dropout or not isinstance(down, nn.Linear):
            return None
        dtype, kind = product_type(x, down.weight), activation_kind(view.activation)
        if kind is None or not all(is_bare(linear, dtype) for linear in (*inputs, down)):
            return None
        stand_in = link.state.calibration.stand_ins.get(link.layer)
        linears = [(linear.weight, linear.bias) for linear in inputs]
        return FrozenMlp(linears, view.weights(), kind, dtype, stand_in, link.state.config.kernels)

    def _select(
        self, rows: Rows, x: torch.Tensor, few: torch.Tensor, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, Slices]:
        """Channels of the batch and their slices, from all rows, the dense ones of them and what those activate."""
        if link_of(self).state.criterion.reads_output:
            self._learn(few, hidden, rows)
        selection = self._selection(view_of(self), x, rows)
        return selection.narrow, selection.slices

    def _can_be_sparse(self) -> bool:
        """Whether adapters are plain, and weights frozen still: products on kept channels give them no gradient."""
        modules = view_of(self).modules.values()
        return all(is_plain_lora(module) and not base_linear(module).weight.requires_grad for module in modules)

    def _led_by_output(self, whole: torch.Tensor, few: torch.Tensor, rows: Rows, *args, **kwargs) -> tuple:
        """Sparse and dense rows, on the channels that the activations of the dense ones ``few`` ask for.

        The sparse rows come in between, before `down` closes the dense ones: recomputation under checkpointing has no
        need of that product, and ends before it.
        """
        sparse = []

        def follow(module: nn.Module, inputs: tuple) -> None:
            with torch.no_grad():
                self._learn(few, inputs[0], rows)
            sparse.append(self._sparse(whole, rows))

        view = view_of(self)
        hook = view.modules["down"].register_forward_pre_hook(follow)
        try:
            dense = self.dense_forward(few, *args, **kwargs)
        finally:
            hook.remove()
        if not sparse:  # the forward of another library may pass `down` by
            with torch.no_grad():
                hidden = view.channels(few)
            follow(self, (hidden,))
        return sparse[0], dense

    def _learn(self, x: torch.Tensor, hidden: torch.Tensor, rows: Rows) -> None:
        """Choose the batch's channels by the activations ``[A, N]`` of its dense rows ``x`` ``[A, H]``."""
        link = link_of(self)
        batch, criterion = link.state.batch, link.state.criterion
        if (link.layer, "mlp") not in batch.selections:  # recomputation meets the set of the first forward
            hidden = hidden.reshape(-1, hidden.shape[-1])
            self._choose(criterion.mlp_of_output(link.layer, x, hidden, batch.output_places(rows)))

    def _choose(self, scores: torch.Tensor) -> None:
        link = link_of(self)
        link.state.select(link.layer, "mlp", scores, link.keep)

    def _sparse(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """All rows ``[T, H]`` on the channels that suit the context rows best."""
        link = link_of(self)
        view, stand_in = view_of(self), link.state.calibration.stand_ins.get(link.layer)
        with torch.no_grad():
            selection = self._selection(view, x, rows)
        if any(has_branch(module) or _trains_bias(module) for module in view.modules.values()):
            y = self._with_branches(view, x, selection.narrow, stand_in)
        else:
            kernels = link.state.config.kernels
            slices = None if any(map(is_merged, view.modules.values())) else selection.slices
            y = kept_mlp(x, view.weights(), selection.narrow, stand_in, kernels, slices)
        return nn.functional.dropout(y, view.dropout) if view.dropout else y

    def _with_branches(
        self, view: MlpView, x: torch.Tensor, index: torch.Tensor, stand_in: StandIn | None
    ) -> torch.Tensor:
        products = []  # [T, K] for each input
        for module, rows in view.kept_inputs(index):
            base = base_linear(module)
            y = kept_outputs(module, x, gathered_rows(x, frozen_weight(base), rows, base.bias), rows)
            products += y.split(len(index), 1)
        hidden, down = view.combine(products), view.down  # [T, K]
        output, given_up = (0.0, 0.0) if stand_in is None else stand_in.correction(x.to(hidden.dtype), index)
        y = gathered_columns(hidden - given_up, down.weight, index, down.bias) + output
        return kept_inputs(view.down.module, hidden, y, index)

    def _selection(self, view: MlpView, x: torch.Tensor, rows: Rows) -> ChannelSelection:
        link = link_of(self)
        batch, criterion = link.state.batch, link.state.criterion
        key = (link.layer, "mlp")
        if key not in batch.selections:  # recomputation meets the set of the first forward
            of_plan = batch.plan.sequence, batch.plan.groups
            self._choose(criterion.mlp_of_context(link.layer, view, x, rows.sparse, batch.step, *of_plan))
        return batch.selections[key]


def _trains_bias(module: nn.Module) -> bool:
    """Whether the bias of a projection has a gradient, as PEFT's ``bias="all"`` has it."""
    bias = base_linear(module).bias
    return bias is not None and bias.requires_grad
