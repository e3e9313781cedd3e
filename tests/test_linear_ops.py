import pytest
import torch
from helpers import kept_for_backward
from torch import nn
from torch.autograd import gradcheck
from torch.nn import functional as F

from sparselora_hf.ops.linear import compute_dtype, gathered_columns, gathered_rows
from sparselora_hf.ops.quant import frozen_weight, read_whole

SHAPES = {
    "odd": (5, 7, 11, 3),
    "one of each": (1, 1, 1, 1),
    "no token": (0, 4, 6, 2),
    "all kept": (3, 4, 6, 6),
    "none kept": (3, 4, 6, 0),
}


def tensors(tokens, hidden, width, keep, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, dtype=dtype, generator=generator)

    index = torch.randperm(width, generator=generator)[:keep].sort().values
    return randn, index, torch.zeros(width, dtype=dtype).index_fill_(0, index, 1)


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_gathered_rows(shape, biased):
    tokens, hidden, width, _ = shape
    randn, index, _ = tensors(*shape)
    x, weight, bias = randn(tokens, hidden).requires_grad_(), randn(width, hidden), randn(width) if biased else None
    torch.testing.assert_close(gathered_rows(x, weight, index, bias), F.linear(x, weight, bias)[:, index])
    assert gradcheck(lambda x: gathered_rows(x, weight, index, bias), x)


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_gathered_columns(shape, biased):
    tokens, hidden, width, _ = shape
    randn, index, mask = tensors(*shape)
    x, weight, bias = randn(tokens, width), randn(hidden, width), randn(hidden) if biased else None
    narrow = x[:, index].requires_grad_()
    torch.testing.assert_close(gathered_columns(narrow, weight, index, bias), F.linear(x * mask, weight, bias))
    assert gradcheck(lambda x: gathered_columns(x, weight, index, bias), narrow)


def test_unsorted_index():
    randn, _, _ = tensors(3, 4, 6, 0)
    x, weight, index = randn(3, 4), randn(6, 4), torch.tensor([5, 0, 3])
    torch.testing.assert_close(gathered_rows(x, weight, index), (x @ weight.t())[:, index])


@pytest.mark.parametrize("op", [gathered_rows, gathered_columns])
def test_saved_for_backward_is_the_weight_itself(op):
    weight, index = torch.randn(64, 64), torch.arange(0, 64, 4)
    x = torch.randn(8, 64 if op is gathered_rows else 16, requires_grad=True)
    kept = kept_for_backward(lambda: op(x, weight, index, torch.zeros(64)))
    assert {t.data_ptr() for t in kept} == {weight.data_ptr(), index.data_ptr()}


@pytest.mark.parametrize("op", [gathered_rows, gathered_columns])
def test_a_frozen_weight_gets_no_gradient_and_x_needs_none(op):
    weight, index = torch.randn(8, 8, requires_grad=True), torch.arange(4)
    x = torch.randn(3, 8 if op is gathered_rows else 4, requires_grad=True)
    op(x, weight, index).sum().backward()
    assert weight.grad is None
    assert not op(x.detach(), weight.detach(), index).requires_grad


@pytest.mark.parametrize("op", [gathered_rows, gathered_columns])
def test_types_follow_linear(op):
    weight, index = torch.randn(8, 8), torch.arange(4)
    x = torch.randn(3, 8 if op is gathered_rows else 4, requires_grad=True)
    assert op(x, weight.bfloat16(), index).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        y = op(x, weight, index, torch.zeros(8))
        assert compute_dtype(x, weight) == torch.bfloat16
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32


def test_a_plain_weight_is_read_without_a_copy():
    linear = nn.Linear(4, 3)
    weight = read_whole(frozen_weight(linear))
    assert weight.data_ptr() == linear.weight.data_ptr()
    assert not weight.requires_grad
