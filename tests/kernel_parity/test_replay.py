"""CUDA graphs of decoder layers on a GPU: what is replayed trains as what is launched, bit for bit."""

import pytest
import torch
from looping import CHECKPOINTED, GRAPHS, SETTINGS, batches, loop, train
from torch import nn

from sparselora_hf.graphs.recording import Recording
from sparselora_hf.graphs.series import Graphs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


@pytest.fixture
def launched(monkeypatch):
    """Trains without recordings, on the same rows."""

    def run(*args, **kwargs):
        with monkeypatch.context() as without:
            without.setattr(Graphs, "take", lambda self, batch, form: None)
            return train(*args, device="cuda", **kwargs)

    return run


@pytest.fixture
def replays(monkeypatch):
    """One item for each replay: what is not recorded would be equal, too."""
    done, replay = [], Recording.replay
    monkeypatch.setattr(Recording, "replay", lambda self: done.append(1) or replay(self))
    return done


def assert_equal(one, other):
    assert one[0] == other[0]
    assert all(torch.equal(*pair) for pair in zip(one[1], other[1], strict=True))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_replayed_steps_train_as_launched_ones(launched, replays, settings, autocast):
    steps, config = batches(12, forms=2), GRAPHS.replace(**settings)
    want = launched(config, steps, autocast=autocast)
    assert not replays
    assert_equal(want, train(config, steps, device="cuda", autocast=autocast))
    assert len(replays) >= 6 * 5  # three layers, both ways


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_checkpointed_steps_train_as_launched_ones(launched, replays, settings):
    steps, config = batches(12, forms=2), GRAPHS.replace(**settings)
    options = {"autocast": True, "gather": 2, "checkpointing": CHECKPOINTED, "lora": {"dropout": 0.5}}
    want = launched(config, steps, **options)
    assert not replays
    assert_equal(want, train(config, steps, device="cuda", **options))
    assert len(replays) >= 6 * 5


@pytest.mark.parametrize("gather", [2, 3])
def test_accumulated_gradients_are_those_of_launched_steps(launched, replays, gather):
    steps = batches(12, forms=2)
    assert_equal(launched(GRAPHS, steps, gather=gather), train(GRAPHS, steps, device="cuda", gather=gather))
    assert replays


def test_dropout_is_drawn_as_in_launched_steps(launched, replays):
    options = {"lora": {"dropout": 0.5}}
    assert_equal(launched(GRAPHS, batches(12), **options), train(GRAPHS, batches(12), device="cuda", **options))
    assert replays


def test_dropout_is_drawn_anew_at_each_replay():
    run = loop(GRAPHS, 8, device="cuda", lora={"dropout": 0.5})
    batch = batches(1)[0]
    losses = [run.step(batch, learn=False) for _ in range(8)]
    assert run.figures()["sparselora/replayed"] > 0
    assert len(set(losses[4:])) == 4  # sparse from the third step on, replayed from the fifth


def test_a_layer_that_waits_for_the_device_is_not_recorded(launched, replays, caplog):
    class Reading(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.norm = norm

        def forward(self, x):
            return self.norm(x) * (1 + 0 * x.sum().item())

    def spoil(model):
        layer = model.get_base_model().model.layers[1]
        layer.input_layernorm = Reading(layer.input_layernorm)

    steps = batches(8)
    assert_equal(launched(GRAPHS, steps, change=spoil), train(GRAPHS, steps, device="cuda", change=spoil))
    assert "layer 1 and those above are not made CUDA graphs: it waits for the device" in caplog.text
    assert replays  # of the layer below


@pytest.mark.parametrize("checkpointing", [None, CHECKPOINTED], ids=["kept", "checkpointed"])
def test_recordings_of_many_forms_share_their_memory(checkpointing):
    run = loop(GRAPHS, 200, device="cuda", checkpointing=checkpointing)
    for _ in range(6):
        run.step(batches(1)[0])
    torch.cuda.synchronize()
    one = torch.cuda.memory_reserved()
    for step in range(60):
        run.step(batches(2, forms=2)[step % 2])
    assert torch.cuda.memory_reserved() <= one + 4 * 2**20  # rows and masks of the forms, and no activations
