"""Sparse models over a quantised base: the same as over the dequantised weights, and trained, saved, resumed alike."""

import copy

import pytest
import torch
from helpers import (
    ATTENTION,
    MLP,
    SPARSE,
    VOCAB,
    add_lora,
    assert_same,
    assert_untouched,
    differs,
    gradients,
    loss_and_gradients,
    relative_error,
    snapshot,
    sparse_result,
    tiny_model,
)
from peft import EvaConfig, PeftModel, initialize_lora_eva_weights, prepare_model_for_kbit_training
from quantised import KINDS, bnb, pair, quantise
from reference import MaskedDense
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from sparselora_hf import SparseLoraConfig, TokenPlan, sparsify
from sparselora_hf.ops.quant import is_repacked

ALL = ATTENTION + MLP
# float32 products in another order
TOL = 2e-5


def sets_of(model, batch, config=SPARSE):
    """Channel sets of one sparse forward."""
    with sparsify(model, config, progress=False) as handle:
        handle.set_enabled(True)
        model(**batch)
        return {key: chosen.narrow.tolist() for key, chosen in handle.state.batch.selections.items()}


@pytest.mark.parametrize("targets", [ATTENTION, ALL], ids=["qkvo", "all linears"])
@pytest.mark.parametrize("kind", KINDS)
def test_sparse_equals_sparse_on_dequantised_weights(kind, targets, batch):
    model, twin = pair(kind, targets, attention_bias=True, mlp_bias=True)
    want = sparse_result(twin, batch, SPARSE)
    assert_same(sparse_result(model, batch, SPARSE), want, TOL)
    assert differs(want, loss_and_gradients(twin, batch))


