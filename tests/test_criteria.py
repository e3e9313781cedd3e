import contextlib

import pytest
import torch
from helpers import lora_model, tiny_model
from torch.nn import functional as F

from sparselora_hf import SparseLoraConfig
from sparselora_hf.calibration import Calibration
from sparselora_hf.channels import top_channels
from sparselora_hf.criteria import CRITERIA
from sparselora_hf.families import FAMILIES
from sparselora_hf.standin import fit_stand_in
from sparselora_hf.svd import truncated_svd
from sparselora_hf.views import AttentionView, MlpView

RANK, TOKENS = 6, 30
OWN = ["svd", "oracle", "sampled", "svd_mean"]


@pytest.fixture
def layer():
    """A layer of a plain model with biases everywhere, in float64."""
    return tiny_model(attention_bias=True, mlp_bias=True).double().model.layers[1]


@pytest.fixture
def x():
    return torch.randn(TOKENS, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def views(layer):
    return MlpView.of(layer.mlp, FAMILIES["llama"]), AttentionView.of(layer.self_attn, FAMILIES["llama"])


def linears(layer):
    mlp, attention = layer.mlp, layer.self_attn
    parts = {
        "gate": mlp.gate_proj,
        "up": mlp.up_proj,
        "q": attention.q_proj,
        "k": attention.k_proj,
        "v": attention.v_proj,
    }
    return {role: module.weight.detach() for role, module in parts.items()}


def factors_of(layer):
    return {(1, r): truncated_svd(w, RANK).to(w.device, w.dtype) for r, w in linears(layer).items()}


def make(name, factors=None, **settings):
    config = SparseLoraConfig(mlp_sparsity=0.5, criterion=name, rank=RANK, **settings)
    return CRITERIA[name](factors or {}, Calibration(config), config)


def scores(criterion, layer, x, step=0):
    mlp, attention = views(layer)
    return {
        "mlp": criterion.mlp(1, mlp, x, step),
        "vo": criterion.vo(1, attention, x, step),
        "qk": criterion.qk(1, attention, x, step),
    }


def by_hand(layer, x, weights):
    """Norms over tokens at full width; 8 query heads over 4 key heads of 8 dimensions."""
    mlp = layer.mlp
    gate = x @ weights["gate"].T + mlp.gate_proj.bias.detach()
    up = x @ weights["up"].T + mlp.up_proj.bias.detach()
    norms = {role: (x @ weights[role].T).norm(dim=0) for role in "qkv"}
    qk = [norms["q"][[(2 * (c // 8) + g) * 8 + c % 8 for g in (0, 1)]].norm() * norms["k"][c] for c in range(32)]
    return {"mlp": (F.silu(gate) * up).norm(dim=0), "vo": norms["v"], "qk": torch.stack(qk)}


def assert_scores(got, want):
    for kind, value in want.items():
        torch.testing.assert_close(got[kind].double(), value, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["svd", "svd_mean", "svd_whitened"])
def test_factors_follow_a_model_that_is_moved_after_it_was_made_sparse(layer, x, name, monkeypatch):
    """As FSDP2 and `accelerator.prepare` do; the meta device, which has no autocast, stands for a GPU."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    criterion = make(name, factors_of(layer))
    criterion.calibration.factors.update(factors_of(layer))
    got = scores(criterion, layer.to("meta"), x.to("meta"))
    assert all(value.is_meta for value in got.values())


@pytest.mark.parametrize("name", ["oracle", "sampled"])
def test_true_activations(layer, x, name):
    assert_scores(scores(make(name), layer, x), by_hand(layer, x, linears(layer)))


@pytest.mark.parametrize("name", ["svd", "svd_mean"])
def test_low_rank_activations(layer, x, name):
    factors = factors_of(layer)
    weights = {role: f.up @ f.down for (_, role), f in factors.items()}
    assert_scores(scores(make(name, factors), layer, x), by_hand(layer, x, weights))


@pytest.mark.parametrize("name", ["oracle", "svd"])
def test_channels_are_scored_by_what_a_stand_in_misses(layer, x, name):
    criterion, mlp = make(name, factors_of(layer)), layer.mlp
    stand_in = fit_stand_in(x, views(layer)[0].channels(x).detach(), mlp.down_proj.weight.detach(), 3)
    criterion.calibration.stand_ins[1] = stand_in
    weights = linears(layer) if name == "oracle" else {r: f.up @ f.down for (_, r), f in factors_of(layer).items()}
    gate, up = (F.linear(x, weights[r], getattr(mlp, f"{r}_proj").bias.detach()) for r in ("gate", "up"))
    assert_scores(scores(criterion, layer, x), {"mlp": (F.silu(gate) * up - stand_in.predict(x)).norm(dim=0)})


def test_full_rank_svd_is_the_oracle(layer, x):
    factors = {(1, r): truncated_svd(w, min(w.shape)).to(w.device, w.dtype) for r, w in linears(layer).items()}
    got, want = scores(make("svd", factors), layer, x), scores(make("oracle"), layer, x)
    for kind in want:
        torch.testing.assert_close(got[kind], want[kind], rtol=1e-3, atol=1e-3)


def test_many_tokens_are_scored_in_chunks(layer):
    x = torch.randn(2500, 64, dtype=torch.float64)
    assert_scores(scores(make("oracle"), layer, x), by_hand(layer, x, linears(layer)))


@torch.no_grad()
def test_svd_finds_more_energy_than_chance(layer, x):
    for weight in linears(layer).values():  # a spectrum that falls, as trained weights have it
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        weight.copy_((u * s * 0.8 ** torch.arange(len(s))) @ vh)
    truth = scores(make("oracle"), layer, x)
    energy = {}
    for name in ("oracle", "svd", "random"):
        got = scores(make(name, factors_of(layer)), layer, x)
        energy[name] = {k: float(truth[k].square()[top_channels(got[k], len(got[k]) // 4)].sum()) for k in truth}
    for kind in truth:
        assert energy["oracle"][kind] >= energy["svd"][kind] > 1.2 * energy["random"][kind]


# which rows are scored


def test_all_context_rows_by_default(x):
    rows = torch.tensor([1, 4, 5])
    assert torch.equal(make("svd").sample(x, rows, torch.zeros(3)), x[rows])


@pytest.mark.parametrize(
    ("name", "asked", "want"), [("svd", 5, 5), ("oracle", 1, 1), ("sampled", None, 20), ("sampled", 7, 7)]
)
def test_some_rows_evenly_spaced(x, name, asked, want):
    rows = torch.arange(3, 23)
    taken = make(name, score_tokens=asked).sample(x, rows, torch.zeros(20))
    assert len(taken) == want
    places = [int((x == row).all(1).nonzero()) for row in taken]
    assert places == sorted(set(places))
    assert set(places) <= set(rows.tolist())
    assert places[0] == 3
    assert want == 1 or places[-1] == 22


def test_rows_are_picked_anew_for_each_batch(x):
    criterion = make("sampled", score_tokens=2)
    for rows in (torch.arange(10), torch.arange(5, 15)):
        assert torch.equal(criterion.sample(x, rows, torch.zeros(10)), x[rows[[0, -1]]])


def test_sampled_takes_64_of_many():
    x = torch.randn(300, 4)
    assert len(make("sampled").sample(x, torch.arange(300), torch.zeros(300))) == 64


def test_mean_of_each_sequence(x):
    rows, sequence = torch.tensor([0, 1, 5, 9, 10, 11]), torch.tensor([0, 0, 2, 5, 5, 5])
    taken = make("svd_mean").sample(x, rows, sequence)
    torch.testing.assert_close(taken, torch.stack([x[[0, 1]].mean(0), x[5], x[[9, 10, 11]].mean(0)]))


def test_mean_of_half_precision_rows_is_not_summed_in_half_precision():
    x = torch.randn(600, 4).bfloat16()
    taken = make("svd_mean").sample(x, torch.arange(600), torch.zeros(600, dtype=torch.long))
    torch.testing.assert_close(taken, x.float().mean(0, keepdim=True), rtol=1e-4, atol=1e-6)


def test_the_mean_is_no_sum_of_atomic_additions(x, monkeypatch):
    """On a GPU their order differs from run to run, and near ties the channels with it; counts are whole."""
    monkeypatch.setattr(torch.Tensor, "index_add_", lambda *args, **kwargs: 1 / 0)
    rows, sequence = torch.arange(6), torch.tensor([0, 0, 0, 1, 1, 1])
    with torch.autocast("cpu", torch.bfloat16):
        taken = make("svd_mean").sample(x.float(), rows, sequence, 2)
    torch.testing.assert_close(taken, x[:6].float().view(2, 3, -1).mean(1))


# random


def test_random_depends_on_seed_step_layer_and_part(layer, x):
    mlp, attention = views(layer)
    first = make("random")
    assert torch.equal(first.mlp(1, mlp, x, 3), make("random").mlp(1, mlp, x[:0], 3))
    others = [first.mlp(1, mlp, x, 4), first.mlp(2, mlp, x, 3), make("random", seed=1).mlp(1, mlp, x, 3)]
    assert not any(torch.equal(first.mlp(1, mlp, x, 3), other) for other in others)
    assert not torch.equal(first.qk(1, attention, x, 3), first.vo(1, attention, x, 3))


def test_random_leaves_the_random_numbers_alone(layer, x):
    before = torch.get_rng_state()
    scores(make("random"), layer, x)
    assert torch.equal(torch.get_rng_state(), before)


def test_random_is_uniform():
    from types import SimpleNamespace

    drawn = torch.stack(
        [make("random").mlp(0, SimpleNamespace(width=50), torch.zeros(1), step) for step in range(200)]
    )
    kept = torch.stack([(row >= row.topk(10).values[-1]).float() for row in drawn]).mean(0)
    assert float(kept.min()) > 0.08
    assert float(kept.max()) < 0.35


# views


def test_views_look_through_adapters(x):
    plain = lora_model().base_model.model.model.layers[1]
    every = lora_model(targets=("q_proj", "gate_proj", "v_proj")).base_model.model.model.layers[1]
    for name in ("oracle", "random"):
        a, b = (scores(make(name), layer, x.float()) for layer in (plain, every))
        assert all(torch.equal(a[kind], b[kind]) for kind in a)


@pytest.mark.parametrize("name", OWN)
def test_types_and_shapes(name):
    layer = tiny_model(dtype=torch.bfloat16).model.layers[1]
    factors = {(1, r): truncated_svd(w, RANK).to(w.device, w.dtype) for r, w in linears(layer).items()}
    got = scores(make(name, factors), layer, torch.randn(TOKENS, 64, dtype=torch.bfloat16))
    assert {kind: (tuple(s.shape), s.dtype) for kind, s in got.items()} == {
        "mlp": ((96,), torch.float32),
        "vo": ((32,), torch.float32),
        "qk": ((32,), torch.float32),
    }


def test_every_criterion_of_the_configuration_exists():
    for name in CRITERIA:
        SparseLoraConfig(criterion=name)
    with pytest.raises(ValueError, match=", ".join(["svd", "svd_mean"])):
        SparseLoraConfig(criterion="none of these")
