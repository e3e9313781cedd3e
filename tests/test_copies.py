"""Two models in one process, copies of a model, and copies of a handle."""

import copy
import io
import pickle

import pytest
import torch
from helpers import (
    SPARSE,
    assert_same,
    assert_untouched,
    differs,
    lora_model,
    loss_and_gradients,
    make_batch,
    snapshot,
    sparse_result,
)

from sparselora_hf import sparsify


def test_second_model_is_untouched(batch):
    first, second = lora_model(), lora_model()
    before, want = snapshot(second), loss_and_gradients(second, batch)
    with sparsify(first, SPARSE) as handle:
        handle.set_enabled(True)
        sparse = loss_and_gradients(first, batch)
        assert_untouched(second, before)
        assert_same(loss_and_gradients(second, batch), want, 1e-7)
    assert differs(sparse, want)


def test_two_models_give_what_they_give_alone(batch):
    other = SPARSE.replace(mlp_sparsity=0.5, attention_sparsity=0.5, criterion="oracle", exact=False)
    batches = [batch, make_batch((4, 7), (3, 3), side="left", seed=3)]
    models = [lora_model("llama"), lora_model("qwen2", seed=7)]
    configs = [SPARSE, other]
    alone = [sparse_result(*each) for each in zip(models, batches, configs, strict=True)]
    handles = [sparsify(*each) for each in zip(models, configs, strict=True)]
    for handle in handles:
        handle.set_enabled(True)
    losses = [model(**batch).loss for model, batch in zip(models, batches, strict=True)]  # forwards first,
    for loss in losses:  # backwards after
        loss.backward()
    for model, loss, want in zip(models, losses, alone, strict=True):
        got = loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert_same(got, want, 1e-6)


# copies


def _pickled(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": _pickled}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())
@pytest.mark.parametrize("after_use", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("branch", ["dense", "sliced"])
def test_copy_stays_sparse_on_its_own_weights(batch, copied, after_use, branch):
    model = lora_model()
    handle = sparsify(model, SPARSE.replace(lora_branch=branch))
    handle.set_enabled(True)
    if after_use:
        loss_and_gradients(model, batch)
    twin = copied(model)
    handle.restore()
    dense = loss_and_gradients(model, batch)
    want = sparse_result(model, batch, SPARSE.replace(lora_branch=branch))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # a copy that reaches into its original would show it
    got = loss_and_gradients(twin, batch)
    assert_same(got, want, 1e-6)
    assert differs(got, dense)


def test_a_copy_without_its_handle_is_told_of_it():
    """The copy that the error tells of can be made sparse anew."""
    model = lora_model()
    with sparsify(model, SPARSE) as handle:
        with pytest.raises(ValueError, match=r"sparse already.*copy\.deepcopy\(handle\), and restore that"):
            sparsify(copy.deepcopy(model), SPARSE)
        with sparsify(copy.deepcopy(handle).restore(), SPARSE) as twin:
            assert repr(twin) == repr(handle)


def test_copied_handle_restores_the_copy(batch):
    model = lora_model()
    handle = sparsify(model, SPARSE)
    twin = copy.deepcopy(handle)
    twin.restore()
    assert twin.model is not model
    assert not any("Sparse" in type(module).__name__ for module in twin.model.modules())
    assert not twin.model.base_model.model._forward_pre_hooks
    handle.set_enabled(True)
    assert differs(loss_and_gradients(model, batch), loss_and_gradients(twin.model, batch))
