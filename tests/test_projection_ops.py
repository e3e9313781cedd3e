"""The whole projection as one function: it is the chain of functions that defines it."""

import pytest
import torch
from helpers import kept_for_backward
from torch.autograd import gradcheck
from torch.nn import functional as F

from sparselora_hf.ops.branch import Branch, add_branch, cast, fork_branch
from sparselora_hf.ops.context import ContextPart, add_stand_in, context_linear, stand_in_factors
from sparselora_hf.ops.projection import Frozen, MixedRows, projections
from sparselora_hf.ops.rows import fork_rows, overlay_rows

ROWS = {
    "some rows": ([1, 4, 5], [0, 2]),
    "all rows": ([0, 2, 4], [1, 3, 5]),
    "all context": ([0, 1, 2, 3, 4, 5], []),
    "all output": ([], [0, 1, 2, 3, 4, 5]),
}
INPUTS, OUTPUTS, KEEP, RANK = 5, 7, 3, 2


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


WEIGHT, BIAS = draw(OUTPUTS, INPUTS, seed=1), draw(OUTPUTS, seed=2)


def projection(x, weight, bias, dtype, branch=None, rows=None):
    [y] = projections(x, [Frozen(weight, bias, branch, rows)], dtype)
    return y


def operands(branched=True):
    a = draw(RANK, INPUTS, seed=3).requires_grad_()
    b = draw(OUTPUTS, RANK, seed=4).requires_grad_()
    return draw(2, 3, INPUTS).requires_grad_(), *((a, b) if branched else ())


def mixed(rows, over_outputs, stand_in):
    context, dense = (torch.tensor(part, dtype=torch.long) for part in rows)
    generator = torch.Generator().manual_seed(5)
    index = torch.randperm(OUTPUTS if over_outputs else INPUTS, generator=generator)[:KEEP].sort().values
    factors = (draw(RANK, INPUTS, seed=6), draw(OUTPUTS, RANK, seed=7)) if stand_in else None
    part = ContextPart(context, index, over_outputs, len(context) + len(dense))
    ready = None if factors is None else stand_in_factors(index, *factors, over_outputs=over_outputs)
    return MixedRows(dense, part, ready), factors


def chain(rows, factors, bias, x, a=None, b=None):
    through, hidden = (x, None) if a is None else fork_branch(x, a, x.dtype)
    whole, few = fork_rows(through.reshape(-1, INPUTS), rows.dense, apart=True)
    y = context_linear(whole, WEIGHT, bias, rows.part)
    if factors is not None:
        y = add_stand_in(y, whole, rows.part.index, *factors, over_outputs=rows.part.over_outputs)
    y = overlay_rows(y, F.linear(few, WEIGHT, bias), rows.dense, apart=True)
    return (y if a is None else add_branch(y, hidden, b, 1.5)).view(2, 3, OUTPUTS)


def test_tensors_that_are_cast_at_once_are_of_one_type(monkeypatch):
    """On a GPU some versions of torch write others in the type of the first, past their end."""
    lists, copy = [], torch._foreach_copy_

    def watched(new, old):
        lists.append(sorted(str(tensor.dtype) for tensor in new))
        copy(new, old)

    monkeypatch.setattr(torch, "_foreach_copy_", watched)
    tensors = [draw(3, 2), None, draw(4), draw(2), draw(1)]
    dtypes = [torch.float32, torch.float32, torch.bfloat16, torch.float32, torch.float64]
    for got, tensor, dtype in zip(cast(tensors, dtypes), tensors, dtypes, strict=True):
        assert got is tensor if tensor is None else torch.equal(got, tensor.to(dtype))
    assert lists == [["torch.float32"] * 2, ["torch.bfloat16"]]


@pytest.mark.parametrize("branched", [True, False], ids=["branch", "alone"])
@pytest.mark.parametrize("stand_in", [False, True], ids=["", "stand-in"])
@pytest.mark.parametrize("over_outputs", [True, False], ids=["outputs", "inputs"])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_it_is_the_chain(rows, over_outputs, stand_in, branched, poison):
    rows, factors = mixed(rows, over_outputs, stand_in)
    bias = None if stand_in else BIAS

    def one(x, a=None, b=None):
        branch = None if a is None else Branch(a, b, 1.5)
        return projection(x, WEIGHT, bias, x.dtype, branch, rows)

    inputs, grad = operands(branched), draw(2, 3, OUTPUTS, seed=8)
    got, want = one(*inputs), chain(rows, factors, bias, *inputs)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, inputs, grad), torch.autograd.grad(want, inputs, grad))
    assert gradcheck(one, inputs)


