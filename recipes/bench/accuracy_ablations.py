"""Changes that only the accuracy study makes: they answer a question and are nobody's setting.

`reference_mapping` is how z-lab/sparselora lines channels up under grouped queries, rebuilt from its description:
query scores are pooled as if the heads that share a key stood apart, kept channels are expanded to neighbours, and the
kept value channels index the columns of `o_proj` as they are. With one query head per key it is the same as ours.
"""

import dataclasses
from collections.abc import Callable

import torch

from sparselora_hf import SparseLoraTrainer
from sparselora_hf.channels import ChannelSelection, HeadLayout
from sparselora_hf.collator import PLAN_KEY
from sparselora_hf.criteria import Criterion, SvdCriterion
from sparselora_hf.decoder import decoder_layers
from sparselora_hf.handle import SparseLoraHandle
from sparselora_hf.plan import TokenPlan
from sparselora_hf.state import SparseState
from sparselora_hf.views import AttentionView, MlpView

__all__ = ["STUDY", "StudyTrainer", "apply"]


class ReferenceLayout(HeadLayout):
    """The reference's idea of which query channels a key channel has."""

    def pool_queries(self, scores: torch.Tensor) -> torch.Tensor:
        """``[heads · head_dim]`` to ``[kv_heads · head_dim]``, the groups taken for the outermost axis."""
        return scores.view(self.groups, self.kv_width).square().sum(0).sqrt()

    def expand(self, index: torch.Tensor) -> torch.Tensor:
        """Neighbouring channels for each kept one: ``[K]`` to ``[K · groups]``."""
        return (index[:, None] * self.groups + torch.arange(self.groups, device=index.device)).flatten()


class ReferenceCriterion(SvdCriterion):
    """Scores queries through `ReferenceLayout`."""

    def qk(self, layer: int, view: AttentionView, x: torch.Tensor, step: int) -> torch.Tensor:
        """Scores of key channels, ``[kv]``."""
        return super().qk(layer, dataclasses.replace(view, layout=_reference(view.layout)), x, step)


class PairedCriterion(SvdCriterion):
    """Gives the two channels that RoPE rotates together the same score."""

    def qk(self, layer: int, view: AttentionView, x: torch.Tensor, step: int) -> torch.Tensor:
        """Scores of key channels, ``[kv]``."""
        scores = super().qk(layer, view, x, step).view(view.layout.kv_heads, 2, -1)
        return scores.square().sum(1, keepdim=True).sqrt().expand_as(scores).reshape(-1)


class HeldCriterion(SvdCriterion):
    """Scores the MLP of every tenth batch and holds on to the scores in between."""

    batches = 10

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.held: dict[int, tuple[int, torch.Tensor]] = {}

    def mlp(self, layer: int, view: MlpView, x: torch.Tensor, step: int) -> torch.Tensor:
        """Scores of MLP channels, ``[N]``."""
        taken, scores = self.held.get(layer, (-self.batches, None))
        if step - taken >= self.batches:
            taken, scores = self.held[layer] = step, super().mlp(layer, view, x, step)
        return scores


def _reference(layout: HeadLayout) -> ReferenceLayout:
    return ReferenceLayout(**dataclasses.asdict(layout))


def _reference_sets(selection: dict[str, ChannelSelection], layout: HeadLayout) -> dict[str, ChannelSelection]:
    qk, vo = selection["qk"].narrow, selection["vo"].narrow
    return {"qk": ChannelSelection(qk, _reference(layout).expand(qk)), "vo": ChannelSelection(vo, vo)}


def _whole(kind: str) -> Callable:
    """Keeps all channels of one of the two sets."""

    def change(selection: dict[str, ChannelSelection], layout: HeadLayout) -> dict[str, ChannelSelection]:
        return {**selection, kind: ChannelSelection.of(torch.arange(layout.kv_width), layout)}

    return change


class ChangeSets:
    """Pre-hook that follows the package's own on an attention module and changes the sets that it chose."""

    def __init__(self, state: SparseState, layer: int, layout: HeadLayout, change: Callable) -> None:
        self.state, self.layer, self.layout, self.change = state, layer, layout, change

    def __call__(self, module: torch.nn.Module, args: tuple) -> None:
        """Change the sets of the batch in hand."""
        selections = {} if self.state.batch is None else self.state.batch.selections
        if (self.layer, "qk") in selections:
            chosen = {kind: selections[self.layer, kind] for kind in ("qk", "vo")}
            selections.update({(self.layer, kind): s for kind, s in self.change(chosen, self.layout).items()})


def with_context(plan: TokenPlan, context: torch.Tensor) -> TokenPlan:
    """A plan of the same batch that has other rows as context."""
    rows = torch.arange(plan.shape[0] * plan.shape[1])
    real = rows if plan.real is None else plan.real
    sequence = context // plan.shape[1]
    return dataclasses.replace(
        plan,
        context=context,
        output=real[~torch.isin(real, context)],
        rest=rows[~torch.isin(rows, context)],
        sequence=sequence,
        groups=len(sequence.unique()),
        loss_in_context=bool(torch.isin(plan.loss, context).any()),
    )


def _all_tokens(plan: TokenPlan) -> TokenPlan:
    return with_context(plan, torch.cat([plan.context, plan.output]).sort().values)


def _output_tokens(plan: TokenPlan) -> TokenPlan:
    return with_context(plan, plan.output)


@dataclasses.dataclass(frozen=True)
class Study:
    """A change: another criterion, other channel sets, or other tokens as context."""

    criterion: type[Criterion] | None = None
    sets: Callable | None = None
    plan: Callable[[TokenPlan], TokenPlan] | None = None


STUDY = {
    "reference_mapping": Study(criterion=ReferenceCriterion, sets=_reference_sets),
    "held_sets": Study(criterion=HeldCriterion),
    "rope_pairs": Study(criterion=PairedCriterion),
    "qk_alone": Study(sets=_whole("vo")),
    "vo_alone": Study(sets=_whole("qk")),
    "sparse_outputs_alone": Study(plan=_output_tokens),
    "sparse_outputs_too": Study(plan=_all_tokens),
}


def apply(handle: SparseLoraHandle, name: str | None) -> Study:
    """Take up a change of a sparse model by name; a change of the plan is for the caller to make."""
    if name is None:
        return Study()
    study, state = STUDY[name], handle.state
    if study.criterion is not None:
        state.criterion = study.criterion(state.criterion.factors, state.calibration, state.config)
    if study.sets is not None:
        for layer in decoder_layers(handle.model, state.config, handle.family):
            layout = AttentionView.of(layer.attention, handle.family).layout
            layer.attention.register_forward_pre_hook(ChangeSets(state, layer.number, layout, study.sets))
    return study


class StudyTrainer(SparseLoraTrainer):
    """`SparseLoraTrainer` with one of the changes of `STUDY`, or none."""

    study = Study()

    def change(self, name: str | None) -> None:
        """Take up a change by name."""
        self.study = apply(self.sparse_handle, name)

    def planned(self, plan: TokenPlan) -> TokenPlan:
        """The plan that a batch is trained under."""
        return plan if self.study.plan is None else self.study.plan(plan)

    def training_step(self, model, inputs, *args, **kwargs):
        """One micro-batch under the changed plan."""
        inputs[PLAN_KEY] = self.planned(inputs[PLAN_KEY])
        return super().training_step(model, inputs, *args, **kwargs)
