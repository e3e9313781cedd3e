"""Nothing grows as training goes on."""

import gc
import weakref

import psutil
import pytest
import torch
from helpers import SPARSE, lora_model, loss_and_gradients, make_batch
from training import examples, make_trainer, trained
from transformers import TrainerCallback
from zoo import zoo_lora

from sparselora_hf import SparseLoraConfig, sparsify


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
    census, model = _Census(100, 500), lora_model(layers=2)
    settings = {"data": examples(8), "learning_rate": 0.0, "per_device_train_batch_size": 1, "logging_steps": 250}
    config = SPARSE.replace(criterion=criterion, attention_sparsity=0.5, mlp_sparsity=0.9)
    trainer = make_trainer(tmp_path, config, model=model, max_steps=500, callbacks=[census], **settings)
    trainer.remove_callback(trainer.recorder)
    trainer.train()
    assert census.tensors[1] <= census.tensors[0]
    assert census.bytes[1] - census.bytes[0] < 4 * 2**20
    assert len(trainer.sparse_handle.state.calibration.reservoir) == 0
    trainer.sparse_handle.restore()
    dense = trained(tmp_path, model=lora_model(layers=2), max_steps=1, **settings)
    assert makeup(model) == makeup(dense.model)


def makeup(model) -> dict:
    """Class, attributes, children and number of hooks of every module."""
    return {
        name: (type(m), sorted(vars(m)), list(m._modules), len(m._forward_hooks), len(m._forward_pre_hooks))
        for name, m in model.named_modules()
    }


class _StateAfterStep(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, **kwargs):
        sparse = self.trainer.sparse_handle.state
        self.seen.append((sparse.batch, sparse.pinned, sparse.head_rows))


def test_a_batch_is_let_go_with_its_step(tmp_path):
    watch = _StateAfterStep()
    watch.trainer = make_trainer(tmp_path, SPARSE.replace(start_step=0), max_steps=2, callbacks=[watch])
    watch.trainer.train()
    assert watch.seen == [(None, False, None)] * 2


def test_channel_sets_of_a_batch_go_with_it():
    """Slices of the weights hang on them."""
    model = lora_model(layers=2)
    with sparsify(model, SPARSE.replace(mlp_sparsity=0.97)) as handle:
        handle.set_enabled(True)
        loss_and_gradients(model, make_batch())
        sets = [weakref.ref(selection) for selection in handle.state.batch.selections.values()]
        handle.state.end()
        gc.collect()
        assert len(sets) == 4
        assert not any(selection() for selection in sets)


class _Watched(torch.autograd.Function):
    """Does nothing; what is given with it lives as long as the graph."""

    @staticmethod
    def forward(ctx, x, thing):
        ctx.thing = thing
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def test_the_next_forward_lets_go_of_one_that_ended_in_an_error(batch):
    """Memory that was short between queries and values is there for a smaller batch."""
    model, graphs, alive = zoo_lora("qwen3"), [], []
    first, second = model.base_model.model.model.layers

    def watch(module, args, output):
        thing = type("Thing", (), {})()
        graphs.append(weakref.ref(thing))
        return _Watched.apply(output, thing)

    with sparsify(model, SparseLoraConfig()):
        broken = second.self_attn.q_norm.register_forward_pre_hook(lambda *_: 1 / 0)
        with first.register_forward_hook(watch), broken, pytest.raises(ZeroDivisionError):
            model(**batch)
        gc.collect()  # the error's frames
        first.mlp.register_forward_pre_hook(lambda *_: alive.append(graphs[0]() is not None))
        model(**batch)
    assert alive == [False]
