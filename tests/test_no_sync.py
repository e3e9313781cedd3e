"""The sparse step asks the device for nothing that `SFTTrainer` does not ask for.

On a GPU each of these operations makes the host wait until the device has caught up. On a CPU they can be counted.
"""

from collections import Counter

import pytest
import torch
from helpers import SPARSE
from torch.utils._python_dispatch import TorchDispatchMode
from training import make_trainer

# the size of the result, or a number for the host, depends on data
WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique_consecutive",
    "unique_dim",
    "_unique2",
    "equal",
    "is_nonzero",
    "repeat_interleave",
    "bincount",
}
CRITERIA = ["svd", "svd_mean", "sampled", "static", "output", "svd_whitened", "oracle", "random"]


class Waits(TorchDispatchMode):
    """Counts operations that wait for the device."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        if name in WAITING or masks:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def waits_of_a_step(folder, monkeypatch, config, **settings) -> Counter:
    """Waiting operations of the last step of a short training, forward, backward and what the trainer does around."""
    trainer = make_trainer(folder, config, max_steps=3, logging_steps=10, **settings)
    seen = Counter()
    training_step = trainer.training_step

    def watched(*args, **kwargs):
        with Waits() as waits, monkeypatch.context() as patch:
            for name in ("cpu", "numpy", "tolist"):
                original = getattr(torch.Tensor, name)
                patch.setattr(torch.Tensor, name, counted(original, name, waits.seen))
            loss = training_step(*args, **kwargs)
        seen.clear()
        seen.update(waits.seen)
        return loss

    trainer.training_step = watched
    trainer.train()
    return seen


def counted(original, name, seen):
    def call(self, *args, **kwargs):
        seen[name] += 1
        return original(self, *args, **kwargs)

    return call


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    """What a step of `SFTTrainer` waits for."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        return waits_of_a_step(tmp_path_factory.mktemp("dense"), monkeypatch, None)


def test_the_counter_counts():
    with Waits() as waits:
        mask = torch.tensor([True, False])
        torch.arange(2)[mask], torch.ones(1).item(), mask.nonzero()
    assert waits.seen == {"index": 1, "_local_scalar_dense": 1, "nonzero": 1}


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_sparse_step_adds_no_wait(tmp_path, monkeypatch, baseline, criterion):
    config = SPARSE.replace(criterion=criterion)
    added = waits_of_a_step(tmp_path, monkeypatch, config) - baseline
    assert not added


@pytest.mark.parametrize("compensation", ["mean", "low_rank"])
def test_a_stand_in_adds_none(tmp_path, monkeypatch, baseline, compensation):
    config = SPARSE.replace(criterion="static", compensation=compensation, compensation_rank=4)
    assert not waits_of_a_step(tmp_path, monkeypatch, config) - baseline


def test_checkpointing_adds_none(tmp_path, monkeypatch, baseline):
    added = waits_of_a_step(tmp_path, monkeypatch, SPARSE, gradient_checkpointing=True) - baseline
    assert not added
