import dataclasses
from types import SimpleNamespace

import pytest
import torch
from helpers import SPARSE, assert_same, differs, lora_model, loss_and_gradients, make_batch, sparse_result

from sparselora_hf import sparsify
from sparselora_hf.channels import HeadLayout
from sparselora_hf.worth import Worth, attention_worth, mlp_worth, relative_rate


def test_balance():
    worth = Worth(saved=10.0, fixed=100.0, per_row=2.0)
    assert [worth.pays(context, 20) for context in (0, 14, 15)] == [False, False, True]
    assert worth.ever
    assert not Worth(saved=2.0, fixed=0.0, per_row=2.0).ever


def test_savings_by_hand():
    """Forward and backward, two FLOPs per multiply-add: gate, up and down; q, k, v and o with 4 queries per key."""
    assert mlp_worth(4096, 14336, 144, 0, "cpu").saved == 2 * 2 * 3 * 4096 * (14336 - 144)
    assert mlp_worth(4096, 14336, 144, 32, "cpu").saved == 2 * 2 * (3 * 4096 * (14336 - 144) - 2 * 32 * 4096)
    layout = HeadLayout(32, 8, 128)
    saved = 2 * 2 * 4096 * (4 + 1 + 1 + 4) * (1024 - 256)
    assert attention_worth(4096, layout, 256, "cpu").saved == saved
    factors = 2 * 2 * 64 * (4 * 4096 + (4 + 1 + 1 + 4) * 1024)
    assert attention_worth(4096, layout, 256, "cpu", rank=64).saved == saved - factors


@pytest.mark.parametrize("device", ["cpu", "cuda", "xpu"])
def test_a_large_mlp_pays_and_a_tiny_one_does_not(device):
    assert mlp_worth(4096, 14336, 144, 0, device).pays(2048, 2048)
    assert not mlp_worth(64, 96, 10, 0, device).pays(2048, 2048)


@pytest.mark.parametrize(
    ("capability", "processors", "rate"),
    [
        ((9, 0), 132, 1.0),
        ((8, 0), 108, 0.41),
        ((7, 5), 40, 0.08),
        ((10, 0), 148, 2.24),
        ((8, 7), 16, 0.06),
        ((10, 3), 160, 2.42),
        ((12, 1), 48, 0.09),
        ((99, 0), 33, 0.5),
    ],
    ids=["H200", "A100", "T4", "B200", "Orin", "B300", "GB10", "unknown"],
)
def test_a_smaller_chip_loses_fewer_products_to_the_host(monkeypatch, capability, processors, rate):
    major, minor = capability
    chip = SimpleNamespace(major=major, minor=minor, multi_processor_count=processors)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: chip)
    relative_rate.cache_clear()
    try:
        assert relative_rate(torch.device("cuda", 0)) == pytest.approx(rate, abs=0.005)
    finally:
        relative_rate.cache_clear()


def test_the_rate_of_a_device_scales_what_a_call_costs():
    assert relative_rate(torch.device("cpu")) == 1.0
    whole, half = (mlp_worth(4096, 14336, 144, 0, "cuda", rate=rate) for rate in (1.0, 0.5))
    assert half == dataclasses.replace(whole, fixed=whole.fixed / 2)
    layout = HeadLayout(32, 8, 128)
    whole, half = (attention_worth(4096, layout, 256, "cuda", rate=rate) for rate in (1.0, 0.5))
    assert half == dataclasses.replace(whole, fixed=whole.fixed / 2)


def test_tiny_layers_stay_dense_unless_told_otherwise(batch):
    model = lora_model()
    dense = loss_and_gradients(model, batch)
    cautious = SPARSE.replace(dense_if_slower=True)
    assert_same(sparse_result(model, batch, cautious), dense)
    assert differs(sparse_result(model, batch, SPARSE), dense)
    with sparsify(model, cautious) as handle:
        assert "would not be faster sparse" in handle.report()


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_the_batch_decides_where_shapes_allow_both(monkeypatch, checkpointed):
    """Few context tokens run dense, many sparse, each whole: never half of a layer."""
    fixed = 4 * 64 * 3 * 86 * 30.0
    monkeypatch.setattr("sparselora_hf.worth._FIXED", {"cpu": {"mlp": fixed, "attention": fixed}})
    monkeypatch.setattr("sparselora_hf.worth._PER_ELEMENT", {"cpu": {"mlp": 0.0, "attention": 0.0}})
    model = lora_model()
    few, many = make_batch((8, 9), (2, 2)), make_batch((40, 41), (2, 2))
    mlp_only = SPARSE.replace(attention_sparsity=0.0)
    want = [loss_and_gradients(model, few), sparse_result(model, many, mlp_only)]
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    cautious = mlp_only.replace(dense_if_slower=True)
    assert_same(sparse_result(model, few, cautious), want[0])
    assert_same(sparse_result(model, many, cautious), want[1])
