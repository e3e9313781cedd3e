import pytest
import torch
from helpers import (
    ATTENTION,
    MLP,
    SPARSE,
    add_lora,
    assert_same,
    assert_untouched,
    differs,
    lora_model,
    loss_and_gradients,
    relative_error,
    snapshot,
    sparse_result,
    tiny_model,
)
from torch import nn

from sparselora_hf import ModelFamily, SparseLoraConfig, attach, sparsify
from sparselora_hf.criteria import CRITERIA
from sparselora_hf.families import find_family

DENSE = SparseLoraConfig()


# sparsity 0 is dense


@pytest.mark.parametrize("exact", [False, True], ids=["plain", "exact"])
@pytest.mark.parametrize("targets", [ATTENTION, ATTENTION + MLP], ids=["qkvo", "all linears"])
def test_sparsity_0_is_dense(any_model, batch, targets, exact):
    model = any_model if targets == ATTENTION else lora_model(any_model.config.model_type, targets)
    want = loss_and_gradients(model, batch)
    assert_same(sparse_result(model, batch, SparseLoraConfig(exact=exact)), want)


VARIANTS = {
    "DoRA": {"use_dora": True},
    "rsLoRA": {"use_rslora": True},
    "LoRA with bias": {"lora_bias": True},
    "PiSSA": {"init_lora_weights": "pissa"},
}


@pytest.mark.parametrize("targets", [ATTENTION, ATTENTION + MLP], ids=["qkvo", "all linears"])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_variants_of_lora(batch, variant, targets):
    model = lora_model(targets=targets, lora=variant)
    dense = loss_and_gradients(model, batch)
    assert_same(sparse_result(model, batch, SparseLoraConfig(exact=True)), dense)
    plain, exact = (sparse_result(model, batch, SPARSE.replace(exact=e)) for e in (False, True))
    assert_same(exact, plain)
    assert differs(plain, dense)


@pytest.mark.parametrize("branch", ["dense", "sliced"])
def test_switched_off_is_dense(any_model, batch, branch):
    want = loss_and_gradients(any_model, batch)
    with sparsify(any_model, SPARSE.replace(lora_branch=branch)) as handle:
        assert not handle.enabled
        assert_same(loss_and_gradients(any_model, batch), want)
        handle.set_enabled(True)
        assert handle.enabled
        assert differs(loss_and_gradients(any_model, batch), want)
        handle.set_enabled(False)
        assert_same(loss_and_gradients(any_model, batch), want)


@pytest.mark.parametrize("labels", ["all", "none"])
def test_batch_without_context_or_without_output(any_model, batch, labels):
    if labels == "all":
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        want = loss_and_gradients(any_model, batch)
        assert_same(sparse_result(any_model, batch, SPARSE), want)
        return
    batch["labels"] = torch.full_like(batch["labels"], -100)
    with sparsify(any_model, SPARSE) as handle:
        handle.set_enabled(True)
        any_model(**batch).logits.square().mean().backward()
    # every adapter takes part, as distributed training needs it
    assert all(p.grad is not None and p.grad.isfinite().all() for p in any_model.parameters() if p.requires_grad)


# undo


@pytest.mark.parametrize("targets", [ATTENTION, ATTENTION + MLP], ids=["qkvo", "all linears"])
@pytest.mark.parametrize("branch", ["dense", "sliced"])
def test_restore_leaves_no_trace(batch, targets, branch):
    model = lora_model(targets=targets)
    before = snapshot(model)
    handle = sparsify(model, SPARSE.replace(lora_branch=branch))
    assert list(model.state_dict()) == list(before["weights"])
    handle.set_enabled(True)
    loss_and_gradients(model, batch)
    assert handle.restore() is model
    assert_untouched(model, before)
    handle.restore()  # twice does no harm
    assert_untouched(model, before)
    assert not handle.enabled


def test_context_manager_undoes_after_an_error():
    model = lora_model()
    before = snapshot(model)
    with pytest.raises(KeyError), sparsify(model, SPARSE):
        raise KeyError("from inside")
    assert_untouched(model, before)


def test_snapshot_would_notice():
    """The judge itself: each kind of trace is seen."""
    for leave in (
        lambda m: m.register_forward_hook(lambda *_: None),
        lambda m: setattr(m, "left_behind", 1),
        lambda m: setattr(m.model.layers[0].mlp.act_fn, "__class__", nn.SiLU),
        lambda m: m.lm_head.weight.data.add_(1e-3),
        lambda m: m.register_buffer("extra", torch.zeros(1)),
    ):
        model = tiny_model()
        before = snapshot(model)
        leave(model)
        with pytest.raises(AssertionError):
            assert_untouched(model, before)


def test_again_after_restore(batch):
    model = lora_model()
    first = sparse_result(model, batch, SPARSE)
    assert_same(sparse_result(model, batch, SPARSE), first, 1e-7)


