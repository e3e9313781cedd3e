"""Walks through a model's modules: the same results and effects as PyTorch's, whatever happens to the model."""

import copy
import pickle
import time
from collections import UserDict

import pytest
import torch
from helpers import lora_model
from torch import nn
from transformers import PreTrainedModel

from sparselora_hf import SparseLoraConfig, sparsify
from sparselora_hf.modules.walks import QuickWalks, _is_usual


@pytest.fixture
def model():
    return lora_model()


def assert_same_parameters(model):
    got, want = list(model.parameters()), list(type(model).parameters(model))
    assert len(got) == len(want) and all(a is b for a, b in zip(got, want, strict=True))


def layer_of(model, number=1):
    return model.get_base_model().model.layers[number]


def test_parameters_are_the_models_in_its_order(model):
    QuickWalks(model)
    assert_same_parameters(model)
    assert [*model.parameters(recurse=False)] == []


def test_tied_parameters_come_once(model):
    base = model.get_base_model()
    base.lm_head.weight = base.model.embed_tokens.weight
    QuickWalks(model)
    assert_same_parameters(model)


def test_parameters_in_a_mapping_that_is_no_dict(model):
    linear = layer_of(model).mlp.up_proj
    linear._parameters = UserDict(linear._parameters)
    QuickWalks(model)
    assert_same_parameters(model)


def test_modes_follow(model):
    walks = QuickWalks(model)
    for mode in (False, True, True, False):
        assert model.train(mode) is model
        assert all(module.training is mode for module in model.modules())
    layer_of(model).eval()
    model.train()
    assert all(module.training for module in model.modules())
    layer_of(model).train(False)
    assert model.eval() is model and not any(module.training for module in model.modules())
    assert walks._known is not None


def test_a_mode_that_is_none_is_refused(model):
    QuickWalks(model)
    with pytest.raises(ValueError, match="boolean"):
        model.train("yes")


def replaced(model):
    layer_of(model).mlp.up_proj = nn.Linear(64, 128)


def swapped(model):
    mlp = layer_of(model).mlp
    mlp.up_proj, mlp.gate_proj = mlp.gate_proj, mlp.up_proj


def added(model):
    layer_of(model).extra = nn.Linear(3, 3)


def taken_away(model):
    del layer_of(model).mlp.up_proj


def another_parameter(model):
    mlp = layer_of(model).mlp
    mlp.up_proj.weight = nn.Parameter(mlp.up_proj.weight.detach().clone())


def one_parameter_more(model):
    layer_of(model).register_parameter("gain", nn.Parameter(torch.ones(1)))


def another_adapter(model):
    model.add_adapter("other", model.peft_config["default"])


@pytest.mark.parametrize(
    "change", [replaced, swapped, added, taken_away, another_parameter, one_parameter_more, another_adapter]
)
def test_what_others_do_to_the_model_is_seen(model, change):
    QuickWalks(model)
    model.train()
    before = [*model.parameters()]
    change(model)
    assert_same_parameters(model)
    assert len(before) != len([*model.parameters()]) or any(
        a is not b for a, b in zip(before, model.parameters(), strict=True)
    )
    for module in layer_of(model).modules():
        module.training = False
    model.train()
    assert all(module.training for module in model.modules())


def test_zero_grad_reaches_every_gradient(model):
    QuickWalks(model)
    added(model)
    for parameter in type(model).parameters(model):
        parameter.grad = torch.zeros_like(parameter)
    model.zero_grad()
    assert all(parameter.grad is None for parameter in type(model).parameters(model))


class _Counts(nn.Module):
    """Does something of its own when it is told to train, as DoRA's layers do."""

    calls = 0

    def train(self, mode=True):
        self.calls += 1
        return super().train(mode)


def test_modules_with_a_train_of_their_own_are_asked_every_time(model):
    layer_of(model).counts = _Counts()
    QuickWalks(model)
    for _ in range(3):
        model.train()
    assert layer_of(model).counts.calls == 3


def test_a_module_whose_class_is_exchanged_is_asked(model):
    QuickWalks(model)
    model.train()
    mlp = layer_of(model).mlp
    mlp.__class__ = type("Counting", (_Counts, type(mlp)), {})
    model.train()
    assert mlp.calls == 1


@pytest.mark.parametrize("walk", ["parameters", "named_parameters", "_named_members"])
def test_a_model_with_a_walk_of_its_own_is_asked(model, walk):
    model.__class__ = type("Hiding", (type(model),), {walk: lambda self, *args, **kwargs: iter(())})
    QuickWalks(model)
    assert [*model.parameters()] == []


def test_an_instance_with_a_train_of_its_own_is_asked(model):
    calls, mlp = [], layer_of(model).mlp
    mlp.train = lambda mode=True: calls.append(mode) or type(mlp).train(mlp, mode)
    QuickWalks(model)
    model.train()
    model.train()
    assert calls == [True, True]


def test_kernels_of_the_hub_are_looked_after(model, monkeypatch):
    calls, own = [], PreTrainedModel.train
    monkeypatch.setattr(PreTrainedModel, "train", lambda self, mode=True: calls.append(mode) or own(self, mode))
    _is_usual.cache_clear()
    QuickWalks(model)
    model.train()
    calls.clear()
    model.train()
    assert not calls
    monkeypatch.setattr(type(model.get_base_model()), "use_kernels", True)
    model.train()
    assert calls
    _is_usual.cache_clear()


@pytest.mark.parametrize("name", ["train", "parameters"])
def test_methods_that_others_gave_the_model_stay(model, name):
    before, method = set(model.__dict__), getattr(model, name)
    setattr(model, name, method)
    walks = QuickWalks(model)
    assert model.__dict__[name] is method and set(model.__dict__) - before == {name}
    walks.remove()
    assert model.__dict__[name] is method


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_walk_through_themselves(model, copied):
    QuickWalks(model)
    model.train()
    other = copied(model)
    own = {id(parameter) for parameter in type(other).parameters(other)}
    assert {id(parameter) for parameter in other.parameters()} == own
    other.eval()
    assert all(module.training for module in model.modules())
    assert not any(module.training for module in other.modules())


def test_restore_leaves_nothing():
    model = lora_model()
    before = set(model.__dict__)
    handle = sparsify(model, SparseLoraConfig())
    assert set(model.__dict__) - before == {"train", "parameters"}
    handle.restore()
    assert set(model.__dict__) == before


def test_they_are_quick(model):
    """An eighth of the time on a large model; a third here, so that no noise fails it."""

    def seconds(walk):
        walk()
        times = []
        for _ in range(15):
            start = time.perf_counter()
            walk()
            times.append(time.perf_counter() - start)
        return min(times)

    model.train()
    plain = seconds(model.train), seconds(lambda: list(model.parameters()))
    QuickWalks(model)
    quick = seconds(model.train), seconds(lambda: list(model.parameters()))
    assert quick[0] < plain[0] / 3 and quick[1] < plain[1] / 1.5
