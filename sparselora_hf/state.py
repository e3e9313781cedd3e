"""State of one sparse model: whether sparsity is on, the batch in hand, and what was chosen for it.

One `SparseState` belongs to one model. The batch stays until the next one replaces it, because a checkpointed
layer runs its forward again in backward and must then meet the same plan and the same channel sets.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from transformers.utils import logging

from .calibration import Calibration
from .channels import ChannelSelection, HeadLayout, top_channels
from .config import SparseLoraConfig
from .criteria import Criterion
from .distributed import rank_and_world
from .families import ModelFamily
from .graphs.recording import can_record
from .graphs.series import Graphs, Take
from .meter import Meter
from .ops.transfer import to_device
from .plan import PLANNED_BY, TokenPlan
from .views import MlpView
from .worth import Worth

logger = logging.get_logger(__name__)

_WORTH_LEAVING_OUT = 7 / 8  # moving rows costs about an eighth of a 256-wide product on a CPU, less of wider ones
# the set that each module keeps
_SETS = {"q": "qk", "k": "qk", "v": "vo", "o": "vo", "qkv": "qkv", "mlp": "mlp"}

__all__ = ["ActiveBatch", "LayerLink", "Pin", "Rows", "SparseState"]


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of a batch that one module computes: `dense` with all channels, `sparse` with the kept ones.

    Rows in neither are left out; their output is zero. `skip` means that the module runs as if unpatched.
    """

    dense: torch.Tensor
    sparse: torch.Tensor
    skip: bool

    def to(self, device: torch.device) -> "Rows":
        """The same rows on another device, copied without waiting."""
        moved = (part.to(device, non_blocking=True) for part in (self.dense, self.sparse))
        return Rows(*moved, self.skip)


class ActiveBatch:
    """A micro-batch under way: its plan, whether it is sparse, and the channel sets chosen so far.

    Args:
        plan: token plan, on the model's device.
        sparse: whether context tokens use a subset of channels.
        savings: names of the exact savings in force.
        step: number of the micro-batch since the start of training, over all ranks, for random scores.

    Attributes:
        left_out: the savings but those whose rows are too few in this batch: what is dense computes them all the same.
        is_at_last_layer: whether the last layer has been called.
        may_replay: whether layers still to come may be recorded as CUDA graphs, or replayed.
        take: what became of those that came.
    """

    def __init__(self, plan: TokenPlan, sparse: bool, savings: frozenset[str], step: int = 0) -> None:
        self.plan = plan
        self.sparse = sparse and len(plan.context) > 0
        self.savings = savings
        self.step = step
        self.selections: dict[tuple[int, str], ChannelSelection] = {}
        self.gather: tuple[torch.Tensor, torch.Tensor] | None = None  # rows to sample, slots they take
        self.gathered: set[str] = set()
        self.is_at_last_layer = False
        self.may_replay = False
        self.take: Take | None = None
        self.left_out = savings - self._too_few(plan)
        self._rows: dict[tuple[bool, bool, torch.device], Rows] = {}
        self._places: tuple[Rows, torch.Tensor] | None = None

    def twin(self) -> "ActiveBatch":
        """A batch like this one, with rows of its own and no channel set chosen."""
        return ActiveBatch(self.plan.to(self.plan.context.device), self.sparse, self.savings, self.step)

    def output_places(self, rows: Rows) -> torch.Tensor:
        """Where the output tokens lie among the dense rows of a module."""
        if self._places is None or self._places[0] is not rows:  # the layers of a batch have the same ones
            output = self.plan.output.to(rows.dense.device)
            self._places = rows, torch.searchsorted(rows.dense, output)
        return self._places[1]

    def pays(self, worth: Worth) -> bool:
        """Whether a part with this balance is faster sparse for this batch."""
        return worth.pays(len(self.plan.context), self.plan.shape[0] * self.plan.shape[1])

    def rows(self, device: torch.device, *, sparse: bool, loss_only: bool) -> Rows:
        """Rows for a module.

        Args:
            device: device of the module, which may be another than the batch's where layers are spread over devices.
            sparse: the module drops channels for context tokens.
            loss_only: nothing but positions that enter the loss is needed of it (above the last attention).
        """
        sparse = sparse and self.sparse
        loss_only = loss_only and "last_layer" in self.left_out
        key = (sparse, loss_only, device)
        if key not in self._rows:
            self._rows[key] = self._make_rows(sparse, loss_only).to(device)
        return self._rows[key]

    @staticmethod
    def _too_few(plan: TokenPlan) -> set[str]:
        """Savings that cost more, in taking rows out and putting them back, than the rows left out save."""
        most = _WORTH_LEAVING_OUT * plan.shape[0] * plan.shape[1]
        return {name for name, rows in (("last_layer", len(plan.loss)), ("padding", plan.tokens)) if rows > most}

    def _make_rows(self, sparse: bool, loss_only: bool) -> Rows:
        plan = self.plan
        none = plan.context[:0]
        if loss_only:
            return Rows(plan.loss, none, skip=False)
        everything = plan.real is None or "padding" not in self.left_out
        if not sparse:
            return Rows(none, none, skip=True) if everything else Rows(plan.real, none, skip=False)
        # rows are taken apart here anyway: however few, padding is left out
        dense = plan.output if "padding" in self.savings else plan.rest
        return Rows(dense, plan.context, skip=False)


