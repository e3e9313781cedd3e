"""A check at attach: every patched part is run once beside its dense self, with all channels kept.

A module may look like an MLP and do something else inside (a clamp, another order of gate and up, a dropout that the
family's row does not mention). Such a part is found here, before it trains anything.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .channels import ChannelSelection
from .families import ModelFamily
from .modules.classes import Patched
from .parts import Part
from .plan import IGNORE_INDEX, TokenPlan
from .state import ActiveBatch, Rows, SparseState
from .views import AttentionView, base_linear
from .worth import Worth

__all__ = ["difference"]

_ROWS = 4
_LEAST = 1e-3  # relative: sums in another order differ by less, another function by far more
_QUANTISED = 0.05  # 8-bit linears round their inputs, too


class _WholeBatch(ActiveBatch):
    """A batch that every patched module computes in full, whatever it would gain."""

    def pays(self, worth: Worth) -> bool:
        return True

    def rows(self, device: torch.device, *, sparse: bool, loss_only: bool) -> Rows:
        rows = self.plan.context
        return Rows(rows[:0], rows, skip=False) if sparse else Rows(rows, rows[:0], skip=False)


def difference(state: SparseState, layer: int, part: Part, family: ModelFamily) -> str:
    """Why a patched part is not its dense self at sparsity 0; empty where it is.

    A few random rows go through the part (the MLP, or each linear of an attention) with its adapters. The caller's
    random numbers, the modules' modes and the batch in hand are left as they were.
    """
    linears = {role: base_linear(module) for role, module in part.modules.items()}
    runs = [(role, module, linears[role].in_features) for role, module in part.modules.items()]
    if part.is_mlp:
        runs = [("the MLP", part.module, linears["down"].out_features)]
    weight, before = linears.popitem()[1].weight, state.batch
    batch = _batch(layer, part, family, weight.device)
    try:
        for role, module, width in runs:
            reason = _compare(state, batch, role, module, width, weight)
            if reason:
                return reason
    finally:
        state.batch = before
    return ""


def _batch(layer: int, part: Part, family: ModelFamily, device: torch.device) -> _WholeBatch:
    """A batch of context rows whose channel sets hold every channel."""
    plan = TokenPlan.from_batch(torch.full((1, _ROWS), IGNORE_INDEX)).to(device)
    batch = _WholeBatch(plan, True, frozenset())
    index = torch.arange(part.width, device=device)
    if part.is_mlp:
        batch.selections[layer, "mlp"] = ChannelSelection.of(index)
        return batch
    view = AttentionView.of(part.module, family)
    for kind in ("qk", "vo"):
        batch.selections[layer, kind] = ChannelSelection.of(index, view.layout)
    if "qkv" in view.modules:
        batch.selections[layer, "qkv"] = ChannelSelection.of(view.fused_rows({}, device))
    return batch


def _compare(
    state: SparseState, batch: _WholeBatch, role: str, module: nn.Module, width: int, weight: torch.Tensor
) -> str:
    """Run a module on rows of a width without a batch, as if unpatched, and with one."""
    quantised = not weight.is_floating_point()
    x = torch.randn(1, _ROWS, width, generator=torch.Generator().manual_seed(0))
    x = x.to(weight.device, torch.float32 if quantised else weight.dtype)
    outputs = []
    with torch.no_grad(), _patched_ones_train(module), torch.random.fork_rng([x.device] if x.is_cuda else []):
        for state.batch in (None, batch):
            torch.manual_seed(0)  # a dropout inside draws the same both times
            try:
                outputs.append(module(x))
            except Exception as error:  # whatever it is, the part is not what its row says
                return f"{role} fails on rows of hidden states ({type(error).__name__}: {error})"
            if not isinstance(outputs[-1], torch.Tensor) or outputs[-1].shape[:-1] != x.shape[:-1]:
                return f"{role} does not map rows of hidden states to rows"
    dense, sparse = outputs
    error = float((sparse.float() - dense.float()).norm() / dense.float().norm().clamp(min=1e-30))
    if error <= max(_LEAST, _QUANTISED if quantised else 0.0, 8 * torch.finfo(dense.dtype).eps):
        return ""
    return f"{role} with all channels kept is off by {error:.1%} from its dense self"


@contextmanager
def _patched_ones_train(module: nn.Module) -> Iterator[None]:
    """Patched modules in training mode, where they are sparse; all others, dropout of adapters too, in evaluation."""
    modes = [(child, child.training) for child in module.modules()]
    for child, _ in modes:
        child.training = isinstance(child, Patched)
    try:
        yield
    finally:
        for child, mode in modes:
            child.training = mode
