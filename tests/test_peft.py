"""States that PEFT can put an adapter in, and adapters that come later, on separate and on fused projections."""

import re

import pytest
import torch
from helpers import (
    SPARSE,
    add_lora,
    assert_same,
    differs,
    fill_adapters,
    lora_model,
    loss_and_gradients,
    sparse_result,
)
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from test_families import compare, exactly, result
from training import assert_same_run, examples, trained
from zoo import lora_targets, zoo_lora, zoo_model

from sparselora_hf import sparsify

SPARSE = SPARSE.replace(mlp_sparsity=0.9, attention_sparsity=0.75, criterion="oracle")
DENSE = SPARSE.replace(mlp_sparsity=0.0, attention_sparsity=0.0)


@pytest.fixture(params=["llama", "phi3"])
def model(request):
    return zoo_lora(request.param, "all")


def add(model, name, **options):
    """One more adapter, filled; those that are there keep their weights."""
    before = {key: p.detach().clone() for key, p in model.named_parameters() if "lora_" in key}
    targets = lora_targets(model, "all")
    model.add_adapter(name, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", **options))
    fill_adapters(model, seed=5)
    for key, p in model.named_parameters():
        if key in before:
            p.data.copy_(before[key])


def test_another_adapter_takes_over(model, batch):
    first = result(model, batch)[0]
    add(model, "other")
    model.set_adapter("other")
    compare(model, batch, SPARSE)
    assert differs((result(model, batch)[0], {}), (first, {}))


def test_two_adapters_at_once(model, batch):
    add(model, "other")
    model.base_model.set_adapter(["default", "other"])
    compare(model, batch, SPARSE)


@pytest.mark.parametrize("state", ["disabled", "merged"])
def test_disabled_and_merged(model, batch, state):
    if state == "merged":
        model.merge_adapter()
        compare(model, batch, SPARSE)
        return
    with model.disable_adapter():
        compare(model, batch, SPARSE)


def test_merged_and_disabled_is_taken_out_first(model, batch):
    """PEFT takes the adapters out in its own forwards, which come after the channels were chosen, or not at all."""
    with sparsify(model, SPARSE, progress=False) as handle:
        handle.set_enabled(True)
        with model.disable_adapter():
            want = model(**batch).loss
            model.merge_adapter()
            for _ in range(2):
                torch.testing.assert_close(model(**batch).loss, want, rtol=1e-5, atol=1e-5)


def test_weights_that_a_merge_changes_are_read_anew(batch):
    """Of few channels slices are kept from step to step. PEFT writes to `data`, which leaves no trace on a weight."""
    model = lora_model(targets=("q_proj", "v_proj"))
    model.add_adapter("mlp", LoraConfig(r=2, target_modules=["up_proj", "down_proj"], task_type="CAUSAL_LM"))
    fill_adapters(model)
    model.set_adapter("default")
    config = SPARSE.replace(mlp_sparsity=0.97, criterion="static", exact=False)
    with sparsify(model, config, progress=False) as handle:
        model(**batch).loss.backward()
        handle.set_enabled(True)
        before = loss_and_gradients(model, batch)
        for _ in range(2):
            model.merge_adapter(["mlp"])
            merged = loss_and_gradients(model, batch)
            handle.state._fixed.clear()  # no slice is left
            assert_same(loss_and_gradients(model, batch), merged, 1e-6)
            assert differs(merged, before)
            model.unmerge_adapter()
            assert_same(loss_and_gradients(model, batch), before, 1e-3)


def test_dora_that_comes_later_makes_its_mlp_dense(batch):
    model = zoo_lora("llama", "mlp")
    with sparsify(model, SPARSE.replace(attention_sparsity=0.0, exact=()), progress=False) as handle:
        handle.set_enabled(True)
        sparse = result(model, batch)
        add(model, "dora", use_dora=True)
        model.set_adapter("dora")
        got = result(model, batch)
        handle.set_enabled(False)
        assert_same(got, result(model, batch))
        handle.set_enabled(True)
        model.set_adapter("default")
        names = sparse[1].keys()
        again = result(model, batch)
        assert_same((again[0], {name: again[1][name] for name in names}), sparse)


def test_all_linear(batch):
    """PEFT's own way of naming every linear but the head."""
    model = add_lora(zoo_model("phi3"), "all-linear").train()
    compare(model, batch, SPARSE)


@pytest.mark.parametrize("part", ["attention", "all"])
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "starcoder2"])
def test_biases_are_trained(batch, name, part):
    """Of context rows too, and of linears without an adapter."""
    model = zoo_lora(name, part, bias="all")
    assert sum(name.endswith("bias") and p.requires_grad for name, p in model.named_parameters()) > 7
    compare(model, batch, SPARSE)


