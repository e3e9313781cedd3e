"""Statistics of dense steps, end to end on tiny models."""

import pytest
import torch
from helpers import (
    ATTENTION,
    MLP,
    SPARSE,
    assert_same,
    differs,
    lora_model,
    loss_and_gradients,
    make_batch,
    relative_error,
)
from zoo import zoo_lora

from sparselora_hf import sparsify, state
from sparselora_hf.channels import top_channels
from sparselora_hf.handle import CALIBRATION_FILE
from sparselora_hf.svd import truncated_svd

BASE = SPARSE.replace(mlp_sparsity=0.9, attention_sparsity=0.5, rank=6, compensation_rank=8)
LEARNING = {
    "static": BASE.replace(criterion="static"),
    "output": BASE.replace(criterion="output"),
    "output with low rank": BASE.replace(criterion="output", compensation="low_rank"),
    "whitened": BASE.replace(criterion="svd_whitened"),
    "mean": BASE.replace(compensation="mean"),
    "low rank": BASE.replace(compensation="low_rank"),
    "static with low rank": BASE.replace(criterion="static", compensation="low_rank"),
    "whitened with mean": BASE.replace(criterion="svd_whitened", compensation="mean"),
}
learning = pytest.mark.parametrize("config", LEARNING.values(), ids=LEARNING.keys())


def warm_up(model, seeds=range(4)):
    for seed in seeds:
        loss_and_gradients(model, make_batch((20, 16, 24), (3, 2, 4), seed=seed))


@learning
@pytest.mark.parametrize("targets", [ATTENTION, ATTENTION + MLP], ids=["qkvo", "all linears"])
def test_dense_steps_are_dense_and_sparse_ones_are_not(config, targets, batch):
    model = lora_model(targets=targets)
    want = loss_and_gradients(model, batch)
    with sparsify(model, config) as handle:
        warm_up(model)
        assert_same(loss_and_gradients(model, batch), want)
        handle.set_enabled(True)
        got = loss_and_gradients(model, batch)
        assert differs(got, want)
        assert all(grad.isfinite().all() for grad in got[1].values())
        assert not handle.state.calibration.gathers
    assert_same(loss_and_gradients(model, batch), want)


def test_a_criterion_without_statistics_has_nothing_to_fit(batch):
    model = lora_model()
    with sparsify(model, BASE) as handle:
        handle.fit()
        handle.set_enabled(True)
        want = loss_and_gradients(model, batch)
        handle.fit()
        assert_same(loss_and_gradients(model, batch), want)


@learning
def test_sparsity_before_any_dense_step(config):
    with sparsify(lora_model(), config) as handle, pytest.raises(RuntimeError, match="none with context tokens"):
        handle.set_enabled(True)


@learning
def test_dense_steps_without_context_teach_nothing(config):
    model = lora_model()
    batch = make_batch((1, 1), (5, 6))
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with sparsify(model, config) as handle:
        loss_and_gradients(model, batch)
        with pytest.raises(RuntimeError, match="none with context tokens"):
            handle.set_enabled(True)


@learning
@pytest.mark.parametrize("fitted", [False, True], ids=["sample", "fit"])
def test_saved_and_loaded(config, fitted, tmp_path, batch):
    model = lora_model()
    with sparsify(model, config) as handle:
        warm_up(model)
        handle.set_enabled(fitted)
        handle.save(tmp_path)
        handle.set_enabled(True)
        want = loss_and_gradients(model, batch)
    with sparsify(model, config) as handle:
        handle.load(tmp_path)
        handle.set_enabled(True)
        assert_same(loss_and_gradients(model, batch), want, 1e-6)


@learning
def test_a_fit_under_autocast_takes_float32_all_the_same(config):
    """A loop of one's own may be under autocast as a whole; Gram matrices of 16 bits are not even positive."""
    fits = []
    for dtype in (None, torch.bfloat16, torch.float16):
        model = lora_model()
        with sparsify(model, config) as handle:
            warm_up(model)
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                handle.set_enabled(True)
            fits.append(handle.state.calibration.tensors(handle.device))
    for fit in fits[1:]:
        assert fit.keys() == fits[0].keys()
        assert all(torch.equal(fit[name], want) for name, want in fits[0].items())