class Pin:
    """The batch that a trainer began, and what it was begun for: its tokens, and all that its plan was made from.

    Args:
        batch: the batch.
        inputs: the model's inputs, with `input_ids` among them.
    """

    def __init__(self, batch: ActiveBatch, inputs: Mapping[str, Any]) -> None:
        self.batch = batch
        tensors = {name: inputs.get(name) for name in ("input_ids", *PLANNED_BY)}
        self._seen = {name: (tensor, getattr(tensor, "_version", 0)) for name, tensor in tensors.items()}

    def fits(self, inputs: Mapping[str, Any]) -> bool:
        """Whether a forward is of this batch: with its labels or none, and what else its plan depends on.

        Without padding a forward may leave out what says where padding is.
        """
        optional = {"labels", "shift_labels"}
        if self.batch.plan.real is None:
            optional |= {"attention_mask", "position_ids"}
        return all(self._is_as_seen(name, inputs.get(name), name in optional) for name in self._seen)

    def _is_as_seen(self, name: str, now: object, optional: bool) -> bool:
        before, version = self._seen[name]
        if now is None:
            return optional or before is None
        if before is None or getattr(before, "_version", 0) != version:
            return False
        return now is before or (_are_tensors(now, before) and torch.equal(now.to(before.device), before))


def _are_tensors(*values: object) -> bool:
    return all(isinstance(value, torch.Tensor) for value in values)


class SparseState:
    """What the patched modules of one model share.

    Args:
        config: the run's configuration.
        criterion: channel criterion with its factors.
        calibration: what dense steps teach.
        meter: totals for the log.
    """

    def __init__(self, config: SparseLoraConfig, criterion: Criterion, calibration: Calibration, meter: Meter) -> None:
        self.config = config
        self.criterion = criterion
        self.calibration = calibration
        self.enabled = False
        self.last_layer_is_sparse = False
        self.withheld: dict[str, str] = {}  # exact savings that the model does not allow, and why
        self.batch: ActiveBatch | None = None
        self.pinned = False  # the trainer began the batch: forwards leave it alone
        self.pinned_to: Pin | None = None  # but those of other inputs than these
        self.set_aside: list[ActiveBatch | None] = []  # batches that wait for forwards without gradients to end
        self.loss_only = False  # the caller promises to read nothing but the loss of a forward
        self.head_rows: torch.Tensor | None = None  # all that the decoder's final norm passes on, None for every row
        self.step = 0
        self.meter = meter
        self._fixed: dict[tuple[int, str], tuple[torch.Tensor, ChannelSelection]] = {}  # scores, and their channels
        self.warned: set[str] = set()  # what this run has been told already
        self.graphs: Graphs | None = None  # recordings of the layers, where they are asked for

    def begin(
        self,
        plan: TokenPlan,
        device: torch.device,
        *,
        loss_only: bool = False,
        routers: bool = False,
        leaf_inputs: bool = False,
    ) -> ActiveBatch:
        """Take up a new micro-batch; the one before is forgotten.

        Args:
            plan: its token plan.
            device: device of the model.
            loss_only: the caller promises to use predictions at loss positions alone, which allows the savings
                ``last_layer`` and ``logits``.
            routers: the loss balances experts, too, over all tokens that no attention mask hides.
            leaf_inputs: the caller gave embeddings whose gradient may be asked for.
        """
        savings = set(self.config.exact) - self.withheld.keys()
        if not loss_only:
            savings -= {"last_layer", "logits"}
        if routers:  # they see every token of every layer, and padding that nothing hides
            savings -= {"last_layer", "padding"} if plan.unmasked else {"last_layer"}
        if plan.loss_in_padding:
            savings -= {"padding"}  # a row that may see no token looks at all of them, in attention written out
        if leaf_inputs:
            savings -= {"frozen_below"}
        if self.last_layer_is_sparse and (plan.loss_in_context or self.calibration.gathers):
            savings -= {"last_layer"}  # its context tokens are scored, or sampled: what goes in must be whole
        self.step += 1
        # numbered as one process would that took the micro-batches of all ranks in turn
        rank, world = rank_and_world()
        records = self.records_on(device)
        plan = plan.rounded() if records else plan  # on the host; a trainer's was rounded by its collator
        on_device, before = plan.to(device), self.batch
        number = (self.step - 1) * world + rank + 1
        self.batch = ActiveBatch(on_device, self.enabled, frozenset(savings), number)
        savings, too_few = self.batch.savings, self.batch.savings - self.batch.left_out
        if self.meter.add(plan, self.batch.sparse, savings, too_few):
            self.warn_once(
                "SparseLoRA: this batch is too small for sparsity to pay on this device, judged by its shapes, so no "
                "channel is dropped. Larger batches may be sparse; with config.replace(dense_if_slower=False) all are."
            )
        self._warn_without_context(plan)
        if self.calibration.gathers and not self.enabled:
            picks, slots = self.calibration.reservoir.draw(len(plan.context), number)
            rows = plan.context[to_device(picks, plan.context.device)]
            self.batch.gather = to_device(rows, device), to_device(slots, device)
        if records:
            if before is not None:
                # whether its backward is still to come is for its forward's results to know
                before.take, before.may_replay = None, False
            self.graphs.meet(self.batch)
            if self.graphs.is_idle:
                self.warn_once(
                    "SparseLoRA: hardly any of the first batches had a shape that had come before, so cuda_graphs "
                    "gains nothing. Pad to one length: pad_to_multiple_of=max_length."
                )
        return self.batch

    def _warn_without_context(self, plan: TokenPlan) -> None:
        if len(plan.context) or not self.config.is_sparse:
            return
        self.warn_once(
            "SparseLoRA: this batch has no context tokens, every token enters the loss or predicts one that does, so "
            "nothing can be sparse. Train on prompt/completion data, or on messages with assistant_only_loss=True; "
            "for plain language modelling SparseLoRA offers its exact savings alone."
        )

    def warn_once(self, message: str) -> None:
        """Warn of what may be so at every step of a run."""
        if message not in self.warned:
            self.warned.add(message)
            logger.warning(message)

    def select(self, layer: int, kind: str, scores: torch.Tensor, keep: int, layout: HeadLayout | None = None) -> None:
        """Choose the channels of highest score for the batch in hand.

        The same scores, which criteria with fixed sets give every time, have the selection that they had before.

        Args:
            layer: number of the layer.
            kind: the set, as in `ActiveBatch.selections`.
            scores: one per channel, of kv width in attention.
            keep: how many are kept.
            layout: heads of an attention.
        """
        known = self._fixed.get((layer, kind))
        if known is None or known[0] is not scores:
            known = scores, ChannelSelection.of(top_channels(scores, keep), layout)
            if self.calibration.scores.get((layer, kind)) is scores:  # any other set goes with its batch
                self._fixed[layer, kind] = known
        self.batch.selections[layer, kind] = known[1]

    def end(self) -> None:
        """Forget the batch: the model is dense until the next `begin`."""
        self.batch = None

    def reset(self) -> None:
        """Forget the batch and switch sparsity off, whatever went before: the model is plain until told otherwise."""
        self.end()
        self.set_aside.clear()
        self._fixed.clear()
        self.enabled = self.pinned = False
        self.pinned_to = self.head_rows = None
        self.forget_graphs()

    def records_on(self, device: torch.device) -> bool:
        """Whether layers are recorded as CUDA graphs on a device: in one process alone."""
        return self.graphs is not None and can_record(device) and rank_and_world()[1] == 1

    def forget_graphs(self) -> None:
        """What layers compute has changed for good: recordings of them no longer hold."""
        if self.graphs is not None:
            self.graphs.clear()