REWRITES = {"target_modules": ["v_proj"], "target_parameters": ["q_proj.weight"]}
UNUSUAL = {
    "target_parameters": (LoraConfig(**REWRITES), r"self_attn: dense \(the adapter on q is one of target_parameters"),
    "AdaLoRA": (
        AdaLoraConfig(target_modules=["q_proj", "up_proj"], total_step=10),
        r"mlp: dense \(the adapter on up is AdaLoRA",
    ),
    "DoRA": (
        LoraConfig(target_modules=["up_proj"], use_dora=True),
        r"mlp: dense \(the adapter on up is not plain LoRA",
    ),
}


@pytest.mark.parametrize(("adapter", "message"), UNUSUAL.values(), ids=UNUSUAL.keys())
def test_adapters_that_are_no_plain_lora_are_named(batch, adapter, message):
    """What carries them stays dense, and the report says so in plain words."""
    model = get_peft_model(zoo_model("llama"), adapter).train()
    want = loss_and_gradients(model, batch)
    assert_same(exactly(model, batch, DENSE), want, 1e-4)
    with sparsify(model, SPARSE, progress=False) as handle:
        report = handle.report()
    assert re.search(message, report)
    assert "Error" not in report


SAVED = {
    "embedding": ("embed_tokens", "embed_tokens.* is trained and lies below the decoder layers"),
    "final norm": ("norm", ""),
    "MLPs": ("mlp", r"mlp: dense \(the weight of gate is trained\)"),
    "a projection": ("up_proj", r"mlp: dense \(up is trained whole, by modules_to_save\)"),
    "one of attention": ("o_proj", r"self_attn: dense \(o is trained whole, by modules_to_save\)"),
}


@pytest.mark.parametrize(("module", "message"), SAVED.values(), ids=SAVED.keys())
def test_modules_to_save(batch, module, message):
    """Trained and saved whole: gradients are those of the dense model, and the report says what that costs."""
    model = zoo_lora("llama", "attention", modules_to_save=[module])
    want = loss_and_gradients(model, batch)
    assert any("modules_to_save" in name for name in want[1])
    assert_same(exactly(model, batch, DENSE), want, 1e-4)
    assert differs(sparse_result(model, batch, SPARSE), want)
    with sparsify(model, SPARSE, progress=False) as handle:
        assert re.search(message, handle.report())


def test_layers_without_an_adapter_and_a_pattern(batch):
    """Any subset of the linears, named by a regular expression."""
    pattern = r".*layers\.1\.(self_attn\.v_proj|mlp\.down_proj)"
    model = add_lora(zoo_model("llama"), pattern).train()
    assert sum(p.requires_grad for p in model.parameters()) == 4
    compare(model, batch, SPARSE)


def test_dora_trains(tmp_path):
    """Sparse from the second step on, over and over the same four examples."""
    model = zoo_lora("llama", "all", use_dora=True)
    data, settings = examples(4), {"max_steps": 10, "learning_rate": 3e-2, "lr_scheduler_type": "constant"}
    trainer = trained(tmp_path, SPARSE.replace(start_step=1), model=model, data=data, **settings)
    assert trainer.losses[-1] < 0.7 * trainer.losses[0]
    assert any(d.outcome == "sparse" for d in trainer.sparse_handle.decisions)


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_a_branch_with_dora_is_not_sliced(batch, name):
    """DoRA takes its norms from an identity that it sends through the branch, which is zero at first."""
    config, results = SPARSE.replace(mlp_sparsity=0.0, criterion="static"), []
    for branch in ("dense", "sliced"):
        model = add_lora(zoo_model(name), lora_targets(zoo_model(name), "attention"), use_dora=True).train()
        weights = {key: p.data for key, p in model.named_parameters() if "lora_B" in key}
        filled = {key: weight.clone() for key, weight in weights.items()}
        for weight in weights.values():
            weight.zero_()
        with sparsify(model, config.replace(lora_branch=branch), progress=False) as handle:
            for key, weight in weights.items():
                weight.copy_(filled[key])
            model(**batch)
            handle.set_enabled(True)
            results.append(loss_and_gradients(model, batch))
    assert_same(results[1], results[0])


@pytest.mark.skipif(not hasattr(LoraConfig, "velora_config"), reason="VeLoRA came with PEFT 0.21")
def test_velora_averages_over_all_positions(tmp_path):
    dense, exact = (
        trained(tmp_path, config, model=zoo_lora("llama", "all", velora_config={"num_groups": 4}), max_steps=2)
        for config in (None, DENSE)
    )
    assert_same_run(exact, dense)
    assert "exact saving padding: off (VeLoRA" in exact.sparse_handle.report()