@learning
def test_a_layer_in_evaluation_mode_is_dense_and_sampled(config, batch):
    model = lora_model()
    layer = model.base_model.model.model.layers[1]
    with sparsify(model, config) as handle:
        layer.eval()
        warm_up(model)
        handle.set_enabled(True)
        without = loss_and_gradients(model, batch)
        layer.train()
        assert differs(loss_and_gradients(model, batch), without)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@learning
def test_recomputation_is_not_observed_twice(config, checkpointed, batch):
    model = lora_model()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with sparsify(model, config) as handle:
        warm_up(model, [0, 1])
        reservoir = handle.state.calibration.reservoir
        context = int(handle.state.batch.plan.context.numel())
        assert len(reservoir) == 2 * context
        assert all(len(reservoir.get(key)) == 2 * context for key in reservoir.rows)
        handle.set_enabled(True)
        result = loss_and_gradients(model, batch)
    fresh = lora_model()
    with sparsify(fresh, config) as handle:
        warm_up(fresh, [0, 1])
        handle.set_enabled(True)
        assert_same(result, loss_and_gradients(fresh, batch), 1e-5)


def mlp_inputs(model, batch):
    """Inputs and outputs of every MLP in a dense forward."""
    seen = {}
    hooks = [
        layer.mlp.register_forward_hook(lambda m, args, out, i=i: seen.update({i: (args[0].detach(), out.detach())}))
        for i, layer in enumerate(model.base_model.model.model.layers)
    ]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return seen


def test_sample_holds_the_context_rows_that_reached_the_mlp():
    model, batch = lora_model(), make_batch()
    with sparsify(model, LEARNING["static"]) as handle:
        loss_and_gradients(model, batch)
        plan, reservoir = handle.state.batch.plan, handle.state.calibration.reservoir
        got = reservoir.get("mlp.1")
    want = mlp_inputs(model.train(), batch)[1][0].reshape(-1, 64)[plan.context]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_stand_in_brings_the_mlp_nearer_to_the_dense_one():
    """On tokens it was not fitted to; the more, the nearer: nothing, mean, low rank."""
    errors = {}
    for compensation in ("none", "mean", "low_rank"):
        model, batch = lora_model(), make_batch((30, 28), (2, 2), seed=99)
        dense = mlp_inputs(model, batch)
        with sparsify(model, BASE.replace(compensation=compensation, attention_sparsity=0.0)) as handle:
            warm_up(model, range(10))
            handle.set_enabled(True)
            loss_and_gradients(model, batch)
            context = handle.state.batch.plan.context
            module = model.base_model.model.model.layers[1].mlp
            got = module(dense[1][0]).detach().reshape(-1, 64)[context]
        errors[compensation] = relative_norm(got, dense[1][1].reshape(-1, 64)[context])
    assert errors["low_rank"] < 0.97 * errors["none"]
    assert errors["low_rank"] < errors["mean"] < 1.02 * errors["none"]


def relative_norm(got, want):
    return float((got - want).norm() / want.norm())


def test_whitened_factors_err_least_where_the_inputs_are():
    model = lora_model()
    with sparsify(model, LEARNING["whitened"]) as handle:
        warm_up(model)
        x = handle.state.calibration.reservoir.get("mlp.2").clone()
        handle.set_enabled(True)
        whitened = handle.state.calibration.factors[2, "gate"]
    weight = model.base_model.model.model.layers[2].mlp.gate_proj.weight.detach()
    plain, product = truncated_svd(weight, BASE.rank), x @ weight.T
    assert relative_norm(whitened(x), product) < 0.95 * relative_norm(plain(x), product)


