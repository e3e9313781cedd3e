"""The sparse model against a masked dense one: logits, loss and every LoRA gradient, in float64."""

import pytest
from helpers import (
    ATTENTION,
    MLP,
    SPARSE,
    add_lora,
    assert_same,
    differs,
    gradients,
    make_batch,
    relative_error,
    tiny_model,
)
from reference import MaskedDense, double_norms, next_token_loss

from sparselora_hf import TokenPlan, sparsify

TOL = 1e-9
MLP_SPARSITY, ATTENTION_SPARSITY = {"0, 2": 0.9, "1": 0.5}, {"0-1": 0.75, "2": 0.5}
SHAPES = {"8/4": (8, 4), "32/8": (32, 8)}


def build(family="llama", heads=(8, 4), targets=ATTENTION, lora=None, **options):
    if family == "llama":
        options = {"attention_bias": True, "mlp_bias": True} | options
    return add_lora(double_norms(tiny_model(family, heads=heads, **options)), targets, **(lora or {})).double().train()


def run(model, batch):
    """Logits, loss and gradients; the loss is taken here, for transformers takes it in float32."""
    model.zero_grad(set_to_none=True)
    logits = model(**batch).logits
    loss = next_token_loss(logits, batch["labels"])
    loss.backward()
    return logits.detach(), (loss.detach(), gradients(model))


def compare(model, batch, loss_only=False, **settings):
    """Run both; returns the reference for a look at its sets."""
    sparsity = {"mlp_sparsity": MLP_SPARSITY, "attention_sparsity": ATTENTION_SPARSITY}
    config = SPARSE.replace(**(sparsity | settings))
    dense = MaskedDense(model, [None] * 3, [None] * 3)(batch)[1]
    with sparsify(model, config, progress=False) as handle:
        assert not any(d.reason for d in handle.decisions)  # what the check at attach makes dense would pass unseen
        kept = [
            [d.keep if d.outcome == "sparse" else None for d in handle.decisions if d.name.endswith(part)]
            for part in ("mlp", "self_attn")
        ]
        factors = {key: (f.up @ f.down).double() for key, f in handle.state.criterion.factors.items()}
        reference = MaskedDense(
            model,
            *kept,
            factors or None,
            label_rule=config.token_rule == "label",
            mean_tokens=config.criterion == "svd_mean",
            sliced=config.lora_branch == "sliced",
        )
        want_logits, want = reference(batch)
        handle.set_enabled(True)
        if loss_only:
            plan = TokenPlan.from_batch(batch["labels"], batch["attention_mask"], None, config.token_rule)
            handle.state.begin(plan, batch["labels"].device, loss_only=True)
            handle.state.pinned = True
        logits, got = run(model, batch)
        sets = {key: selection.narrow.tolist() for key, selection in handle.state.batch.selections.items()}
    assert sets == reference.sets if not loss_only else sets.items() <= reference.sets.items()
    real = batch["attention_mask"].bool()
    if not loss_only:
        assert relative_error(logits[real], want_logits[real]) < TOL
    assert_same(got, want, TOL)
    assert differs(want, dense)  # sparsity did something
    return reference


@pytest.mark.parametrize("exact", [False, ("padding", "frozen_below")], ids=["plain", "exact"])
@pytest.mark.parametrize("targets", [ATTENTION, ATTENTION + MLP], ids=["qkvo", "all linears"])
@pytest.mark.parametrize("heads", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_model(family, heads, targets, exact):
    # Qwen2's head_dim is hidden / heads
    options = {"hidden_size": 128} if (family, heads) == ("qwen2", (32, 8)) else {}
    model = build(family, heads, targets, **options)
    compare(model, make_batch(), exact=exact)


@pytest.mark.parametrize("exact", [False, ("padding", "frozen_below")], ids=["plain", "exact"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("part", ["mlp", "attention"])
def test_one_part_alone_on_either_padding_side(part, side, exact):
    other = {"mlp": "attention_sparsity", "attention": "mlp_sparsity"}[part]
    compare(build(), make_batch(side=side), exact=exact, **{other: 0.0})


@pytest.mark.parametrize("criterion", ["oracle", "svd", "svd_mean"])
def test_criterion(criterion):
    compare(build(), make_batch(), criterion=criterion)


@pytest.mark.parametrize("targets", ["gate_proj", "down_proj", "up_proj v_proj", "q_proj o_proj"])
def test_adapters_on_some_projections(targets):
    compare(build(targets=targets.split()), make_batch())


@pytest.mark.parametrize("rule", ["label_or_predictor", "label"])
@pytest.mark.parametrize("targets", [ATTENTION, ATTENTION + MLP], ids=["qkvo", "all linears"])
@pytest.mark.parametrize("attention", [ATTENTION_SPARSITY, 0.0], ids=["attention too", "MLP alone"])
def test_loss_positions_alone(rule, targets, attention):
    """Savings that need the promise that nothing but the loss is read."""
    settings = {"loss_only": True, "exact": True, "token_rule": rule, "attention_sparsity": attention}
    compare(build(targets=targets), make_batch(), **settings)


@pytest.mark.parametrize("heads", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("lora", [{}, {"lora_bias": True}], ids=["plain", "bias"])
@pytest.mark.parametrize("branch", ["dense", "sliced"])
def test_lora_branch(heads, lora, branch):
    compare(build(heads=heads, targets=ATTENTION + MLP, lora=lora), make_batch(), lora_branch=branch)


def test_sliced_branch_where_some_projections_have_no_adapter():
    compare(build(targets=["v_proj"]), make_batch(), lora_branch="sliced")


def test_token_rule_of_the_paper():
    compare(build(), make_batch(), token_rule="label")


def test_several_turns():
    batch = make_batch((14, 11), (4, 7))
    batch["labels"][0, 3:5] = batch["input_ids"][0, 3:5]
    batch["labels"][1, 0] = batch["input_ids"][1, 0]
    compare(build(), batch)


@pytest.mark.parametrize("sparsity", [0.01, 0.5, 0.999])
def test_degrees_of_sparsity(sparsity):
    reference = compare(build(), make_batch(), mlp_sparsity=sparsity, attention_sparsity=sparsity)
    assert len(reference.sets[0, "mlp"]) == max(1, round(96 * (1 - sparsity)))


def test_dense_reference_is_the_dense_model():
    """The judge itself: with no masks it is the family's own model."""
    model, batch = build("qwen2", targets=ATTENTION + MLP), make_batch(side="left")
    want_logits, want = MaskedDense(model, [None] * 3, [None] * 3)(batch)
    logits, got = run(model, batch)
    real = batch["attention_mask"].bool()
    assert relative_error(logits[real], want_logits[real]) < TOL
    assert_same(got, want, TOL)


def test_the_tolerance_can_fail():
    """Weights rounded to float32 while computing would be noticed."""
    model, batch = build(), make_batch()
    want = MaskedDense(model, [None] * 3, [None] * 3)(batch)[1]
    for parameter in model.parameters():
        parameter.data *= 1 + 1e-7
    with pytest.raises(AssertionError):
        assert_same(MaskedDense(model, [None] * 3, [None] * 3)(batch)[1], want, TOL)
