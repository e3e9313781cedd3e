"""Parts that are not what their family's row says stay dense and are named."""

import copy
import dataclasses
import re

import pytest
import torch
from helpers import SPARSE, add_lora, assert_same, assert_untouched, loss_and_gradients, make_batch, snapshot
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import VARIED, lora_targets, zoo_lora, zoo_model

from sparselora_hf import FAMILIES, selfcheck, sparsify

SPARSE = SPARSE.replace(mlp_sparsity=0.9, attention_sparsity=0.75, criterion="oracle")


def swapped(self, x):
    up, gate = self.gate_up_proj(x).chunk(2, dim=-1)
    return self.down_proj(up * self.activation_fn(gate))


def clamped(self, x):
    return self.down_proj(up_of(self, x).clamp(-0.5, 0.5))


def up_of(mlp, x):
    gate, up = mlp.gate_up_proj(x).chunk(2, dim=-1)
    return up * mlp.activation_fn(gate)


def pair(self, x):
    return self.down_proj(up_of(self, x)), None


def batched(self, x):
    rows, length, width = x.shape
    return self.down_proj(up_of(self, x.view(rows, length, width)))


def dropping(self, x):
    return self.down_proj(nn.functional.dropout(up_of(self, x), 0.3, self.training))


ODD = {
    "gate behind up": (swapped, "is off by .*% from its dense self"),
    "clamp": (clamped, "is off by"),
    "unknown dropout": (dropping, "is off by"),
    "two results": (pair, "does not map rows of hidden states to rows"),
    "three dimensions": (batched, r"fails on rows of hidden states \(ValueError: not enough values"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("forward", "reason"), ODD.values(), ids=ODD.keys())
def test_odd_mlp_stays_dense_and_is_named(caplog, forward, reason, dtype):
    model = zoo_lora("phi3", "attention", dtype)
    mlp = model.get_base_model().model.layers[1].mlp
    mlp.__class__ = type("Odd", (type(mlp),), {"forward": forward})
    with sparsify(model, SPARSE, progress=False) as handle:
        decisions = {d.name.split("layers.")[-1]: d for d in handle.decisions}
        assert decisions["1.mlp"].outcome == "dense"
        assert re.search(f"the MLP {reason}", decisions["1.mlp"].reason)
        assert decisions["0.mlp"].outcome == decisions["1.self_attn"].outcome == "sparse"
        assert type(mlp).__name__ == "Odd"
    assert "layers.1.mlp stays dense" in caplog.text


def test_exact_savings_are_checked_too(batch):
    model = zoo_lora("phi3", "attention")
    mlp = model.get_base_model().model.layers[1].mlp
    mlp.__class__ = type("Odd", (type(mlp),), {"forward": batched})
    with sparsify(model, SPARSE.replace(mlp_sparsity=0.0), progress=False) as handle:
        outcomes = {d.name.split("layers.")[-1]: d.outcome for d in handle.decisions}
        assert (outcomes["0.mlp"], outcomes["1.mlp"]) == ("exact", "dense")
        loss_and_gradients(model, batch)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("known", [True, False], ids=["in the row", "unknown"])
def test_dropout_of_an_mlps_output(dropout, known):
    model = zoo_model("starcoder2")
    for layer in model.model.layers:
        layer.mlp.residual_dropout = dropout
    model = add_lora(model, lora_targets(model, "all")).train()
    family = FAMILIES["starcoder2"] if known else dataclasses.replace(FAMILIES["starcoder2"], dropout="")
    with sparsify(model, SPARSE, family=family, progress=False) as handle:
        outcomes = {d.outcome for d in handle.decisions if d.name.endswith("mlp")}
    assert outcomes == ({"sparse"} if known or not dropout else {"dense"})


def test_dropout_of_an_mlps_output_that_is_set_later():
    """All of it is dropped: context rows lose what their MLPs gave them, as dense ones do."""
    model, batch, results = zoo_lora("starcoder2"), make_batch(), []
    for early in (False, True):
        with sparsify(model, SPARSE, progress=False) as handle:
            handle.set_enabled(True)
            for dropout in (0.0, 1.0)[early:]:
                for layer in model.get_base_model().model.layers:
                    layer.mlp.residual_dropout = dropout
                result = loss_and_gradients(model, batch)
        results.append(result)
    assert_same(*results, 1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "qwen2_moe"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_check_leaves_no_trace(name, train):
    model = zoo_lora(name, "attention", dropout=0.3).train(train)
    before, seed = snapshot(model), torch.get_rng_state()
    with sparsify(model, SPARSE, progress=False) as handle:
        assert torch.equal(torch.get_rng_state(), seed)
        assert {module.training for module in model.modules()} == {train}
        assert handle.state.batch is None
    assert_untouched(model, before)


def test_check_sees_adapters_that_matter(batch):
    """The dense self includes the adapters, merged or not."""
    model = zoo_lora("phi3", "all")
    other = copy.deepcopy(model)
    with sparsify(model, SPARSE, progress=False) as handle:
        assert {d.outcome for d in handle.decisions} == {"sparse"}
    assert_same(loss_and_gradients(model, batch), loss_and_gradients(other, batch), 1e-7)


@pytest.mark.parametrize("part", ["attention", "all"])
@pytest.mark.parametrize("name", VARIED)
def test_few_channels_of_any_family_are_those_of_its_dense_self(monkeypatch, name, part):
    """With and without adapters on the MLP; all others stay out of the comparison."""
    monkeypatch.setattr(selfcheck, "_CHANNELS", 5)
    with sparsify(zoo_lora(name, part), SPARSE, progress=False) as handle:
        assert not [d.reason for d in handle.decisions if "dense self" in d.reason or "fails" in d.reason]


def few_are_normalised(self, x):
    y = up_of(self, x)
    return self.down_proj(y / y.norm(dim=-1, keepdim=True))


@pytest.mark.parametrize("forward", [swapped, clamped, dropping, few_are_normalised])
def test_few_channels_tell_an_odd_mlp(monkeypatch, forward):
    monkeypatch.setattr(selfcheck, "_CHANNELS", 5)
    model = zoo_lora("phi3", "attention")
    mlp = model.get_base_model().model.layers[1].mlp
    mlp.__class__ = type("Odd", (type(mlp),), {"forward": forward})
    with sparsify(model, SPARSE, progress=False) as handle:
        assert [d.name.split("layers.")[-1] for d in handle.decisions if d.outcome == "dense"] == ["1.mlp"]


class Copies(TorchDispatchMode):
    """Notes the largest gather."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.index_select.default:
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("part", ["attention", "all"])
def test_no_weight_is_copied_whole(monkeypatch, part):
    monkeypatch.setattr(selfcheck, "_CHANNELS", 4)
    copies = Copies()
    with copies, sparsify(zoo_lora("llama", part), SPARSE, progress=False):
        pass
    assert 0 < copies.largest <= 2 * 4 * 64  # a row of four channels' queries and one of their keys, hidden width
