"""CUDA graphs of decoder layers, on a CPU by a double that runs anew what a GPU would replay."""

import functools
import unittest.mock
from typing import ClassVar

import pytest
import torch
from helpers import ATTENTION, MLP, SPARSE, lora_model, make_batch

from sparselora_hf import sparsify
from sparselora_hf import state as state_module
from sparselora_hf.graphs import layer as layer_module
from sparselora_hf.graphs import series as series_module


class Rerun:
    """A recording's double: it runs again and writes its results where those of the first time lie."""

    def __init__(self, run, place):
        place.recordings.append(self)
        self._run = run
        retain = functools.partial(torch.autograd.grad, retain_graph=True)  # recording computes nothing
        with unittest.mock.patch("torch.autograd.grad", retain):
            self.outputs = list(run())
        self.replays = 0

    def replay(self):
        self.replays += 1
        for before, now in zip(self.outputs, self._run(), strict=True):
            if before is not None and before is not now:
                before.data.copy_(now)

    def release(self):
        pass


class Here:
    """A place's double."""

    recordings: ClassVar[list] = []

    def __init__(self, device):
        self.device = device

    def clear(self):
        pass


def forgetful(in_hand, state, batch):
    """What Python remembers of the first time, a GPU computes anew each time."""
    batch.selections.clear()
    batch._places = state.criterion._picked = None
    return in_hand(state, batch)


@pytest.fixture
def doubles(monkeypatch):
    """Layers are recorded on a CPU."""
    monkeypatch.setattr(layer_module, "Recording", Rerun)
    monkeypatch.setattr(layer_module.LayerGraph, "release", lambda self: None)
    monkeypatch.setattr(series_module, "Place", Here)
    monkeypatch.setattr(series_module, "_in_hand", functools.partial(forgetful, series_module._in_hand))
    monkeypatch.setattr(state_module, "can_record", lambda device: True)
    monkeypatch.setattr(Here, "recordings", [])
    return Here.recordings


def batches(n: int, forms: int = 1) -> list:
    """Batches of as many shapes by turns, each with tokens of its own."""
    shapes = [((9, 5, 12), (3, 4, 2)), ((7, 8, 3), (2, 2, 5))][:forms]
    return [make_batch(*shapes[step % forms], seed=step) for step in range(n)]


def train(config, steps, *, targets=ATTENTION + MLP, learning_rate=0.05, gather=1, **options):
    """Losses, gradient norms and parameters of a loop with plain gradient descent."""
    model = lora_model(targets=targets, layers=4, **options)
    model.config.use_cache = False
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, learning_rate)
    losses = []
    with sparsify(model, config) as handle:
        handle.begin_run(len(steps))
        for step, batch in enumerate(steps):
            handle.begin_step(step)
            loss = model(**batch).loss
            loss.backward()
            losses.append(loss.item())
            if (step + 1) % gather == 0:
                optimizer.step()
                optimizer.zero_grad()
        handle.end_run()
    return losses, [p.detach().clone() for p in trained]


GRAPHS = SPARSE.replace(mlp_sparsity=0.9, attention_sparsity={"1-3": 0.75}, cuda_graphs=True)
SETTINGS = {
    "the paper's": {},
    "exact savings alone": {"mlp_sparsity": 0.0, "attention_sparsity": 0.0},
    "no exact savings": {"exact": False},
    "output tokens choose": {"criterion": "output", "compensation": "low_rank", "compensation_rank": 4},
    "averages choose": {"criterion": "svd_mean"},
    "fixed sets": {"criterion": "static", "compensation": "mean"},
    "sliced branches": {"lora_branch": "sliced"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("forms", [1, 2])
def test_replayed_steps_train_as_launched_ones(doubles, settings, forms, monkeypatch):
    steps, config = batches(12, forms), GRAPHS.replace(**settings)
    with monkeypatch.context() as without:
        without.setattr(series_module.Graphs, "take", lambda self, batch: None)
        want = train(config, steps)
        assert not doubles
    got = train(config, steps)
    assert sum(recording.replays for recording in doubles) >= 6 * 5  # three layers, both ways
    assert want[0] == got[0]
    assert all(torch.equal(*pair) for pair in zip(want[1], got[1], strict=True))