@pytest.mark.parametrize("criterion", ["svd", "output"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "phi3"])
def test_attention_with_factors_of_full_rank_is_dense(name, criterion, batch):
    """Whatever is dropped, the factors make up for it, biases and fused projections included; of low rank not."""
    model = zoo_lora(name).train()
    want = loss_and_gradients(model, batch)
    errors = []
    for rank in (1000, 8):
        config = BASE.replace(mlp_sparsity=0.0, criterion=criterion, compensation="low_rank", compensation_rank=rank)
        with sparsify(model, config) as handle:
            warm_up(model, range(8))
            handle.set_enabled(True)
            got = loss_and_gradients(model, batch)
        errors.append(max(relative_error(got[1][name], want[1][name]) for name in want[1]))
    assert errors[0] < 1e-4 < errors[1]


@pytest.mark.parametrize("attention_sparsity", [0.5, 0.75])
def test_factors_bring_attention_nearer_to_the_dense_one(attention_sparsity, batch):
    model, errors = lora_model(), {}
    want = loss_and_gradients(model, batch)[0]
    for compensation in ("none", "low_rank"):
        settings = {"mlp_sparsity": 0.0, "attention_sparsity": attention_sparsity, "compensation": compensation}
        with sparsify(model, BASE.replace(criterion="static", compensation_rank=16, **settings)) as handle:
            warm_up(model, range(8))
            handle.set_enabled(True)
            errors[compensation] = abs(float(loss_and_gradients(model, batch)[0] - want))
    assert errors["low_rank"] < errors["none"]


def test_static_scores_are_norms_over_the_sample():
    model = lora_model()
    with sparsify(model, LEARNING["static"]) as handle:
        warm_up(model)
        calibration = handle.state.calibration
        x = calibration.reservoir.get("mlp.0").clone()
        handle.set_enabled(True)
        mlp = model.base_model.model.model.layers[0].mlp
        h = torch.nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
        torch.testing.assert_close(calibration.scores[0, "mlp"], h.norm(dim=0).detach(), rtol=1e-4, atol=1e-5)
        sets = []
        for seed in (50, 51):
            loss_and_gradients(model, make_batch(seed=seed))
            sets.append({key: s.narrow.tolist() for key, s in handle.state.batch.selections.items()})
    assert sets[0] == sets[1]
    assert len(sets[0]) == 9


@pytest.mark.parametrize(("criterion", "times"), [("static", 1), ("output", 3)])
def test_sets_of_the_same_scores_are_chosen_once(criterion, times, monkeypatch):
    """Fixed ones once a run; with `output` those of attention, while MLPs follow the batch."""
    model, chosen = lora_model(), []
    monkeypatch.setattr(state, "top_channels", lambda scores, keep: chosen.append(keep) or top_channels(scores, keep))
    with sparsify(model, LEARNING[criterion]) as handle:
        for _ in range(2):  # a second run fits its own
            handle.begin_run(10)
            assert not handle.state.calibration.fitted
            warm_up(model)
            handle.set_enabled(True)
            chosen.clear()
            for seed in (50, 51, 52):
                loss_and_gradients(model, make_batch((16, 16), (30, 30), seed=seed))
            assert len(chosen) == 6 + 3 * times
            assert handle.state._fixed
            handle.end_run()
            assert not handle.state._fixed


def test_a_sample_of_an_older_version_that_lacks_a_part_is_refused_with_a_remedy():
    """Older ones hold no inputs of o_proj."""
    model = lora_model()
    with sparsify(model, LEARNING["output with low rank"]) as handle:
        warm_up(model)
        del handle.state.calibration.reservoir.rows["o.1"]
        with pytest.raises(RuntimeError, match=f"o.1: .* older version, delete its {CALIBRATION_FILE}"):
            handle.set_enabled(True)