def fused_model(family: str) -> nn.Module:
    """A random decoder whose projections are fused: queries, keys and values; in Phi-3 also gate and up."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": VOCAB}
    config = AutoConfig.for_model(
        family, **sizes, num_attention_heads=8, num_key_value_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.15)
    return model


@pytest.mark.parametrize("kind", ["nf4-double", "int8"])
@pytest.mark.parametrize("family", ["phi3", "gpt_neox"])
def test_fused_projections(family, kind, batch):
    """Of a fused weight a role has a share of the rows: in one piece (Phi-3), or one for each head (GPT-NeoX)."""
    targets = {"phi3": ["qkv_proj", "gate_up_proj", "down_proj"], "gpt_neox": ["query_key_value", "dense_4h_to_h"]}
    model, twin = pair(kind, targets[family], model=fused_model(family))
    for config in (SPARSE, SPARSE.replace(criterion="oracle")):
        sets = sets_of(model, batch, config)
        assert set(sets) >= {(0, "mlp"), (1, "mlp"), (1, "qk"), (1, "vo")}
        assert sets == sets_of(twin, batch, config)
        want = sparse_result(twin, batch, config)
        assert_same(sparse_result(model, batch, config), want, TOL)
        assert differs(want, loss_and_gradients(twin, batch))


def test_dora(batch):
    """DoRA takes the norm of the dequantised weight by itself; its base product is sparse."""
    results = [sparse_result(model, batch, SPARSE) for model in pair(targets=ATTENTION, lora={"use_dora": True})]
    assert_same(*results, TOL)


@pytest.mark.parametrize("targets", [ATTENTION, ALL], ids=["qkvo", "all linears"])
@pytest.mark.parametrize("kind", ["nf4-double", "int8"])
def test_against_brute_force(kind, targets, batch):
    """The masked dense computation of `reference.py`, in float64, on the dequantised weights."""
    model, twin = pair(kind, targets)
    with sparsify(model, SPARSE, progress=False) as handle:
        keep = [
            [d.keep if d.outcome == "sparse" else None for d in handle.decisions if d.name.endswith(part)]
            for part in ("mlp", "self_attn")
        ]
        factors = {key: (f.up @ f.down).double() for key, f in handle.state.criterion.factors.items()}
        handle.set_enabled(True)
        got = loss_and_gradients(model, batch)
        chosen = {key: selection.narrow.tolist() for key, selection in handle.state.batch.selections.items()}
    reference = MaskedDense(twin.double(), *keep, factors)
    want = reference(batch)[1]
    assert chosen == reference.sets
    assert_same(got, want, 1e-4)


@pytest.mark.parametrize("criterion", ["svd", "svd_mean", "oracle", "sampled"])
@pytest.mark.parametrize("kind", KINDS)
def test_sets_are_those_of_the_dequantised_model(kind, criterion, batch):
    """Not the first channels, as where the SVD is taken of packed bytes."""
    model, twin = pair(kind)
    config = SPARSE.replace(criterion=criterion)
    sets = sets_of(model, batch, config)
    assert sets == sets_of(twin, batch, config)
    assert set(sets) == {(0, "mlp"), (1, "mlp"), (1, "qk"), (1, "vo")}
    assert all(chosen != list(range(len(chosen))) for chosen in sets.values())


@pytest.mark.parametrize("criterion", ["static", "output", "svd_whitened"])
@pytest.mark.parametrize("kind", ["fp4", "int8"])
def test_fits_are_those_of_the_dequantised_model(kind, criterion, batch):
    config = SPARSE.replace(criterion=criterion, compensation="low_rank", compensation_rank=4)
    results = []
    for model in pair(kind):
        with sparsify(model, config, progress=False) as handle:
            model(**batch)
            handle.set_enabled(True)
            results.append(loss_and_gradients(model, batch))
    assert_same(*results, 1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_exact_savings_change_no_number(kind, batch):
    model, _ = pair(kind, ALL)
    want = loss_and_gradients(model, batch)
    with sparsify(model, SparseLoraConfig()) as handle:
        handle.set_enabled(True)
        plan = TokenPlan.from_batch(batch["labels"], batch["attention_mask"], None)
        handle.state.begin(plan, batch["labels"].device, loss_only=True)
        handle.state.pinned = True
        assert_same(loss_and_gradients(model, batch), want, TOL)


@pytest.mark.parametrize("kind", ["nf4-double", "int8"])
def test_no_output_tokens(kind, batch):
    """Linears of bitsandbytes meet no rows at all."""
    results = []
    for model in pair(kind, ALL):
        with sparsify(model, SPARSE, progress=False) as handle:
            handle.set_enabled(True)
            model.zero_grad()
            logits = model(**{**batch, "labels": torch.full_like(batch["labels"], -100)}).logits
            logits.sum().backward()
            results.append((logits.detach(), gradients(model)))
    assert_same(*results, TOL)


@pytest.mark.parametrize("kind", ["nf4-double", "int8"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointing_and_preparation_for_kbit_training(kind, reentrant, batch):
    want = sparse_result(pair(kind, ALL)[0], batch, SPARSE)
    options = {"use_reentrant": reentrant}
    model = prepare_model_for_kbit_training(quantise(tiny_model(), kind), gradient_checkpointing_kwargs=options)
    model = add_lora(model, ALL).train()
    assert_same(sparse_result(model, batch, SPARSE), want, TOL)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_types(compute, autocast, batch, choose_again):
    """Gradients are near those of float32, and the residual stream keeps the type it has in the dense model."""
    want = sparse_result(pair("nf4-double", ALL)[1], batch, SPARSE)
    choose_again()
    model = add_lora(quantise(tiny_model(), "nf4-double", compute), ALL).train()
    seen = {}
    for number, layer in enumerate(model.base_model.model.model.layers):
        layer.mlp.register_forward_hook(lambda _m, _a, y, n=number: seen.setdefault(n, []).append(y.dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(**batch)
        got = sparse_result(model, batch, SPARSE)
    assert [len(set(types)) for types in seen.values()] == [1, 1, 1]
    half = autocast or compute == torch.bfloat16
    assert_same(got, want, 0.1 if half else TOL)
    assert differs(got, want, 1e-4) == half


def test_restore_leaves_no_trace(batch):
    model, _ = pair("nf4-double", ALL)
    before, dense = snapshot(model), loss_and_gradients(model, batch)
    sparse = sparse_result(model, batch, SPARSE)
    assert differs(sparse, dense)
    assert_untouched(model, before)
    assert_same(loss_and_gradients(model, batch), dense, 1e-7)


@pytest.mark.parametrize("kind", ["nf4-double", "int8"])
def test_a_copy_is_sparse_too(kind, batch):
    model, _ = pair(kind, ALL)
    with sparsify(model, SPARSE, progress=False) as handle:
        handle.set_enabled(True)
        twin = copy.deepcopy(model)
        assert_same(loss_and_gradients(twin, batch), loss_and_gradients(model, batch), 1e-7)


@pytest.mark.parametrize("kind", ["nf4-double", "int8"])
def test_the_adapter_loads_in_plain_peft(kind, batch, tmp_path):
    model, _ = pair(kind, ALL)
    with sparsify(model, SPARSE, progress=False) as handle:
        handle.set_enabled(True)
        model.save_pretrained(tmp_path)
        keys = list(model.state_dict())
    assert keys == list(model.state_dict())
    loaded = PeftModel.from_pretrained(quantise(tiny_model(), kind), tmp_path)
    # in training mode: bitsandbytes' evaluation on some CPUs fails where blocks reach over the ends of rows
    with torch.no_grad():
        assert relative_error(loaded.train()(**batch).logits, model(**batch).logits) < TOL


def test_weights_keep_the_layout_that_has_gradients(batch):
    """An evaluation between two steps, on whatever CPU: bitsandbytes would repack the weights on some."""
    model, _ = pair(targets=ALL, intermediate_size=128)
    linears = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    before = [linear.support_avx512bf16_for_cpu for linear in linears]
    with sparsify(model, SPARSE, progress=False) as handle:
        assert not any(linear.support_avx512bf16_for_cpu for linear in linears)
        handle.set_enabled(True)
        want = loss_and_gradients(model, batch)
        with torch.no_grad():
            dense = model.eval()(**batch).logits
        assert_same(loss_and_gradients(model.train(), batch), want, 1e-7)
    with torch.no_grad():
        assert torch.equal(dense, model(**batch).logits)
    assert [linear.support_avx512bf16_for_cpu for linear in linears] == before


@pytest.mark.parametrize("kind", KINDS)
def test_factors_follow_what_is_stored(kind, batch, tmp_path):
    """Forwards before a run move int8's scales and settle a type of products, which changes no weight."""
    model, _ = pair(kind)
    with sparsify(model, SPARSE.replace(criterion="svd", cache_dir=tmp_path), progress=False) as handle:
        before = dict(handle.state.criterion.factors)
        loss_and_gradients(model, batch)
        handle.begin_run(max_steps=10)
        assert handle.state.criterion.factors == before
        for module in model.modules():
            if isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
                module.weight.data.flatten()[:8] += 1
        handle.begin_run(max_steps=10)
        assert all(handle.state.criterion.factors[key] is not before[key] for key in before)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float32], ids=str)