@pytest.mark.parametrize("bias", [None, BIAS], ids=["plain", "bias"])
def test_dense_rows_alone_are_a_lora_linear(bias):
    inputs = operands()

    def one(x, a, b):
        return projection(x, WEIGHT, bias, x.dtype, Branch(a, b, 1.5))

    torch.testing.assert_close(
        one(*inputs), F.linear(inputs[0], WEIGHT, bias) + 1.5 * inputs[0] @ inputs[1].t() @ inputs[2].t()
    )
    assert gradcheck(one, inputs)


def test_a_frozen_input_gets_no_gradient():
    x, a, b = operands()
    y = projection(x.detach(), WEIGHT, None, x.dtype, Branch(a, b, 1.0))
    y.sum().backward()
    assert a.grad.abs().sum() > 0
    torch.testing.assert_close(b.grad, (x @ a.t()).detach().sum((0, 1)).expand_as(b))


def test_types_are_those_of_the_arguments():
    x, a, b = (t.detach().float().requires_grad_() for t in operands())
    y = projection(x, WEIGHT.bfloat16(), None, torch.bfloat16, Branch(a, b, 1.0))
    assert y.dtype == torch.bfloat16
    assert not y._is_view()
    y.float().square().sum().backward()
    assert {t.grad.dtype for t in (x, a, b)} == {torch.float32}


@pytest.mark.parametrize("bias", [None, BIAS], ids=["", "bias"])
def test_results_may_be_written_on(bias):
    """As OLMo's code does, which clips queries, keys and values in place."""
    results = []
    for clip in (torch.clamp, torch.clamp_):
        x, a, b = operands()
        parts = projections(x, [Frozen(WEIGHT, bias, Branch(a, b, 1.0)) for _ in range(2)], x.dtype)
        results.append(torch.autograd.grad(sum(clip(y, -0.5, 0.5).square().sum() for y in parts), (x, a, b)))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_what_is_kept_for_backward():
    x, a, b = operands()
    rows, _ = mixed(ROWS["some rows"], True, False)
    kept = kept_for_backward(lambda: projection(x, WEIGHT, None, x.dtype, Branch(a, b, 1.0), rows))
    shapes = [tuple(t.shape) for t in kept if t is not WEIGHT]
    assert sorted(shapes) == sorted([(2, 3, INPUTS), (6, RANK), (RANK, INPUTS), (OUTPUTS, RANK)])
    [alone] = kept_for_backward(lambda: projection(x, WEIGHT, None, x.dtype, rows=rows))
    assert alone is WEIGHT


@pytest.mark.parametrize("unused", [None, 0, 1])
def test_several_of_the_same_input_are_each_of_them(unused):
    """Of other widths, ranks, scalings and rows; one may be of no use to the loss."""
    x, *matrices = (
        draw(*shape, seed=shape[0]).requires_grad_()
        for shape in ((2, 3, INPUTS), (2, INPUTS), (OUTPUTS, 2), (3, INPUTS), (4, 3))
    )
    inputs, (rows, _) = (x, *matrices), mixed(ROWS["some rows"], True, False)
    linears = [
        Frozen(WEIGHT, BIAS, Branch(*matrices[:2], 1.5), rows),
        Frozen(draw(4, INPUTS, seed=9), None, Branch(*matrices[2:], 0.5)),
    ]

    def used(results):
        return [y for number, y in enumerate(results) if number != unused]

    def together(*inputs):
        return tuple(used(projections(inputs[0], linears, x.dtype)))

    want = used([projection(x, w, bias, x.dtype, branch, part) for w, bias, branch, part in linears])
    grads = [draw(*y.shape, seed=10) for y in want]
    torch.testing.assert_close(together(*inputs), tuple(want))
    expected = torch.autograd.grad(want, inputs, grads, allow_unused=True)
    got = torch.autograd.grad(together(*inputs), inputs, grads, allow_unused=True)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, torch.zeros_like(ours) if theirs is None and ours is not None else theirs)
    assert gradcheck(together, inputs)


def test_several_without_a_branch():
    x = draw(2, 3, INPUTS).requires_grad_()
    linears = [Frozen(WEIGHT, BIAS), Frozen(draw(4, INPUTS, seed=9), None)]
    assert gradcheck(lambda x: projections(x, linears, x.dtype), (x,))
