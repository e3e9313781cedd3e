"""LoRA layers that add their branch in place: same numbers, and PEFT's own forward wherever it is needed."""

import pytest
import torch
from helpers import assert_same, lora_model, loss_and_gradients
from peft.tuners.lora.layer import Linear
from torch.autograd import gradcheck

from sparselora_hf import SparseLoraConfig, sparsify
from sparselora_hf.modules.classes import Patched
from sparselora_hf.ops.branch import add_branch

LEAN = SparseLoraConfig(exact=("adapters",))


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, Linear)]


def count_in_place(monkeypatch) -> list:
    calls = []
    counted = lambda *args: calls.append(1) or add_branch(*args)  # noqa: E731
    monkeypatch.setattr("sparselora_hf.modules.adapter.add_branch", counted)
    return calls


def test_branch_is_its_formula():
    draw = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 5), (2, 3, 4), (2, 4), (5, 2))
    y, x, a, b = (torch.randn(shape, dtype=torch.float64, generator=draw).requires_grad_() for shape in shapes)
    want = y + 1.5 * (x @ a.t() @ b.t())
    result = y * 1
    got = add_branch(result, x, a, b, 1.5)
    assert got.data_ptr() == result.data_ptr()
    torch.testing.assert_close(got, want)
    assert gradcheck(lambda y, *rest: add_branch(y * 1, *rest, 1.5), (y, x, a, b))


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_plain_adapters_are_added_in_place(batch, sparse, monkeypatch):
    config = SparseLoraConfig(attention_sparsity={"1-2": 0.5}, rank=4, dense_if_slower=False, exact=False)
    model, results, calls = lora_model(), [], count_in_place(monkeypatch)
    for exact in ((), ("adapters",)):
        with sparsify(model, config.replace(exact=exact)) as handle:
            handle.set_enabled(sparse)
            results.append(loss_and_gradients(model, batch))
    assert len(calls) == len(layers_of(model)) == 12
    assert_same(results[1], results[0], 1e-6)
    assert not any(isinstance(module, Patched) for module in model.modules())


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
