"""A sparse MLP as one pair of functions: against the definition, against the chain, and when it is taken."""

import copy

import pytest
import torch
from helpers import (
    ATTENTION,
    MLP,
    SPARSE,
    assert_same,
    kept_for_backward,
    lora_model,
    loss_and_gradients,
    make_batch,
)
from torch import nn
from torch.autograd import gradcheck
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from zoo import UNGATED, VARIED, zoo_lora

from sparselora_hf import sparsify
from sparselora_hf.modules import mlp as mlp_module
from sparselora_hf.modules.classes import link_of
from sparselora_hf.modules.mlp import SparseMlp
from sparselora_hf.ops.mixed_mlp import FrozenMlp, mixed_mlp
from sparselora_hf.ops.mlp import MlpWeights, StandIn

# families whose MLPs have no gate, or are experts alone
HIDDEN, WIDTH, KEEP, RANK = 7, 13, 4, 2
ROWS = {"some": [0, 3, 4], "none": [], "all": list(range(6))}


def randn(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make(biased=False, joined=False, kind="none"):
    gate, up, down = randn(WIDTH, HIDDEN, seed=1), randn(WIDTH, HIDDEN, seed=2), randn(HIDDEN, WIDTH, seed=3)
    biases = (randn(WIDTH, seed=4), randn(WIDTH, seed=5), randn(HIDDEN, seed=6)) if biased else (None, None, None)
    inputs = [(gate, biases[0]), (up, biases[1])]
    if joined:
        inputs = [(torch.cat([gate, up]), torch.cat(biases[:2]) if biased else None)]
    stand_in = None
    if kind != "none":
        channels = (randn(WIDTH, seed=7), randn(RANK, WIDTH, seed=8)) if kind == "channels" else ()
        factors = randn(RANK, HIDDEN, seed=9), randn(RANK, seed=10), randn(RANK, HIDDEN, seed=11)
        stand_in = StandIn(*factors, randn(HIDDEN, seed=12), *channels)
    weights = MlpWeights(gate, up, down, F.silu, *biases)
    return FrozenMlp(inputs, weights, "silu", torch.float64, stand_in, "auto")


def by_hand(x, mlp, rows, index):
    """The definition at full width, row by row."""
    w, flat = mlp.weights, x.flatten(0, -2)
    true = F.silu(F.linear(flat, w.gate, w.gate_bias)) * F.linear(flat, w.up, w.up_bias)
    dense = F.linear(true, w.down, w.down_bias)
    hidden, output = true, 0.0
    if mlp.stand_in is not None:
        output, given_up = mlp.stand_in.correction(flat, torch.arange(WIDTH))
        hidden = true - given_up
    sparse = F.linear(hidden[:, index], w.down[:, index], w.down_bias) + output
    is_dense = torch.zeros(len(flat), 1, dtype=torch.bool).index_fill_(0, rows, True)
    return torch.where(is_dense, dense, sparse).view(x.shape)


@pytest.mark.parametrize("kind", ["none", "channels", "fixed"])
@pytest.mark.parametrize("joined", [False, True], ids=["two linears", "one linear"])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_against_the_definition(rows, biased, joined, kind):
    mlp, rows = make(biased, joined, kind), torch.tensor(rows, dtype=torch.long)
    x, index = randn(2, 3, HIDDEN, seed=20).requires_grad_(), torch.tensor([9, 2, 12, 5])

    def op(x):
        return mixed_mlp(x, mlp, rows, lambda *_: (index, None))

    got, want = op(x), by_hand(x, mlp, rows, index)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    grad = randn(*got.shape, seed=21)
    results = [torch.autograd.grad(y, x, grad)[0] for y in (got, want)]
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)
    assert gradcheck(op, x)
    (expanded,) = torch.autograd.grad(op(x).sum(), x)
    torch.testing.assert_close(expanded, torch.autograd.grad(by_hand(x, mlp, rows, index).sum(), x)[0])


def test_channels_are_chosen_from_what_the_rows_are():
    mlp, rows, x = make(), torch.tensor([4, 1]), randn(2, 3, HIDDEN, seed=20).requires_grad_()
    seen = []

    def select(*tensors):
        assert not torch.is_grad_enabled()
        seen.extend(tensors)
        return torch.arange(KEEP), None

    mixed_mlp(x, mlp, rows, select)
    flat = x.detach().view(-1, HIDDEN)
    hidden = F.silu(flat @ mlp.weights.gate.T) * (flat @ mlp.weights.up.T)
    for got, want in zip(seen, (flat, flat[rows], hidden[rows]), strict=True):
        torch.testing.assert_close(got, want)


def test_the_result_can_be_written_on():
    mlp, x = make(), randn(2, 3, HIDDEN, seed=20).requires_grad_()
    y = mixed_mlp(x, mlp, torch.tensor([1]), lambda *_: (torch.arange(KEEP), None))
    y += 1
    y.sum().backward()
    assert x.grad is not None


def test_kept_for_backward_are_the_products():
    mlp, x, rows = make(), randn(2, 20, HIDDEN, seed=20).requires_grad_(), torch.arange(5)
    kept = kept_for_backward(lambda: mixed_mlp(x, mlp, rows, lambda *_: (torch.arange(KEEP), None)))
    floating = {tuple(t.shape) for t in kept if t.is_floating_point()}
    weights = {(WIDTH, HIDDEN)}  # the model's own
    assert floating - weights == {(5, WIDTH), (40, 2 * KEEP)}


