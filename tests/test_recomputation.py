import pytest
from helpers import ATTENTION, MLP, SPARSE, lora_model, make_batch

from sparselora_hf import SparseLoraConfig, sparsify
from sparselora_hf.views import base_linear


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
