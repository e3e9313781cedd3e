import contextlib

import pytest
import torch
from helpers import ATTENTION, MLP, SPARSE, lora_model, loss_and_gradients, make_batch
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import VARIED, zoo_lora

from sparselora_hf import SparseLoraConfig, sparsify
from sparselora_hf.config import EXACT_SAVINGS
from sparselora_hf.views import base_linear

LESS = tuple(name for name in EXACT_SAVINGS if name != "recomputation")


def products_in_backward(model, batch) -> int:
    """How often `down_proj` runs again in the backward pass of a checkpointed model of three layers."""
    calls = []
    for layer in model.get_base_model().model.layers:
        base_linear(layer.mlp.down_proj).register_forward_hook(lambda *_: calls.append(1))
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    loss = model(**batch).loss
    assert len(calls) == 3
    loss.backward()
    return len(calls) - 3


@pytest.mark.parametrize(
    ("targets", "again"), [(ATTENTION, 0), (ATTENTION + MLP, 3)], ids=["frozen down_proj", "adapter on down_proj"]
)
@pytest.mark.parametrize(
    "config",
    [None, SparseLoraConfig(), SPARSE, SPARSE.replace(criterion="output")],
    ids=["plain model", "exact", "sparse", "led by output rows"],
)
def test_a_frozen_closing_product_is_not_computed_again(config, targets, again):
    """What the cost model counts: with an adapter on it, `down_proj` is computed again as part of the LoRA layer."""
    model = lora_model(targets=targets)
    if config is not None:
        handle = sparsify(model, config)
        model(**make_batch(seed=1))  # for statistics
        handle.set_enabled(config.is_sparse)
    assert products_in_backward(model, make_batch()) == again


class Calls(TorchDispatchMode):
    """Counts how often attention is computed."""

    def __init__(self):
        super().__init__()
        self.attention = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.attention += func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        return func(*args, **(kwargs or {}))


def attention_in_backward(loss, **options) -> int:
    with Calls() as calls:
        loss.backward(**options)
    return calls.attention


def contexts():
    return contextlib.nullcontext(), contextlib.nullcontext()


CHECKPOINTING = {
    "non-reentrant": ({"use_reentrant": False}, 0),
    "reentrant": ({"use_reentrant": True}, 3),
    "contexts of one's own": ({"use_reentrant": False, "context_fn": contexts}, 3),
}


@pytest.mark.parametrize(("options", "again"), CHECKPOINTING.values(), ids=CHECKPOINTING.keys())
@pytest.mark.parametrize("sparse", [False, True], ids=["exact", "sparse"])
def test_attention_is_not_computed_again(options, again, sparse):
    model, batch = lora_model(), make_batch()
    model.get_base_model().gradient_checkpointing_enable(options)
    model.enable_input_require_grads()
    functions = [layer._gradient_checkpointing_func for layer in model.get_base_model().model.layers]
    results = []
    for exact in (LESS, True):
        with sparsify(model, SPARSE.replace(start_step=0, exact=exact)) as handle:
            handle.set_enabled(sparse)
            assert attention_in_backward(model(**batch).loss) == (3 if exact == LESS else again)
            results.append(loss_and_gradients(model, batch))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(results[0][1][name], results[1][1][name]) for name in results[0][1])
    assert [layer._gradient_checkpointing_func for layer in model.get_base_model().model.layers] == functions


def test_every_graph_keeps_its_own_attention_and_can_be_used_twice():
    model, batches = lora_model(), (make_batch(), make_batch((6, 11), (4, 2), seed=5))
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    with sparsify(model, SPARSE.replace(start_step=0)) as handle:
        handle.set_enabled(True)
        parts = [loss_and_gradients(model, batch)[1] for batch in batches]
        losses = [model(**batch).loss for batch in batches]
        for loss in losses:
            loss.backward(retain_graph=True)
            assert attention_in_backward(loss) == 0
    got = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, 2 * (parts[0][name] + parts[1][name]))


@pytest.mark.parametrize("name", VARIED)
def test_every_family_is_recomputed_bit_for_bit(name):
    model, batch = zoo_lora(name), make_batch()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    results = []
    for exact in ((), ("recomputation",)):
        with sparsify(model, SparseLoraConfig(exact=exact)):
            results.append(loss_and_gradients(model, batch)[1])
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_an_error_in_the_forward_leaves_checkpointing_as_it_was():
    model, batch = lora_model(), make_batch()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    layers = model.get_base_model().model.layers
    function = layers[0]._gradient_checkpointing_func
    with sparsify(model, SparseLoraConfig()):
        broken = layers[1].mlp.register_forward_pre_hook(_fail)
        with pytest.raises(RuntimeError, match="broken"):
            model(**batch)
        broken.remove()
        assert all(layer._gradient_checkpointing_func is function for layer in layers)


def _fail(module, args):
    raise RuntimeError("broken")