def test_packed_bytes_stored_as_floats(compute, storage, batch):
    """As FSDP wants them: the bytes, read as floats, may be NaN and mean nothing."""
    model = add_lora(quantise(tiny_model(), compute=compute), ALL).train()
    linears = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    for linear in linears:
        linear.weight.data.view(-1)[:4] = 255  # NaN in every type
    with sparsify(model, SPARSE, progress=False) as handle:
        outcomes = [(d.name, d.outcome) for d in handle.decisions]
    want = sparse_result(model, batch, SPARSE)
    for linear in linears:
        linear.weight.data = linear.weight.data.view(-1).view(storage)[:, None]
    with sparsify(model, SPARSE, progress=False) as handle:
        assert [(d.name, d.outcome) for d in handle.decisions] == outcomes
    assert_same(sparse_result(model, batch, SPARSE), want, 1e-6)


def test_a_repacked_weight_is_refused():
    model, _ = pair()
    model.base_model.model.model.layers[1].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match=r"layers\.1: the weight of up has no gradients: .* call sparsify, before"):
        sparsify(model, SPARSE, progress=False)


def test_adapters_are_initialised_by_eva_once_a_model_is_sparse(batch):
    """It runs the model in evaluation mode, where a CPU with bf16 instructions would repack the weights."""
    model = add_lora(quantise(tiny_model()), ATTENTION, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0)).train()
    linears = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    for linear in linears:
        linear.support_avx512bf16_for_cpu = True
    with sparsify(model, SPARSE, progress=False) as handle:
        initialize_lora_eva_weights(model, [batch] * 2, show_progress_bar=False)
        handle.set_enabled(True)
        model(**batch).loss.backward()
    assert not any(map(is_repacked, linears))
    first = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight
    torch.testing.assert_close(first @ first.T, torch.eye(len(first)), atol=1e-5, rtol=0.0)  # what EVA makes of them
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_B" in name)


class HQQLinear(nn.Module):
    """A linear of another quantiser: no subclass of `nn.Linear`, and no `weight`."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.register_buffer("W_q", linear.weight.detach().clone())

    def forward(self, x):
        return nn.functional.linear(x, self.W_q, self.bias)


def test_other_quantisers_stay_dense_and_are_named(batch):
    model = tiny_model()
    for name in ("mlp.up_proj", "self_attn.o_proj"):
        layer = model.model.layers[1]
        layer.set_submodule(name, HQQLinear(layer.get_submodule(name)))
    model = add_lora(model, ["q_proj"]).train()
    with sparsify(model, SPARSE, progress=False) as handle:
        report = {d.name.split("layers.")[1]: (d.outcome, d.reason) for d in handle.decisions}
        for part, role in (("1.mlp", "up"), ("1.self_attn", "o")):
            assert report[part][0] == "dense"
            assert report[part][1].startswith(f"{role} is a HQQLinear, not a plain linear: of quantised weights")
        assert report["0.mlp"][0] == "sparse"
        handle.set_enabled(True)
        loss_and_gradients(model, batch)
