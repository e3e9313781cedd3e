import dataclasses

import pytest
from helpers import make_batch

from sparselora_hf.config import EXACT_SAVINGS
from sparselora_hf.meter import Meter, MeteredPart
from sparselora_hf.plan import TokenPlan
from sparselora_hf.shapes import LayerShape, ModelShape
from sparselora_hf.worth import Worth

SPEED = {"sparselora/tokens_per_second": 0}
SHAPE = ModelShape(64, 96, 8, 4, 8, layers=3, vocab=61)


@pytest.fixture
def plan():
    batch = make_batch()
    return TokenPlan.from_batch(batch["labels"], batch["attention_mask"])


def meter_of(mlp=(10, 10, 96), attention=(32, 8, 32), worth=None, rank=0):
    """A meter for three layers that keep so many of 96 and 32 channels."""
    meter = Meter(SHAPE, rank)
    meter.mlp, meter.attention = (
        [MeteredPart(96, k, worth) for k in mlp],
        [MeteredPart(32, k, worth) for k in attention],
    )
    return meter


def figures(plan, sparse=False, savings=(), times=1, **parts):
    meter = meter_of(**parts)
    for _ in range(times):
        meter.add(plan, sparse, frozenset(savings))
    return meter.read()


def test_nothing_counted_gives_nothing():
    assert Meter(SHAPE).read() == {}


def test_share_of_context(plan):
    assert figures(plan)["sparselora/context_share"] == round(len(plan.context) / plan.tokens, 4)
    assert figures(plan, times=3)["sparselora/context_share"] == figures(plan)["sparselora/context_share"]


def test_attention_without_projections_costs_its_linears(plan):
    """With as many weights as q, k, v and o have they cost as much; nothing of it is saved."""
    others = dataclasses.replace(SHAPE, linears=((64, 64), (32, 64), (64, 96)))
    saved = {}
    for kind, shape, part in (("projections", SHAPE, MeteredPart(32, 32)), ("others", others, MeteredPart(0, 0))):
        for savings in ((), ("padding",)):
            meter = meter_of()
            meter.model, meter.attention = shape, [part] * 3
            meter.add(plan, True, frozenset(savings))
            saved[kind, savings] = meter.read()["sparselora/linear_flops_saved"]
    assert saved["others", ()] == saved["projections", ()] > 0
    assert saved["others", ()] < saved["others", ("padding",)] < saved["projections", ("padding",)]


def test_reading_starts_anew(plan):
    meter = Meter(SHAPE)
    meter.mlp, meter.attention = [MeteredPart(96, 96)] * 3, [MeteredPart(32, 32)] * 3
    meter.add(plan, False, frozenset())
    assert meter.read()
    assert meter.read() == {}


def test_dense_saves_nothing_and_each_choice_saves_more(plan):
    saved = [
        figures(plan, *choice)["sparselora/linear_flops_saved"]
        for choice in ((False, ()), (True, ()), (True, ("padding",)), (True, EXACT_SAVINGS))
    ]
    assert saved[0] == 0
    assert saved == sorted(saved)
    assert len(set(saved)) == 4


def test_saving_by_hand(plan):
    """One MLP of three halved for context tokens; the head is 61 wide."""
    got = figures(plan, True, mlp=(48, 96, 96), attention=(32, 32, 32))["sparselora/linear_flops_saved"]
    rows = plan.shape[0] * plan.shape[1]
    layer = rows * (3 * 64 * 96 + 2 * 64 * 64 + 2 * 64 * 32)
    saved = len(plan.context) * 3 * 64 * 48
    assert got == pytest.approx(saved / (3 * layer + rows * 64 * 61), abs=0.02)


def test_stand_ins_count(plan):
    """Of two MLPs, for context tokens, and of one attention: what they add to the products of a dense step."""
    got, without = (figures(plan, True, rank=rank)["sparselora/linear_flops_saved"] for rank in (4, 0))
    rows = plan.shape[0] * plan.shape[1]
    dense = rows * (3 * 2 * (3 * 64 * 96 + 2 * 64 * 64 + 2 * 64 * 32) + 3 * 64 * 61)  # forward and backward
    mlp, attention = 4 * (64 + 10 + 64), 4 * (2 * (64 + 64) + 2 * (64 + 32))
    assert without - got == pytest.approx(len(plan.context) * 2 * (2 * mlp + attention) / dense, abs=2e-4)


def test_layer_without_experts_has_its_own_width(plan):
    """Tokens pass through 16 channels of experts in two layers, and through an MLP of 96 in the one between."""
    meter = meter_of(attention=(32, 32, 32))
    mixture = LayerShape(16, 0)
    meter.model = dataclasses.replace(SHAPE, own=(mixture, LayerShape(96), mixture))
    meter.mlp = [MeteredPart(0, 0), MeteredPart(96, 10), MeteredPart(0, 0)]
    meter.add(plan, True, frozenset())
    rows = plan.shape[0] * plan.shape[1]
    dense = rows * 2 * (3 * 64 * (16 + 96 + 16) + 3 * (2 * 64 * 64 + 2 * 64 * 32)) + rows * 3 * 64 * 61
    saved = len(plan.context) * 2 * 3 * 64 * 86
    assert meter.read()["sparselora/linear_flops_saved"] == pytest.approx(saved / dense, abs=1e-4)


def test_every_token_passes_through_experts(plan):
    """Nothing of their 64 channels is left out, of the 32 beside them what an MLP without experts leaves out."""
    meter, beside = meter_of(attention=(32, 32, 32)), meter_of(attention=(32, 32, 32))
    meter.model = dataclasses.replace(SHAPE, sparse_mlp=32)
    beside.model = dataclasses.replace(SHAPE, intermediate=32)
    for each in (meter, beside):
        each.mlp = [MeteredPart(32, 8)] * 3
        each.add(plan, True, frozenset({"padding", "last_layer"}))
    assert meter.dense_flops - meter.flops == pytest.approx(beside.dense_flops - beside.flops)
    assert meter.dense_flops - beside.dense_flops == plan.shape[0] * plan.shape[1] * 2 * 2 * 3 * 3 * 64 * 64


def test_stand_in_of_a_layer_without_experts(plan):
    """In a mixture its width is that of the layer's own MLP, which may be as wide as the shared one."""
    meter, alone = meter_of(rank=4), meter_of(rank=4)
    meter.model = dataclasses.replace(SHAPE, intermediate=160, sparse_mlp=96, own=(LayerShape(96),) * 3)
    for each in (meter, alone):
        each.add(plan, True, frozenset())
    assert meter.read() | SPEED == alone.read() | SPEED


def test_channel_sparsity_is_the_mean_over_sparse_parts(plan):
    want = (2 * (1 - 10 / 96) + (1 - 8 / 32)) / 3
    assert figures(plan, True)["sparselora/channel_sparsity"] == pytest.approx(want, abs=1e-4)
    assert figures(plan, False)["sparselora/channel_sparsity"] == 0


def test_parts_that_do_not_pay_count_as_dense(plan):
    got = figures(plan, True, worth=Worth(saved=1.0, fixed=1e9, per_row=0.0))
    assert (got["sparselora/channel_sparsity"], got["sparselora/linear_flops_saved"]) == (0, 0)
    assert figures(plan, True, worth=Worth(saved=1.0, fixed=0.0, per_row=0.0)) | SPEED == figures(plan, True) | SPEED
