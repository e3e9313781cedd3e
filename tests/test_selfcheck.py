"""Parts that are not what their family's row says stay dense and are named."""

import copy
import dataclasses
import re

import pytest
import torch
from helpers import SPARSE, add_lora, assert_same, assert_untouched, loss_and_gradients, snapshot
from torch import nn
from zoo import lora_targets, zoo_lora, zoo_model

from sparselora_hf import FAMILIES, sparsify

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
    "gate behind up": (swapped, "with all channels kept is off by .*% from its dense self"),
    "clamp": (clamped, "with all channels kept is off by"),
    "unknown dropout": (dropping, "with all channels kept is off by"),
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