def test_recomputation_stops_before_the_last_products(monkeypatch):
    mlp, x, left = make(), randn(2, 3, HIDDEN, seed=20).requires_grad_(), []
    gather_out = MlpWeights.gather_out
    monkeypatch.setattr(MlpWeights, "gather_out", lambda *a: left.append(1) or gather_out(*a))

    def run(x):
        return mixed_mlp(x, mlp, torch.tensor([1]), lambda *_: (torch.arange(KEEP), None))

    checkpoint(run, x, use_reentrant=False).sum().backward()
    assert len(left) == 2  # forward and backward


# in models


@pytest.fixture
def taken(monkeypatch):
    """Shapes of the inputs that the function is given."""
    shapes = []
    monkeypatch.setattr(mlp_module, "mixed_mlp", lambda x, *a: shapes.append(tuple(x.shape)) or mixed_mlp(x, *a))
    return shapes


def sparse_step(model, batch, config):
    with sparsify(model, config) as handle:
        if config.needs_statistics:
            model(**batch)
        handle.set_enabled(True)
        return loss_and_gradients(model, batch)


LED = SPARSE.replace(criterion="output", compensation="low_rank", compensation_rank=4)


@pytest.mark.parametrize("config", [SPARSE, LED], ids=["svd", "output"])
@pytest.mark.parametrize("name", VARIED)
def test_every_family_as_by_the_chain(name, config, taken, monkeypatch):
    config = config.replace(mlp_sparsity=0.7, attention_sparsity=0)
    model, batch = zoo_lora(name), make_batch()
    got = sparse_step(model, batch, config)
    assert bool(taken) == ("dense layer" in name or name.split()[0] not in UNGATED)
    monkeypatch.setattr(SparseMlp, "_frozen", lambda self, x: None)
    assert_same(got, sparse_step(model, batch, config), 1e-5)


def with_hook(model):
    return [mlp.up_proj.register_forward_hook(lambda *_: None) for mlp in mlps_of(model)]


def with_gradient(model):
    for mlp in mlps_of(model):
        mlp.down_proj.weight.requires_grad_()


def with_own_forward(model):
    for mlp in mlps_of(model):
        mlp.gate_proj.forward = mlp.gate_proj.forward


def mlps_of(model):
    return [layer.mlp for layer in model.get_base_model().model.layers]


@pytest.mark.parametrize("change", [None, with_hook, with_gradient, with_own_forward])
@pytest.mark.parametrize("later", [False, True], ids=["before", "later"])
def test_only_where_nobody_watches(change, later, taken, batch):
    model = lora_model()
    if change and not later:
        change(model)
    with sparsify(model, SPARSE) as handle:
        handle.set_enabled(True)
        if later:
            loss_and_gradients(model, batch)
            taken.clear()
            if change:
                change(model)
        loss_and_gradients(model, batch)
    assert taken == ([] if change else [(3, 14, 64), (3, 14, 64)])


@pytest.mark.parametrize(
    ("targets", "options"), [(ATTENTION + MLP, {}), (ATTENTION, {"exact": ("padding",)})], ids=["adapters", "not lean"]
)
def test_adapters_and_mlps_that_are_not_lean_go_through_the_chain(targets, options, taken, batch):
    sparse_step(lora_model(targets=targets), batch, SPARSE.replace(**options))
    assert not taken


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_types_are_those_of_the_chain(dtype, taken, batch, monkeypatch):
    model = lora_model(dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        got = sparse_step(model, batch, SPARSE)
        assert bool(taken) == (dtype == torch.bfloat16)
        monkeypatch.setattr(SparseMlp, "_frozen", lambda self, x: None)
        assert_same(got, sparse_step(model, batch, SPARSE), 0.02)


def test_parts_exchanged_between_steps_are_used(taken, batch, monkeypatch):
    model = lora_model()
    with sparsify(model, SPARSE.replace(criterion="oracle")) as handle:
        handle.set_enabled(True)
        before = loss_and_gradients(model, batch)
        for mlp in mlps_of(model):
            mlp.up_proj, mlp.act_fn = nn.Linear(64, 96, bias=False).requires_grad_(False), nn.GELU()
        taken.clear()
        got = loss_and_gradients(model, batch)
        assert len(taken) == 2
        monkeypatch.setattr(SparseMlp, "_frozen", lambda self, x: None)
        assert_same(got, loss_and_gradients(model, batch), 1e-5)
    assert not torch.equal(before[0], got[0])


def test_a_copy_works_on_its_own_weights(batch):
    model = lora_model()
    with sparsify(model, SPARSE.replace(start_step=0)) as handle:
        handle.set_enabled(True)
        want = loss_and_gradients(model, batch)
        twin = copy.deepcopy(model)
        for mlp in mlps_of(twin):
            assert link_of(mlp).view.modules["down"] is mlp.down_proj
        for mlp in mlps_of(model):
            mlp.up_proj.weight.data.zero_()
        assert_same(loss_and_gradients(twin, batch), want, 1e-6)