@dataclasses.dataclass
class LayerLink:
    """What a patched module knows: the shared state, its layer's number and its part in the layer.

    Args:
        state: shared state.
        layer: number of the decoder layer.
        role: ``q``, ``k``, ``v``, ``qkv`` (fused), ``o``, ``attention`` or ``mlp``.
        keep: channels kept for context tokens (kv channels in attention); None leaves the module dense.
        last: whether this is the last decoder layer.
        family: family row of the model.
        worth: balance that lets the module run dense where a batch would not be faster sparse; None never does.
        lean: whether an MLP's activations are one function where all channels are computed (`modules.gate`).
        view: what `modules.gate.view_of` found in an MLP last time.
    """

    state: SparseState
    layer: int
    role: str
    keep: int | None
    last: bool
    family: ModelFamily
    worth: Worth | None = None
    lean: bool = False
    view: MlpView | None = dataclasses.field(default=None, repr=False, compare=False)

    def observe(self, part: str, x: torch.Tensor) -> None:
        """Sample the input ``[..., H]`` of a part that will be sparse, once per micro-batch, while steps are dense."""
        batch = self.state.batch
        if batch is None or batch.gather is None or self.keep is None:
            return
        x, key = x.detach(), f"{part}.{self.layer}"
        x = x.reshape(-1, x.shape[-1])
        if key not in batch.gathered:  # recomputation passes here again
            batch.gathered.add(key)
            rows, slots = batch.gather
            self.state.calibration.reservoir.put(key, x.index_select(0, rows.to(x.device)), slots)

    def channels(self) -> torch.Tensor:
        """Kept output channels of this projection (of o its inputs, of an MLP its own) for the batch in hand."""
        selection = self.state.batch.selections[self.layer, _SETS[self.role]]
        return selection.wide if self.role in ("q", "o") else selection.narrow

    def rows(self, x: torch.Tensor, training: bool) -> Rows | None:
        """Rows of the batch in hand for this module with input ``x``; None where it runs as if unpatched."""
        batch = self.state.batch
        if batch is None or not training:
            return None
        sparse = self.keep is not None and (self.worth is None or batch.pays(self.worth))
        rows = batch.rows(x.device, sparse=sparse, loss_only=self.last and self.role in ("q", "o", "mlp"))
        return None if rows.skip else rows