@pytest.mark.parametrize("compensation", ["none", "low_rank"])
@pytest.mark.parametrize("lengths", [((20, 16), (6, 9)), ((20, 3), (6, 0))], ids=["padded", "one without output"])
def test_output_scores_are_dense_steps_and_output_rows_together(compensation, lengths):
    """Against norms over all true activations of both kinds, padding left out."""
    model, batch = lora_model(), make_batch(*lengths, seed=7)
    config = LEARNING["output"].replace(compensation=compensation, attention_sparsity=0.0)
    layer = model.base_model.model.model.layers[0]
    with torch.no_grad():
        layer.mlp.down_proj.weight.mul_(torch.linspace(0.1, 4, layer.mlp.up_proj.out_features))
    with sparsify(model, config) as handle:
        handle.state.criterion.prior_tokens = 2  # or the few output rows would decide nothing
        warm_up(model)
        calibration = handle.state.calibration
        sample = calibration.reservoir.get("mlp.0").clone()
        handle.set_enabled(True)
        seen = []
        hook = layer.mlp.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach().reshape(-1, 64)))
        loss_and_gradients(model, batch)
        hook.remove()
        plan, got = handle.state.batch.plan, handle.state.batch.selections[0, "mlp"].narrow
        assert 0 < len(plan.output) < plan.shape[0] * plan.shape[1] - len(plan.context)
        weight, stand_in = torch.ones(layer.mlp.up_proj.out_features), calibration.stand_ins.get(0)
        if stand_in is not None:
            weight = layer.mlp.down_proj.weight.detach().norm(dim=0)

        def energy(x):
            h = torch.nn.functional.silu(layer.mlp.gate_proj(x)) * layer.mlp.up_proj(x)
            return (weight * (h if stand_in is None else h - stand_in.predict(x))).detach().square()

        tokens = handle.state.criterion.prior_tokens
        want = tokens * energy(sample).mean(0) + energy(seen[0][plan.output]).sum(0)
    assert got.tolist() == top_channels(want.sqrt(), len(got)).tolist()


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("prompts", [(16, 16), (20, 16)], ids=["full", "padded"])
@pytest.mark.parametrize("compensation", ["none", "low_rank"])
def test_a_batch_without_output_tokens_goes_by_the_dense_steps(compensation, prompts, checkpointed):
    """A completion that was cut off leaves none; the norms of the dense steps then choose alone."""
    model, batch = lora_model(), make_batch(prompts, (0, 0))
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with sparsify(model, LEARNING["output"].replace(compensation=compensation)) as handle:
        warm_up(model)
        handle.set_enabled(True)
        loss_and_gradients(model, batch)
        scores, selections = handle.state.calibration.scores, handle.state.batch.selections
        assert not len(handle.state.batch.plan.output)
        for layer in range(3):
            kept = selections[layer, "mlp"].narrow
            assert kept.tolist() == top_channels(scores[layer, "mlp"], len(kept)).tolist()


def test_output_sets_follow_the_batch():
    model, sets = lora_model(), []
    with sparsify(model, LEARNING["output"]) as handle:
        warm_up(model)
        handle.set_enabled(True)
        for seed in (50, 51):
            loss_and_gradients(model, make_batch((16, 16), (30, 30), seed=seed))
            sets.append({key: s.narrow.tolist() for key, s in handle.state.batch.selections.items()})
    assert all(sets[0][key] == sets[1][key] for key in sets[0] if key[1] != "mlp")
    assert any(sets[0][key] != sets[1][key] for key in sets[0] if key[1] == "mlp")


@pytest.mark.parametrize("targets", [("gate_proj",), MLP], ids=["gate", "all three"])
@pytest.mark.parametrize("criterion", ["svd", "static", "output"])
def test_both_ways_through_the_mlp_agree(targets, criterion, batch):
    """With adapters of zero on the MLP the parts must give what the fused function gives."""
    losses = []
    for names in (("q_proj",), ("q_proj", *targets)):
        model = lora_model(targets=names)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.zero_()
        with sparsify(model, BASE.replace(criterion=criterion, compensation="low_rank")) as handle:
            warm_up(model)
            handle.set_enabled(True)
            losses.append(loss_and_gradients(model, batch)[0])
    assert relative_error(losses[1], losses[0]) < 1e-5