def _steps(model, config, batch):
    """Loss and gradients of a dense step, which learns, and of a sparse one."""
    with sparsify(model, config) as handle:
        handle.begin_run(max_steps=4)
        results = []
        for step in (0, 2):
            handle.begin_step(step)
            results.append(loss_and_gradients(model, batch))
        assert handle.enabled
    return results


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_default_device_that_is_not_the_models(criterion, batch):
    """As `torch.set_default_device` has it: what the package makes for itself on the host lies there all the same."""
    config = SPARSE.replace(criterion=criterion, compensation="low_rank")
    want = _steps(lora_model(), config, batch)
    model = lora_model()
    with torch.device("meta"):
        got = _steps(model, config, batch)
    for one, other in zip(got, want, strict=True):
        assert_same(one, other, 1e-6)


# wrong input: a clear error and an untouched model


def _with_nan(model, value=float("nan")):
    model.base_model.model.model.layers[1].mlp.up_proj.weight.data[3, 5] = value
    return model


def _as_gpt(model):
    model.base_model.model.config.model_type = "gptj"
    return model


WRONG = {
    "a module around it": (
        lambda: nn.Sequential(lora_model()),
        SPARSE,
        "A Sequential is no model of .* pass that part",
    ),
    "no LoRA": (tiny_model, SPARSE, "carries no LoRA adapter.*peft_config"),
    "LoRA on lm_head": (lambda: lora_model(targets=("q_proj", "lm_head")), SPARSE, "lm_head is not supported"),
    "unknown family": (lambda: _as_gpt(lora_model()), SPARSE, "'gptj' is not known. Known: apertus, .*llama, .*qwen2"),
    "rank": (
        lora_model,
        SPARSE.replace(rank=65, attention_sparsity=0.0),
        r"rank: 65 exceeds 64, .* of .*model.layers.0.mlp. Lower",
    ),
    "rank of key and value": (
        lora_model,
        SPARSE.replace(rank=33),
        r"rank: 33 exceeds 32, .* of .*model.layers.1.self_attn. Lower",
    ),
    "rank of whitened factors": (
        lora_model,
        SPARSE.replace(rank=33, criterion="svd_whitened"),
        r"rank: 33 exceeds 32, .* of .*model.layers.1.self_attn. Lower",
    ),
    "layers": (
        lora_model,
        SPARSE.replace(mlp_sparsity={"1-3": 0.5}),
        "layer 3 does not exist, .* layers 0 to 2",
    ),
    "NaN": (lambda: _with_nan(lora_model()), SPARSE, r"layers\.1: the weight of up holds NaN or infinity"),
    "infinity": (lambda: _with_nan(lora_model(), float("inf")), SPARSE, "holds NaN or infinity"),
    "triton": (lora_model, SPARSE.replace(kernels="triton"), "triton.* is not available: "),
}


