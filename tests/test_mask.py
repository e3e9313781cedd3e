"""Rows padded on their right: attention without a mask, and the same numbers."""

import pytest
import torch
from helpers import assert_same, flatten_batch, lora_model, loss_and_gradients, make_batch
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import EXPERTS, VARIED, zoo_lora

from sparselora_hf import SparseLoraConfig, sparsify
from sparselora_hf.plan import TokenPlan

PADDING = SparseLoraConfig(exact=("padding",))
RIGHT = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
LABELS = torch.tensor([[-100, 5, 6, -100], [-100, -100, -100, 7]])

PLANS = {
    "right": (RIGHT, LABELS, True),
    "no padding": (torch.ones_like(RIGHT), LABELS, True),
    "left": (RIGHT.flip(1), LABELS.flip(1), False),
    "hole": (torch.tensor([[1, 0, 1, 0], [1, 1, 1, 1]]), LABELS, False),
    "label on padding": (RIGHT, torch.tensor([[-100, -100, -100, 5], [-100, -100, -100, 7]]), False),
    "no mask": (None, LABELS, False),
}


@pytest.mark.parametrize(("mask", "labels", "want"), PLANS.values(), ids=PLANS.keys())
def test_plan_knows_right_padding(mask, labels, want):
    assert TokenPlan.from_batch(labels, mask).right_padded is want


class Masked(TorchDispatchMode):
    """Notes for each attention of a forward pass whether it is given a mask."""

    def __init__(self):
        super().__init__()
        self.masked = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            self.masked.append((kwargs or {}).get("attn_mask") is not None)
        return func(*args, **(kwargs or {}))


def masked(model, batch) -> list[bool]:
    with Masked() as seen:
        model(**batch)
    return seen.masked


BATCHES = {
    "right": (make_batch(side="right"), False),
    "left": (make_batch(side="left"), True),
    "with positions": ({**make_batch(), "position_ids": torch.arange(14).expand(3, -1)}, True),
}


@pytest.mark.parametrize(("batch", "want"), BATCHES.values(), ids=BATCHES.keys())
def test_attention_of_right_padded_rows_has_no_mask(batch, want):
    model = lora_model()
    with sparsify(model, PADDING):
        assert masked(model, batch) == 3 * [want]
        assert masked(model.eval(), batch) == 3 * [True]
    with sparsify(model.train(), PADDING.replace(exact=("norms",))):
        assert masked(model, batch) == 3 * [True]


def test_16_bit_types_keep_the_mask():
    model, batch = lora_model(), make_batch()
    with sparsify(model, PADDING):
        with torch.autocast("cpu", torch.bfloat16):
            assert masked(model, batch) == 3 * [True]
        assert masked(model.bfloat16(), batch) == 3 * [True]


def test_packed_rows_keep_their_documents_apart():
    model = lora_model()
    batch = flatten_batch(make_batch())
    with sparsify(model, PADDING):
        assert masked(model, batch) == 3 * [True]


@pytest.mark.parametrize("name", VARIED)
def test_every_family_trains_as_before(name):
    model, batch = zoo_lora(name), make_batch()
    if name.split(" ")[0] in EXPERTS:  # a router carries roundings of float32 far
        model.double()
    want = loss_and_gradients(model, batch)
    with sparsify(model, PADDING):
        assert_same(loss_and_gradients(model, batch), want, 5e-5)


@pytest.mark.parametrize("setting", [{"use_bidirectional_attention": True}, {"is_causal": False}], ids=str)
def test_tokens_that_look_ahead_need_the_mask(setting):
    model = lora_model()
    model.get_base_model().model.config.update(setting)
    with sparsify(model, PADDING):
        assert masked(model, make_batch()) == 3 * [True]
