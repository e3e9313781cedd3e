"""Which forwards are of the batch that a trainer began, and whether its plan still holds."""

import pytest
from helpers import make_batch

from sparselora_hf.plan import TokenPlan
from sparselora_hf.state import ActiveBatch, Pin
from sparselora_hf.trainer import _are_as_marked, _marks


@pytest.mark.parametrize("is_whole", [True, False], ids=["without padding", "padded"])
def test_what_tells_of_padding_may_be_left_out_where_there_is_none(is_whole):
    inputs = make_batch((9, 9 if is_whole else 4), (3, 3))
    pin = Pin(ActiveBatch(TokenPlan.of_inputs(inputs), True, frozenset()), inputs)
    assert pin.fits(inputs)
    assert pin.fits({name: inputs[name] for name in ("input_ids", "attention_mask")})
    assert pin.fits({"input_ids": inputs["input_ids"]}) is is_whole


def test_a_plan_holds_until_a_tensor_is_exchanged_or_written_to():
    inputs = make_batch()
    marks = _marks(inputs)
    assert _are_as_marked(inputs, marks)
    assert not _are_as_marked({**inputs, "labels": inputs["labels"].clone()}, marks)
    inputs["labels"][0, 0] = 1
    assert not _are_as_marked(inputs, marks)