@pytest.mark.parametrize(("make", "config", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_input(make, config, message):
    model = make()
    before = None if "N" in message and "infinity" in message else snapshot(model)
    with pytest.raises(ValueError, match=message):
        sparsify(model, config)
    if before:
        assert_untouched(model, before)
    assert not any("Sparse" in type(module).__name__ for module in model.modules())


def test_rank_of_a_dense_part():
    with sparsify(lora_model(), SPARSE.replace(rank=64, attention_sparsity=0.0)) as handle:
        assert handle.decisions[1].outcome == "sparse"


def test_already_sparse():
    model = lora_model()
    with sparsify(model, SPARSE):
        patched = snapshot(model)
        with pytest.raises(ValueError, match=r"sparse already\. Call restore"):
            sparsify(model, SPARSE)
        assert_untouched(model, patched)


def test_weights_on_the_meta_device():
    with pytest.raises(ValueError, match="not in memory"):
        sparsify(lora_model().to("meta"), SPARSE)


def test_error_half_way_undoes_what_was_done(monkeypatch):
    model = lora_model()
    before = snapshot(model)

    def fail(*_):
        raise RuntimeError("late")

    monkeypatch.setattr("sparselora_hf.attach.CompactHook", fail)
    with pytest.raises(RuntimeError, match="late"):
        sparsify(model, SPARSE)
    assert_untouched(model, before)


def test_family_given_by_hand(batch):
    model = lora_model()
    want = sparse_result(model, batch, SPARSE)
    _as_gpt(model)
    with sparsify(model, SPARSE, family=ModelFamily("mine")) as handle:
        handle.set_enabled(True)
        assert_same(loss_and_gradients(model, batch), want, 1e-6)


def test_unknown_family_shows_how_to_describe_one():
    with pytest.raises(ValueError, match=r'ModelFamily\("mamba"') as error:
        find_family("mamba")
    assert "sparsify(model, config, family=family)" in str(error.value)
    assert "describe it in a script (no flag takes one)" in str(error.value)


# report


def test_linear_of_another_kind_is_left_alone(batch):
    """Its forward is not known: a subclass may do anything."""
    model = lora_model()
    model.base_model.model.model.layers[1].mlp.up_proj.__class__ = type("Special", (nn.Linear,), {})
    with sparsify(model, SPARSE) as handle:
        assert "layers.1.mlp: dense (up is a Special, not a plain linear)" in handle.report()
        handle.set_enabled(True)
        loss_and_gradients(model, batch)


def test_report_says_what_became_of_each_module():
    model = lora_model()
    model.base_model.model.model.layers[0].mlp.down_proj.weight.requires_grad_(True)
    with sparsify(model, SPARSE) as handle:
        lines = handle.report().splitlines()
        assert repr(handle) == "SparseLoraHandle(2 sparse, 3 exact, 1 dense)"
    assert len(lines) == 6
    assert any("layers.0.mlp: dense (the weight of down is trained)" in line for line in lines)
    assert any("layers.1.mlp: sparse, keeps 10 of 96 channels (89.6% dropped)" in line for line in lines)
    assert any("layers.1.self_attn: sparse, keeps 8 of 32 channels (75.0% dropped)" in line for line in lines)
    assert any(line.endswith("layers.2.mlp: exact") for line in lines)


@pytest.mark.parametrize("exact", [(), ("padding",)], ids=str)
def test_no_sparsity_and_no_saving_leaves_modules_alone(exact):
    with sparsify(lora_model(), SparseLoraConfig(exact=exact)) as handle:
        assert {d.outcome for d in handle.decisions} == {"exact" if exact else "dense"}


def test_plain_model_with_injected_adapters(batch):
    """A model with adapters but without the PEFT wrapper, as `load_adapter` makes it."""
    wrapped = lora_model()
    want = sparse_result(wrapped, batch, SPARSE)
    model = wrapped.get_base_model()
    got = sparse_result(model, batch, SPARSE)
    assert_same((got[0], {f"base_model.model.{k}": v for k, v in got[1].items()}), want, 1e-6)


def test_adapter_added_after_freezing_lower_layers(batch):
    """Layers without an adapter below the lowest trained one: nothing changes but the work."""
    model = add_lora(tiny_model(), ATTENTION, layers_to_transform=[1, 2]).train()
    want = loss_and_gradients(model, batch)
    assert_same(sparse_result(model, batch, SparseLoraConfig(exact=True)), want)
    plain, exact = (sparse_result(model, batch, SPARSE.replace(exact=e)) for e in (False, True))
    assert_same(exact, plain)


@pytest.mark.parametrize("exact", [False, True], ids=["plain", "exact"])
@pytest.mark.parametrize("part", ["mlp", "self_attn"])
def test_a_part_that_is_unfrozen_later_is_dense(batch, part, exact):
    """The products on kept channels give a weight no gradient."""

    def unfreeze(model):
        for linear in getattr(model.base_model.model.model.layers[1], part).modules():
            if type(getattr(linear, "base_layer", linear)).__name__.endswith("Linear"):
                getattr(linear, "base_layer", linear).weight.requires_grad_(True)

    plain, model = lora_model(), lora_model()
    config = SPARSE.replace(mlp_sparsity=0.0, attention_sparsity=0.0, exact=exact)
    config = config.replace(**{"mlp_sparsity" if part == "mlp" else "attention_sparsity": {"1": 0.5}})
    unfreeze(plain)
    want = loss_and_gradients(plain, batch)
    with sparsify(model, config) as handle:
        handle.set_enabled(True)
        before = loss_and_gradients(model, batch)
        unfreeze(model)
        got = loss_and_gradients(model, batch)
    assert relative_error(before[0], want[0]) > 1e-3
    assert len(got[1]) > len(before[1])
    assert_same(got, want)


def test_a_fused_mlp_of_another_library_has_the_activation_of_its_configuration(batch):
    """Liger's, which takes the place of the family's class for the rest of the process, keeps none of its own."""

    class Fused(nn.Module):
        def __init__(self, config, mlp):
            super().__init__()
            self.config = config
            self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

        def forward(self, x):
            return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))

    plain, model = lora_model(), lora_model()
    for layer in model.base_model.model.model.layers:
        layer.mlp = Fused(model.base_model.model.config, layer.mlp)
    results = []
    for each in (plain, model):
        with sparsify(each, SPARSE) as handle:
            assert repr(handle) == "SparseLoraHandle(3 sparse, 3 exact, 0 dense)"
            handle.set_enabled(True)
            results.append(loss_and_gradients(each, batch))
    assert_same(*results)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_progress_bar_for_all_ranks(monkeypatch, capsys, tmp_path, rank):
    monkeypatch.setattr(attach, "rank_and_world", lambda: (rank, 2))
    with sparsify(lora_model(), SPARSE.replace(cache_dir=tmp_path), progress=True):
        assert ("SVD of the frozen weights" in capsys.readouterr().err) is (rank == 0)
