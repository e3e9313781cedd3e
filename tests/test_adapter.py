"""LoRA layers that add their branch in place: same numbers, and PEFT's own forward wherever it is needed."""

import copy
import pickle

import pytest
import torch
from helpers import assert_same, lora_model, loss_and_gradients
from peft.tuners.lora.layer import Linear
from torch.autograd import gradcheck

from sparselora_hf import SparseLoraConfig, sparsify
from sparselora_hf.modules.classes import Patched
from sparselora_hf.ops.branch import add_branch, fork_branch
from sparselora_hf.ops.projection import projections

LEAN = SparseLoraConfig(exact=("adapters",))


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, Linear)]


def count_in_place(monkeypatch) -> list[int]:
    """Projections that each call of our functions computes."""
    calls = []

    def added(*args):
        calls.append(1)
        return add_branch(*args)

    def projected(x, linears, dtype):
        calls.append(len(linears))
        return projections(x, linears, dtype)

    monkeypatch.setattr("sparselora_hf.modules.adapter.add_branch", added)
    monkeypatch.setattr("sparselora_hf.modules.adapter.projections", projected)
    return calls


def drawn(*shapes, dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(shape, dtype=dtype, generator=draw).requires_grad_() for shape in shapes]


def with_branch(y, x, a, b, scaling):
    """As a lean layer does it, with ``y`` as the frozen product's result: of ``x``, and of its own."""
    through, hidden = fork_branch(x, a, y.dtype)
    return add_branch(y + 2 * through[..., : y.shape[-1]], hidden, b, scaling)


def test_branch_is_its_formula():
    y, x, a, b = drawn((2, 3, 4), (2, 3, 5), (2, 5), (4, 2))
    want = y + 2 * x[..., :4] + 1.5 * (x @ a.t() @ b.t())
    torch.testing.assert_close(with_branch(y, x, a, b, 1.5), want)
    assert gradcheck(lambda *args: with_branch(*args, 1.5), (y, x, a, b))
    assert gradcheck(lambda y, a, b: with_branch(y, x.detach(), a, b, 1.5), (y, a, b))


def test_branch_is_written_in_place_both_ways():
    y, x, a, b = drawn((2, 3, 4), (2, 3, 5), (2, 5), (4, 2))
    result = y * 1
    assert add_branch(result, fork_branch(x, a, x.dtype)[1], b, 1.5).data_ptr() == result.data_ptr()
    through, hidden = fork_branch(x, a, x.dtype)
    fresh = torch.ones_like(x)
    (grad,) = torch.autograd.grad((through, hidden), x, (fresh, torch.ones_like(hidden)))
    assert grad.data_ptr() == fresh.data_ptr()
    torch.testing.assert_close(grad, 1 + a.sum(0).expand_as(x))


@pytest.mark.parametrize("frozen_input", [True, False])
def test_an_input_that_is_frozen_asks_the_frozen_product_for_nothing(frozen_input):
    x, a = drawn((3, 5), (2, 5))
    through, hidden = fork_branch(x.detach() if frozen_input else x, a, x.dtype)
    assert through.requires_grad is not frozen_input
    assert hidden.requires_grad


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_plain_adapters_are_added_in_place(batch, sparse, monkeypatch):
    config = SparseLoraConfig(attention_sparsity={"1-2": 0.5}, rank=4, dense_if_slower=False, exact=False)
    model, results, calls = lora_model().double(), [], count_in_place(monkeypatch)
    for exact in ((), ("adapters",)):
        with sparsify(model, config.replace(exact=exact)) as handle:
            handle.set_enabled(sparse)
            results.append(loss_and_gradients(model, batch))
    assert calls == [3, 1] * 3
    assert_same(results[1], results[0], 1e-12)
    assert not any(isinstance(module, Patched) for module in model.modules())


AUTOCAST = {
    "bfloat16 model": (torch.bfloat16, torch.float32),
    "float32 model": (torch.float32, torch.float32),
    "all bfloat16": (torch.bfloat16, torch.bfloat16),
}


@pytest.mark.parametrize("dtypes", AUTOCAST.values(), ids=AUTOCAST.keys())
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_under_autocast_too(batch, dtypes, sparse, monkeypatch):
    """As the Trainer's `bf16` has it: adapters in float32, products in bfloat16, about as near to float64 as PEFT."""
    config = SparseLoraConfig(
        attention_sparsity={"1-2": 0.5}, rank=4, dense_if_slower=False, exact=False, criterion="random"
    )
    model, results, calls = lora_model(), {}, count_in_place(monkeypatch)
    for exact, kinds in (((), (torch.float64, torch.float64)), ((), dtypes), (("adapters",), dtypes)):
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(kinds["lora_" in name])
        with (
            sparsify(model, config.replace(exact=exact)) as handle,
            torch.autocast("cpu", torch.bfloat16, enabled=kinds[0] != torch.float64),
        ):
            handle.set_enabled(sparse)
            results[exact, kinds[0]] = loss_and_gradients(model, batch)
    assert sum(calls) == len(layers_of(model)) == 12
    truth = results.pop(((), torch.float64))[1]

    def error(gradients):
        return sum((gradients[name].double() - want).norm() for name, want in truth.items())

    theirs, ours = (gradients for _, gradients in results.values())
    assert {g.dtype for g in ours.values()} == {dtypes[1]}
    assert error(ours) < 1.6 * error(theirs)  # roundings fall differently: 0.83 to 1.45 over eight models


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_over_a_quantised_base_too(kind, batch, monkeypatch):
    model, results, calls = pytest.importorskip("quantised").pair(kind)[0], [], count_in_place(monkeypatch)
    for exact in ((), ("adapters",)):
        with sparsify(model, SparseLoraConfig(exact=exact)):
            results.append(loss_and_gradients(model, batch))
    assert len(calls) == 12
    assert_same(results[1], results[0], 1e-6)


