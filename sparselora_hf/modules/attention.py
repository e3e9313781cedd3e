"""Hook on an attention module: picks the channel sets of its projections before the family's own code runs.

Families that normalise queries and keys after the projection (Qwen3, Gemma 3, OLMo 2, EXAONE 4) keep all of their
channels and drop values alone: the norm puts the energy of the dropped channels into the kept ones, so that keys grow
where they should shrink. Measured on `babyllama361` with Qwen3's norms, trained for 250 steps of 16 x 128 tokens to a
loss of 0.896: context of 96 tokens, 3 of 5 layers sparse, oracle sets, loss of the 32 tokens behind it above the dense
model's at sparsity 0.25 / 0.5 / 0.75:

* values alone +0.009 / +0.039 / +0.109,
* queries and keys alone +0.002 / +0.046 / +0.492; without norms (the checkpoint as it is) they cost less than values,
* scaled back by the kept share of a head's energy +0.002 / +0.031 / +0.222, of each token's +0.001 / +0.020 / +0.212,
* all four +0.012 / +0.071 / +0.449.

At the sparsities of the paper's schedules even a correction that knows every token's norm leaves twice the damage of
the values, so there is none.
"""

import torch
from torch import nn

from ..channels import ChannelSelection
from ..state import LayerLink
from ..views import AttentionView
from .lora import unmerge_disabled

__all__ = ["AttentionHook"]


class AttentionHook:
    """Forward pre-hook; it holds no module, so a deep copy of the model works on its own weights.

    Args:
        link: the attention module's.
        kinds: sets to choose, ``qk`` and ``vo``, or ``vo`` alone.
    """

    def __init__(self, link: LayerLink, kinds: tuple[str, ...]) -> None:
        self.link = link
        self.kinds = kinds

    @torch.compiler.disable
    @torch.no_grad()
    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Choose the sets of this layer for the batch in hand, once per micro-batch."""
        link = self.link
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        flat = hidden.reshape(-1, hidden.shape[-1])
        link.observe("attention", flat)
        rows = link.rows(hidden, module.training)
        if rows is None or not len(rows.sparse) or (link.layer, "vo") in link.state.batch.selections:
            return
        self._select(AttentionView.of(module, link.family), flat, rows.sparse)

    def _select(self, view: AttentionView, x: torch.Tensor, rows: torch.Tensor) -> None:
        link, batch, criterion = self.link, self.link.state.batch, self.link.state.criterion
        unmerge_disabled(view.modules.values())
        x = criterion.sample(x, rows, batch.plan.sequence, batch.plan.groups)
        score = {"qk": criterion.qk, "vo": criterion.vo}
        for kind in self.kinds:
            link.state.select(link.layer, kind, score[kind](link.layer, view, x, batch.step), link.keep, view.layout)
        if "qkv" in view.modules:
            sets = {kind: batch.selections[link.layer, kind] for kind in self.kinds}
            batch.selections[link.layer, "qkv"] = ChannelSelection.of(view.fused_rows(sets, x.device))
