"""SVD factors are those of the weights in training, whatever happened to these between `sparsify` and the run."""

import copy

import pytest
import torch
from helpers import SPARSE, assert_same, differs, lora_model, loss_and_gradients, make_batch, sparse_result

from sparselora_hf import sparsify, svd_cache


@pytest.fixture
def config(tmp_path):
    return SPARSE.replace(criterion="svd", cache_dir=tmp_path, start_step=0)


@pytest.fixture
def no_svd(monkeypatch):
    """Function after which no weight can be factored, from the cache or otherwise."""

    def refuse(*args):
        raise AssertionError("a weight was factored anew")

    return lambda: monkeypatch.setattr(svd_cache.SvdCache, "factors", refuse)


def frozen(model):
    return [p for name, p in model.named_parameters() if "proj" in name and "lora_" not in name]


def load_state_dict(model):
    generator = torch.Generator().manual_seed(9)
    state = {name: torch.randn(p.shape, generator=generator) * 0.15 for name, p in model.state_dict().items()}
    model.load_state_dict({name: value for name, value in state.items() if "proj" in name}, strict=False)


def write_to_data(model):
    """As PEFT merges: counted as no write, and the address stays."""
    generator = torch.Generator().manual_seed(9)
    for weight in frozen(model):
        weight.data += torch.randn(weight.shape, generator=generator) * 0.15


CHANGES = [load_state_dict, write_to_data]


@pytest.mark.parametrize("criterion", ["svd", "svd_mean"])
@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_change_after_sparsify_are_factored_anew(config, criterion, change):
    model, batch = lora_model(), make_batch()
    config = config.replace(criterion=criterion)
    with sparsify(model, config) as handle:
        change(model)
        stale = copy.deepcopy(handle)
        handle.begin_run(max_steps=10)
        got = loss_and_gradients(model, batch)
        stale.set_enabled(True)
        assert differs(loss_and_gradients(stale.model, batch), got), "the change would not show"
    assert_same(got, sparse_result(model, batch, config))


def moved(model):
    for weight in frozen(model):
        weight.data = weight.data.clone()
    return model


def cast(model):
    return model.to(torch.bfloat16)


@pytest.mark.parametrize("change", [moved, cast])
def test_weights_that_are_moved_or_cast_keep_their_factors(config, change, no_svd):
    model = lora_model()
    with sparsify(model, config) as handle:
        before = dict(handle.state.criterion.factors)
        change(model)
        no_svd()
        handle.begin_run(max_steps=10)
        assert handle.state.criterion.factors == before and len(before) == 7


def test_what_changes_after_a_cast_is_factored_anew(config):
    model = lora_model()
    with sparsify(model, config) as handle:
        handle.begin_run(max_steps=10)
        cast(model)
        handle.begin_run(max_steps=10)
        before = dict(handle.state.criterion.factors)
        write_to_data(model)
        handle.begin_run(max_steps=10)
        now = handle.state.criterion.factors
        assert all(now[key] is not before[key] and now[key].up.dtype == torch.bfloat16 for key in before)


def test_one_weight_alone(config):
    model = lora_model()
    with sparsify(model, config) as handle:
        before = dict(handle.state.criterion.factors)
        with torch.no_grad():
            frozen(model)[0].mul_(2)  # q of layer 0, which is dense
            model.get_submodule("base_model.model.model.layers.1.self_attn.v_proj").weight[0] += 1
        handle.begin_run(max_steps=10)
        now = handle.state.criterion.factors
        assert [key for key in before if now[key] is not before[key]] == [(1, "v")]


def test_offloaded_weights_are_left_alone(config):
    model = lora_model()
    with sparsify(model, config) as handle:
        model.to("meta")
        handle.begin_run(max_steps=10)
