"""``act(gate) ⊙ up`` of dense MLPs in one function: same numbers, less kept, where it is what the MLP does."""

import copy
import types

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
from transformers.models.llama.modeling_llama import LlamaMLP
from zoo import UNGATED, VARIED, zoo_lora

from sparselora_hf import SparseLoraConfig, sparsify
from sparselora_hf.modules.classes import Patched, link_of
from sparselora_hf.modules.gate import LeanMlp
from sparselora_hf.ops import gate as gate_ops
from sparselora_hf.ops import mixed_mlp as mixed_ops
from sparselora_hf.ops.activations import activation_kind
from sparselora_hf.ops.gate import activate, gated_activation

LEAN = SparseLoraConfig(exact=("activations",))
# families whose MLPs have no gate, or are experts alone
KINDS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def products(joined, dtype=torch.float64):
    """Gate and up ``[2, 3, 5]``, or both in one matrix."""
    both = torch.randn(2, 3, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).mul_(2).to(dtype)
    return [part.clone().requires_grad_() for part in ([both] if joined else both.chunk(2, -1))]


def family(parts, kind):
    """As the families' own code has it."""
    gate, up = parts if len(parts) == 2 else parts[0].chunk(2, -1)
    return KINDS[kind](gate) * up


@pytest.fixture(params=[False, True], ids=["two products", "one product"])
def joined(request):
    return request.param


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_that_of_the_formula(kind, joined):
    assert gradcheck(lambda *parts: gated_activation(parts, kind), products(joined))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_the_familys_code_within_rounding(kind, joined, dtype):
    results = []
    for run in (gated_activation, family):
        leaves = products(joined, dtype)
        y = run(leaves, kind)
        y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).to(dtype))
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for got, want in zip(*results, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got, want, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps / 16)


def test_any_strides(joined):
    def turned(parts):
        return [part.transpose(0, 2).contiguous().transpose(0, 2) for part in parts]

    parts = products(joined)
    assert gradcheck(lambda *parts: gated_activation(turned(parts), "silu"), parts)
    got, want = (run(parts, "silu").sum() for run in (gated_activation, family))  # whose gradient is an expanded one
    torch.testing.assert_close(torch.autograd.grad(got, parts), torch.autograd.grad(want, parts))


def test_nothing_but_the_products_is_kept_for_backward(joined):
    parts = products(joined)
    kept = kept_for_backward(lambda: gated_activation(parts, "silu"))
    assert sorted(t.data_ptr() for t in kept) == sorted(part.data_ptr() for part in parts)


def lean_mlps_of(model):
    return [module for module in model.modules() if isinstance(module, LeanMlp) and link_of(module).lean]


@pytest.mark.parametrize("part", ["attention", "all"])
@pytest.mark.parametrize("name", VARIED)
def test_every_family_trains_as_before(name, part):
    model, batch = zoo_lora(name, part), make_batch()
    want = loss_and_gradients(model, batch)
    with sparsify(model, LEAN):
        assert len(lean_mlps_of(model)) == (1 if "dense layer" in name else 0 if name.split()[0] in UNGATED else 2)
        assert_same(loss_and_gradients(model, batch), want, 1e-6)
    assert not any(isinstance(module, Patched) for module in model.modules())


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_dropout_of_adapters_draws_as_before(name, batch):
    model, results = zoo_lora(name, "all", dropout=0.3), []
    for exact in ((), ("activations",)):
        with sparsify(model, SparseLoraConfig(exact=exact)):
            torch.manual_seed(0)
            results.append(loss_and_gradients(model, batch))
    assert_same(results[1], results[0], 1e-6)


@pytest.fixture
def seen(monkeypatch):
    """Shapes of the products that the function is given."""
    shapes = []

    def watched(parts, *args):
        shapes.append(tuple(parts[0].shape))
        return activate(parts, *args)

    for module in (gate_ops, mixed_ops):
        monkeypatch.setattr(module, "activate", watched)
    return shapes


