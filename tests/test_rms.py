"""RMSNorms with a lean backward pass: same numbers, and only where the formula holds."""

import copy

import pytest
import torch
from helpers import assert_same, kept_for_backward, lora_model, loss_and_gradients, make_batch, relative_error
from torch import nn
from torch.autograd import gradcheck
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from zoo import VARIED, zoo_lora

from sparselora_hf import SparseLoraConfig, sparsify
from sparselora_hf.modules.classes import Patched, link_of
from sparselora_hf.modules.rms import _LeanNorm
from sparselora_hf.ops.rms import lean_rms_norm

EPS = 1e-3
KINDS = {"from 0": (LlamaRMSNorm, 0.0), "from 1": (Gemma2RMSNorm, 1.0)}
LEAN = SparseLoraConfig(exact=("norms",))
# families whose norms subtract the mean
WITHOUT = {"cohere", "cohere2", "gpt_neox", "nemotron", "olmo", "persimmon", "phi", "stablelm", "starcoder2"}
WITHOUT |= {"phimoe", "cohere2_moe", "jais2", "nanochat"}


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def norm_and_offset(request):
    kind, offset = request.param
    norm = kind(6, EPS).requires_grad_(False)
    nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(0))
    return norm, offset


def hidden_states(dtype=torch.float32):
    x = torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x[0, 0] *= 1e-2  # where eps shows
    return x.to(dtype).requires_grad_()


def test_gradient_is_that_of_the_formula(norm_and_offset):
    norm, offset = norm_and_offset
    weight = norm.weight.double()

    def formula(x):
        return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * (weight + offset)

    assert gradcheck(lambda x: lean_rms_norm(x, formula, weight, offset, EPS), hidden_states(torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_forward_is_the_norms_own_and_the_gradient_equal_within_rounding(norm_and_offset, dtype):
    norm, offset = norm_and_offset
    norm.to(dtype)
    behind, results = torch.linspace(-1, 1, 60).view(2, 5, 6).to(dtype), []
    for run in (norm, lambda x: lean_rms_norm(x, norm, norm.weight, offset, EPS)):
        x = hidden_states(dtype)
        y = run(x)
        y.backward(behind)
        results.append((y.detach(), x.grad))
    (y, grad), (lean_y, lean_grad) = results
    assert torch.equal(lean_y, y)
    assert lean_grad.dtype == dtype
    torch.testing.assert_close(lean_grad, grad, rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)
    if dtype != torch.float32:  # rounded once, at the end
        x = hidden_states(dtype).detach().double().requires_grad_()
        lean_rms_norm(x, norm.double(), norm.weight, offset, EPS).backward(behind.double())
        assert relative_error(lean_grad, x.grad) <= 0.6 * torch.finfo(dtype).eps


def test_nothing_but_the_input_and_the_weight_itself_is_kept_for_backward(norm_and_offset):
    norm, offset = norm_and_offset
    norm.to(torch.bfloat16)
    x = hidden_states(torch.bfloat16)
    kept = kept_for_backward(lambda: lean_rms_norm(x, norm, norm.weight, offset, EPS))
    assert {tensor.data_ptr() for tensor in kept} == {x.data_ptr(), norm.weight.data_ptr()}


@pytest.mark.parametrize("name", VARIED)
def test_every_family_trains_as_before(name):
    model, batch = zoo_lora(name), make_batch()
    want = loss_and_gradients(model, batch)
    with sparsify(model, LEAN):
        lean = sum(
            isinstance(module, Patched) and type(module).__name__.endswith("Norm") for module in model.modules()
        )
        got = loss_and_gradients(model, batch)
    assert (lean == 0) == (name.split()[0] in WITHOUT)
    assert torch.equal(got[0], want[0])
    assert_same(got, want, 5e-5)  # float32 gradients of this Mixtral are 9e-4 off those in float64, with and without


def hasty(norm, x):
    """``1 / rms`` is rounded too."""
    inverse = (x.float().square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
    return norm.weight * (x * inverse.to(x.dtype))


@pytest.mark.parametrize(
    ("name", "early"), [("llama", True), ("qwen3", True), ("olmo2", False), ("gemma2", False), ("other", None)]
)
def test_where_a_norm_rounds_is_found_out(name, early, monkeypatch):
    model = zoo_lora("llama" if name == "other" else name, dtype=torch.bfloat16)
    if name == "other":
        monkeypatch.setattr(LlamaRMSNorm, "forward", hasty)
    with sparsify(model, LEAN):
        found = {link_of(module)[0].early for module in model.modules() if isinstance(module, _LeanNorm)}
    assert found == {early}


class Centred(LlamaRMSNorm):
    def forward(self, hidden_states):
        return super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))


def norms_of(model):
    return [layer.post_attention_layernorm for layer in model.get_base_model().model.layers]


def is_lean(norm):
    return isinstance(norm, Patched)


def test_norms_that_are_trained_or_of_another_formula_are_left_alone():
    model = lora_model()
    decoder = model.get_base_model().model
    trained, other, plain = norms_of(model)
    trained.weight.requires_grad_(True)
    for norm in (other, decoder.norm):
        norm.__class__ = Centred  # the others are not of the final norm's class then
    with sparsify(model, LEAN):
        assert not any(map(is_lean, norms_of(model)))
    for norm in (other, decoder.norm):
        norm.__class__ = LlamaRMSNorm
    with sparsify(model, LEAN):
        assert [is_lean(norm) for norm in norms_of(model)] == [False, True, True]
        plain.weight.requires_grad_(True)  # trained from now on
        _, gradients = loss_and_gradients(model, make_batch())
    assert gradients["base_model.model.model.layers.2.post_attention_layernorm.weight"].abs().sum() > 0


def test_another_epsilon_is_left_alone():
    model = lora_model()
    norms_of(model)[1].variance_epsilon *= 2
    with sparsify(model, LEAN):
        assert [is_lean(norm) for norm in norms_of(model)] == [True, False, True]


@pytest.mark.parametrize("exact", [("norms",), ("padding",), ()], ids=str)
def test_saving_is_switchable_and_undone(exact):
    model = lora_model()
    with sparsify(model, SparseLoraConfig(exact=exact)):
        assert all(is_lean(norm) == ("norms" in exact) for norm in norms_of(model))
        assert all(is_lean(norm) == ("norms" in exact) for norm in norms_of(copy.deepcopy(model)))
    assert {type(norm) for norm in norms_of(model)} == {LlamaRMSNorm}


@pytest.mark.parametrize("later", [False, True], ids=["before", "later"])
def test_a_forward_that_others_put_on_a_norm_is_used(batch, later):
    """Liger's kernels do that when training starts."""
    model, calls = lora_model(), []
    want = loss_and_gradients(model, batch)

    def put():
        for norm in norms_of(model):
            norm.forward = lambda x, norm=norm: calls.append(1) or LlamaRMSNorm.forward(norm, x)

    if not later:
        put()
    with sparsify(model, LEAN) as handle:
        if later:
            put()
        calls.clear()
        handle.begin_run(10)
        assert_same(loss_and_gradients(model, batch), want, 1e-5)
        assert len(calls) == 3
    assert all("forward" in vars(norm) for norm in norms_of(model))
