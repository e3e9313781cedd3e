"""Nothing grows as training goes on."""

import gc

import psutil
import pytest
import torch
from helpers import SPARSE, lora_model, snapshot
from training import examples, make_trainer
from transformers import LlamaForCausalLM, TrainerCallback


class _Census(TrainerCallback):
    """Tensors and bytes in memory after so many steps."""

    def __init__(self, *steps):
        self.steps = steps
        self.tensors, self.bytes = [], []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.steps:
            gc.collect()
            self.tensors.append(sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()))
            self.bytes.append(psutil.Process().memory_info().rss)


@pytest.mark.parametrize("criterion", ["svd", "static"])
def test_500_steps_leave_nothing_behind(tmp_path, criterion):
    """Neither tensors nor memory while they run, nor hook, class or attribute once the model is restored."""
    census, model = _Census(100, 500), lora_model(layers=2, intermediate_size=64)
    trained = [p for p in model.parameters() if p.requires_grad]
    before = snapshot(model)
    trainer = make_trainer(
        tmp_path,
        SPARSE.replace(criterion=criterion, attention_sparsity=0.5, mlp_sparsity=0.9),
        model=model,
        data=examples(8),
        max_steps=500,
        learning_rate=0.0,
        per_device_train_batch_size=1,
        logging_steps=250,
        callbacks=[census],
    )
    trainer.remove_callback(trainer.recorder)
    trainer.train()
    assert census.tensors[1] <= census.tensors[0]
    assert census.bytes[1] - census.bytes[0] < 4 * 2**20
    assert len(trainer.sparse_handle.state.calibration.reservoir) == 0
    trainer.sparse_handle.restore()
    assert [p for p in model.parameters() if p.requires_grad] == trained
    left = snapshot(model)
    for name, (kind, attributes, children) in before["modules"].items():
        assert (kind, children) == left["modules"][name][::2]
        new = left["modules"][name][1].keys() - attributes.keys()
        assert new <= ({"forward", "model_tags"} if kind is LlamaForCausalLM else set())  # TRL's own
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


class _StateAfterStep(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, **kwargs):
        sparse = self.trainer.sparse_handle.state
        self.seen.append((sparse.batch, sparse.pinned, sparse.compact))


def test_a_batch_is_let_go_with_its_step(tmp_path):
    watch = _StateAfterStep()
    watch.trainer = make_trainer(tmp_path, SPARSE.replace(start_step=0), max_steps=2, callbacks=[watch])
    watch.trainer.train()
    assert watch.seen == [(None, False, False)] * 2
