import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F

from sparselora_hf.ops import context
from sparselora_hf.ops.context import ContextPart, add_stand_in, context_linear
from sparselora_hf.ops.rows import fork_rows, overlay_rows

SETTINGS = {
    "some rows": ([1, 4, 5], [0, 2]),
    "all rows": ([0, 2, 4], [1, 3, 5]),
    "all context": ([0, 1, 2, 3, 4, 5], []),
    "all output": ([], [0, 1, 2, 3, 4, 5]),
    "no row": ([], []),
}
TOKENS, INPUTS, OUTPUTS, KEEP = 6, 5, 7, 3


@pytest.fixture(params=SETTINGS.values(), ids=SETTINGS.keys())
def rows(request):
    """Context rows and output rows; what is in neither is padding."""
    return tuple(torch.tensor(part, dtype=torch.long) for part in request.param)


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def case(over_outputs, biased):
    width = OUTPUTS if over_outputs else INPUTS
    index = torch.randperm(width, generator=torch.Generator().manual_seed(3))[:KEEP].sort().values
    mask = torch.zeros(width, dtype=torch.float64).index_fill_(0, index, 1)
    return draw(OUTPUTS, INPUTS, seed=1), index, mask, draw(OUTPUTS, seed=2) if biased else None


def definition(x, weight, mask, bias, over_outputs):
    """Every channel computed and masked; a bias is never dropped."""
    y = F.linear(x, weight) * mask if over_outputs else F.linear(x * mask, weight)
    return y if bias is None else y + bias


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("over_outputs", [True, False], ids=["outputs", "inputs"])
def test_alone(rows, over_outputs, biased, poison):
    x = draw(TOKENS, INPUTS).requires_grad_()
    weight, index, mask, bias = case(over_outputs, biased)
    here = torch.zeros(TOKENS, 1, dtype=torch.float64).index_fill_(0, rows[0], 1)

    def op(x):
        return context_linear(x, weight, bias, ContextPart(rows[0], index, over_outputs))

    torch.testing.assert_close(op(x), definition(x, weight, mask, bias, over_outputs) * here)
    assert gradcheck(op, x)


@pytest.mark.parametrize("share", [2.0, 0.0], ids=["taken out", "over all rows"])
@pytest.mark.parametrize("over_outputs", [True, False], ids=["outputs", "inputs"])
def test_joined_with_dense_rows(rows, over_outputs, share, poison, monkeypatch):
    """As a sparse linear uses it: nothing that was never written comes through, in either direction."""
    monkeypatch.setattr(context, "_IN_PLACE", share)
    weight, index, mask, bias = case(over_outputs, True)
    covered = len(rows[0]) + len(rows[1])

    def joined(x, bias):
        whole, few = fork_rows(x, rows[1], apart=True)
        y = context_linear(whole, weight, bias, ContextPart(rows[0], index, over_outputs, covered))
        return overlay_rows(y, F.linear(few, weight, bias), rows[1], apart=True)

    def want(x, bias):
        masks = [torch.zeros(TOKENS, 1, dtype=torch.float64).index_fill_(0, part, 1) for part in rows]
        return definition(x, weight, mask, bias, over_outputs) * masks[0] + F.linear(x, weight, bias) * masks[1]

    inputs = draw(TOKENS, INPUTS).requires_grad_(), bias.requires_grad_()  # PEFT may train a bias
    torch.testing.assert_close(joined(*inputs), want(*inputs))
    grad = draw(TOKENS, OUTPUTS, seed=9)
    got, expected = (torch.autograd.grad(op(*inputs), inputs, grad) for op in (joined, want))
    torch.testing.assert_close(got, expected)
    assert gradcheck(joined, inputs)


def test_nothing_but_the_frozen_parts_is_kept():
    weight, index, _, _ = case(True, False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        context_linear(draw(6, INPUTS).requires_grad_(), weight, None, ContextPart(torch.arange(3), index, True))
    assert not saved


def test_types_follow_linear():
    weight, index, _, bias = case(True, True)
    x, part = draw(TOKENS, INPUTS).float().requires_grad_(), ContextPart(torch.arange(4), index, True)
    assert context_linear(x, weight.bfloat16(), None, part).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        y = context_linear(x, weight.float(), bias.float(), part)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("over_outputs", [True, False], ids=["outputs", "inputs"])
def test_stand_in_is_the_factors_on_dropped_channels(over_outputs):
    weight, index, mask, bias = case(over_outputs, True)
    down, up = draw(2, INPUTS, seed=5), draw(OUTPUTS, 2, seed=6)
    x, everything = draw(TOKENS, INPUTS).requires_grad_(), torch.arange(TOKENS)

    def op(x):
        y = context_linear(x, weight, bias, ContextPart(everything, index, over_outputs))
        return add_stand_in(y, x, index, down, up, over_outputs=over_outputs)

    want = definition(x, weight, mask, bias, over_outputs) + definition(x, up @ down, 1 - mask, None, over_outputs)
    torch.testing.assert_close(op(x), want)
    assert gradcheck(op, x)