@pytest.mark.parametrize("criterion", ["oracle", "output"])
@pytest.mark.parametrize("targets", [ATTENTION, ATTENTION + MLP], ids=["attention", "mlp too"])
def test_dense_rows_of_sparse_mlps_are_lean(seen, criterion, targets, batch):
    model, results = lora_model(targets=targets), []
    for exact in ((), ("activations",)):
        with sparsify(model, SPARSE.replace(criterion=criterion, exact=exact)) as handle:
            model(**batch)  # for statistics
            handle.set_enabled(True)
            seen.clear()
            results.append(loss_and_gradients(model, batch))
    rows = int((batch["labels"] != -100).sum()) + 3 + int((batch["attention_mask"] == 0).sum())
    assert seen == [(rows, 96), (rows, 96), (3, 14, 96)]  # the third layer is dense
    assert_same(results[1], results[0], 1e-6)


def test_evaluation_runs_the_mlps_own_forward(seen, batch):
    model = lora_model()
    want = model.eval()(**batch).loss
    with sparsify(model, LEAN):
        seen.clear()
        assert torch.equal(model(**batch).loss, want)
        assert not seen


def test_a_compiler_traces_the_mlps_own_forward(seen):
    model, x = lora_model(), torch.randn(2, 64)
    mlp = mlps_of(model)[0]
    mlp.up_proj.weight.requires_grad_(True)  # left alone by all other savings
    want = mlp(x)
    with sparsify(model, LEAN):
        seen.clear()
        torch.testing.assert_close(torch.compile(mlp, backend="eager", fullgraph=True)(x), want)
        assert not seen
        torch.testing.assert_close(mlp(x), want)
        assert seen == [(2, 96)]


def mlps_of(model):
    return [layer.mlp for layer in model.get_base_model().model.layers]


def is_lean(mlp):
    return isinstance(mlp, LeanMlp) and link_of(mlp).lean


@pytest.mark.parametrize("exact", [("activations",), ("padding",), ()], ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_saving_is_switchable_and_undone(exact, sparsity):
    model = lora_model()
    with sparsify(model, SPARSE.replace(mlp_sparsity=sparsity, exact=exact)):
        for each in (model, copy.deepcopy(model)):
            assert all(is_lean(mlp) == ("activations" in exact) for mlp in mlps_of(each))
    assert {type(mlp) for mlp in mlps_of(model)} == {LlamaMLP}


def hidden_of(mlp, x):
    return mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)


ODD = {
    "clamp": lambda self, x: self.down_proj(hidden_of(self, x).clamp(max=7)),
    "gate and up exchanged": lambda self, x: self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x)),
    "dropout": lambda self, x: self.down_proj(F.dropout(hidden_of(self, x), 0.3, self.training)),
    "scaled input": lambda self, x: self.down_proj(hidden_of(self, 2 * x)),
    "scaled result": lambda self, x: self.down_proj(hidden_of(self, x)) / 2,
    "two results": lambda self, x: (self.down_proj(hidden_of(self, x)), None),
    "weights alone": lambda self, x: F.linear(hidden_of(self, x), self.down_proj.weight),
    "a product twice": lambda self, x: self.down_proj(hidden_of(self, x)) + 0 * self.up_proj(x).mean(),
    "another activation": lambda self, x: self.down_proj(F.gelu(self.gate_proj(x)) * self.up_proj(x)),
    "up first": lambda self, x: self.down_proj(self.up_proj(x) * self.act_fn(self.gate_proj(x))),
}