def seen_by_a_hook(model):
    for layer in layers_of(model):
        layer.base_layer.register_forward_hook(lambda *_: None)


def half_of_the_adapter(model):
    for layer in layers_of(model):
        layer.lora_A.bfloat16()
        layer.lora_B.bfloat16()


def second_adapter(model):
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])


PLAIN = {"dropout": {"lora": {"dropout": 0.1}}, "DoRA": {"lora": {"use_dora": True}}}
CHANGES = {
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
    "merged": lambda model: model.merge_adapter(),
    "two adapters": second_adapter,
    "bfloat16 adapter": half_of_the_adapter,
    "seen by a hook": seen_by_a_hook,
}


@pytest.mark.parametrize(
    "options", [*PLAIN.values(), {"lora": {"lora_bias": True}, "family": "qwen2"}], ids=[*PLAIN, "bias"]
)
def test_other_adapters_run_as_peft_has_them(options, batch, monkeypatch):
    model, calls = lora_model(**options), count_in_place(monkeypatch)
    torch.manual_seed(3)
    want = loss_and_gradients(model, batch)
    with sparsify(model, LEAN):
        torch.manual_seed(3)
        assert_same(loss_and_gradients(model, batch), want, 1e-6)
    assert not calls


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_states_that_are_not_plain_run_as_peft_has_them(change, batch, monkeypatch):
    model, calls = lora_model(), count_in_place(monkeypatch)
    change(model)
    want = model(**batch).loss
    with sparsify(model, LEAN):
        torch.testing.assert_close(model(**batch).loss, want)
    assert not calls


# queries, keys and values together


def told_before_keys(model):
    for layer in layers_of(model)[1::4]:
        layer.register_forward_pre_hook(lambda *_: None)


def told_of_gradients(model):
    for layer in layers_of(model)[2::4]:
        layer.register_full_backward_hook(lambda *_: None)


def adapter_on_queries_and_values(model):
    for layer in layers_of(model)[1::4]:
        layer.enable_adapters(False)


def half_of_the_keys(model):
    for layer in layers_of(model)[1::4]:
        layer.lora_A.bfloat16()
        layer.lora_B.bfloat16()


APART = {
    "nothing": (lambda model: None, [3, 1]),
    "told before keys": (told_before_keys, [2, 1, 1]),
    "told of gradients": (told_of_gradients, [2, 1, 1]),
    "adapter on queries and values": (adapter_on_queries_and_values, [2, 1]),
    "keys in bfloat16": (half_of_the_keys, [2, 1]),
}


@pytest.mark.parametrize(("change", "calls"), APART.values(), ids=APART.keys())
def test_what_reads_the_same_is_computed_together(change, calls, batch, monkeypatch):
    model, counted = lora_model().double(), count_in_place(monkeypatch)
    change(model)
    want = loss_and_gradients(model, batch)
    with sparsify(model, LEAN):
        assert_same(loss_and_gradients(model, batch), want, 1e-12)
    assert counted == calls * 3


def test_a_result_is_used_once_and_for_its_input_alone(monkeypatch):
    model, calls = lora_model().train(), count_in_place(monkeypatch)
    query, key = layers_of(model)[:2]
    x, other = drawn((2, 5, 64), (2, 5, 64), dtype=torch.float32)
    want = [query(x), key(x), key(other), key(x)]
    with sparsify(model, LEAN):
        got = [query(x), key(x), key(other), key(x)]
        assert calls == [3] * 3
        torch.testing.assert_close(got, want)
        copied = copy.deepcopy(model)  # values were computed and never asked for
    torch.testing.assert_close(layers_of(copied)[0](x), want[0])


def test_a_copy_computes_with_its_own_weights(monkeypatch):
    model, calls = lora_model().train(), count_in_place(monkeypatch)
    x = drawn((2, 5, 64), dtype=torch.float32)[0]
    with sparsify(model, LEAN):
        copied = pickle.loads(pickle.dumps(model))
        layers_of(copied)[1].base_layer.weight.data.zero_()
        layers_of(copied)[1].lora_B.default.weight.data.zero_()
        query, key = (layer(x) for layer in layers_of(copied)[:2])
        assert calls == [3]
        assert query.abs().max() > 0 == key.abs().max()
        assert layers_of(model)[1](x).abs().max() > 0