@pytest.mark.parametrize("forward", ODD.values(), ids=ODD.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_mlps_that_do_anything_else_are_left_alone(forward, dtype, train):
    """In training: a model may be in evaluation mode until then."""
    model = lora_model(dtype=dtype)
    odd, activated, usual = mlps_of(model)
    odd.__class__ = type("Odd", (LlamaMLP,), {"forward": forward})
    activated.act_fn = nn.Tanh()
    model.train(train)
    random = torch.get_rng_state()
    with sparsify(model, LEAN):
        assert [is_lean(mlp) for mlp in (odd, activated, usual)] == [False, False, True]
    assert torch.equal(torch.get_rng_state(), random)
    assert {module.training for module in model.modules()} == {train}


def on_instance(mlp, calls):
    """Give an MLP a forward of its own, as Liger and accelerate's hooks do."""

    def forward(self, x):
        calls.append(1)
        return LlamaMLP.forward(self, x)

    mlp.forward = types.MethodType(forward, mlp)


@pytest.mark.parametrize("exact", [("activations",), ("activations", "padding")], ids=["alone", "with others"])
@pytest.mark.parametrize("later", [False, True], ids=["before", "later"])
def test_a_forward_put_on_an_mlp_serves(later, exact, seen, batch):
    model, calls = lora_model(), []
    want, mlp = loss_and_gradients(model, batch), mlps_of(model)[1]
    if not later:
        on_instance(mlp, calls)
    with sparsify(model, SparseLoraConfig(exact=exact)):
        if later:
            on_instance(mlp, calls)
        calls.clear()
        seen.clear()
        assert_same(loss_and_gradients(model, batch), want, 1e-5)
        assert (len(calls), len(seen)) == (1, 2)
    assert "forward" in vars(mlp)


def test_an_activation_exchanged_later_is_used(seen, batch):
    model = lora_model()
    with sparsify(model, LEAN):
        loss_and_gradients(model, batch)
        for mlp in mlps_of(model):
            mlp.act_fn = nn.Tanh()
        seen.clear()
        got = loss_and_gradients(model, batch)
        assert not seen
    assert_same(got, loss_and_gradients(model, batch), 1e-6)


class Half(nn.Linear):
    """Answers in bfloat16."""

    def forward(self, x):
        return super().forward(x).bfloat16()


@pytest.mark.parametrize(
    "activation",
    [nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.ReLU(), F.silu, F.gelu],
    ids=["GELU", "GELU by tanh", "SiLU", "ReLU", "silu", "gelu"],
)
def test_activations_go_by_the_name_of_what_they_compute(activation):
    x = torch.linspace(-3, 3, 12).view(2, 6)
    torch.testing.assert_close(gated_activation([x, torch.ones(2, 6)], activation_kind(activation)), activation(x))


def test_products_of_two_types_meet_as_in_the_familys_code(batch):
    model = lora_model()
    for mlp in mlps_of(model):
        mlp.gate_proj.__class__ = Half
    want = loss_and_gradients(model, batch)
    with sparsify(model, LEAN):
        assert all(map(is_lean, mlps_of(model)))
        assert_same(loss_and_gradients(model, batch), want, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_as_before(dtype, batch):
    model = lora_model(targets=ATTENTION + MLP, dtype=dtype)
    results = []
    for config in (SparseLoraConfig(exact=()), LEAN):
        with sparsify(model, config), torch.autocast("cpu", torch.bfloat16):
            results.append(loss_and_gradients(model, batch))
    assert_same(results[1], results[0], 1e-3)


@pytest.mark.parametrize(("targets", "matrices"), [(ATTENTION, 2), (ATTENTION + MLP, 3)], ids=["frozen", "adapters"])
def test_a_third_of_an_mlps_activations_is_not_held(targets, matrices):
    """With an adapter on `down` its input is held as well, as before."""
    model, x = lora_model(targets=targets), torch.randn(40, 64, requires_grad=True)

    def wide():
        kept = kept_for_backward(lambda: mlps_of(model)[0](x))
        return len({tensor.data_ptr() for tensor in kept if tensor.shape == (40, 96)})

    assert wide() == matrices + 1
    with sparsify(model, LEAN):
        assert wide() == matrices
