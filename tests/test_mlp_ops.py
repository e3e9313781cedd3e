import dataclasses

import pytest
import torch
from helpers import kept_for_backward
from torch.autograd import gradcheck
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sparselora_hf.ops.mlp import MlpWeights, Slices, StandIn, kept_mlp

SHAPES = {"odd": (5, 7, 13, 4), "one channel": (3, 4, 6, 1), "no token": (0, 4, 6, 2), "all kept": (4, 3, 5, 5)}
ACTIVATIONS = {"silu": F.silu, "gelu": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu}
RANK = 2


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def case(shape, biased=False, activation=F.silu, gated=True):
    tokens, hidden, width, keep = shape
    biases = (randn(width, seed=4), randn(width, seed=5), randn(hidden, seed=6)) if biased else (None, None, None)
    gate = randn(width, hidden, seed=1) if gated else None
    biases = biases if gated else (None, *biases[1:])
    weights = MlpWeights(gate, randn(width, hidden, seed=2), randn(hidden, width, seed=3), activation, *biases)
    index = torch.randperm(width, generator=torch.Generator().manual_seed(7))[:keep].sort().values
    return randn(tokens, hidden).requires_grad_(), weights, index


def stand_in_of(weights, fixed=False):
    """A stand-in with arbitrary factors; `fixed` is the kind whose output is not tied to channels."""
    width, hidden = weights.up.shape
    shift, mean, channels = randn(RANK, seed=11), randn(width, seed=12), randn(RANK, width, seed=13)
    if fixed:
        return StandIn(randn(RANK, hidden, seed=10), shift, randn(RANK, hidden, seed=14), randn(hidden, seed=15))
    return StandIn(randn(RANK, hidden, seed=10), shift, channels @ weights.down.T, weights.down @ mean, mean, channels)


def masked(x, weights, index, stand_in=None):
    """The definition at full width: dropped channels contribute what stands in for them, or nothing."""
    up = F.linear(x, weights.up, weights.up_bias)
    mask = torch.zeros(weights.up.shape[0], dtype=torch.float64).index_fill_(0, index, 1)
    gated = weights.gate is not None
    true = weights.activation(F.linear(x, weights.gate, weights.gate_bias)) * up if gated else weights.activation(up)
    if stand_in is None:
        return F.linear(true * mask, weights.down, weights.down_bias)
    z = x @ stand_in.project.T - stand_in.shift
    if stand_in.channels is None:
        return F.linear(true * mask, weights.down, weights.down_bias) + z @ stand_in.output + stand_in.constant
    replaced = stand_in.mean + z @ stand_in.channels
    return F.linear(true * mask + replaced * (1 - mask), weights.down, weights.down_bias)


def check(x, weights, index, stand_in=None):
    got, want = kept_mlp(x, weights, index, stand_in), masked(x, weights, index, stand_in)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    grad = randn(*got.shape, seed=20)
    torch.testing.assert_close(
        torch.autograd.grad(got, x, grad)[0], torch.autograd.grad(want, x, grad)[0], rtol=1e-10, atol=1e-10
    )
    assert gradcheck(lambda x: kept_mlp(x, weights, index, stand_in), x)


@pytest.mark.parametrize("gated", [False, True], ids=["no gate", "gated"])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("kind", ["none", "channels", "fixed"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_against_masked_dense(shape, kind, biased, gated):
    x, weights, index = case(shape, biased, gated=gated)
    check(x, weights, index, None if kind == "none" else stand_in_of(weights, kind == "fixed"))


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS.keys())
def test_activations(activation):
    x, weights, index = case(SHAPES["odd"], activation=activation)
    check(x, weights, index, stand_in_of(weights))


@pytest.mark.parametrize("fixed", [False, True], ids=["channels", "fixed"])
def test_stand_in_alone(fixed):
    x, weights, _ = case(SHAPES["odd"], biased=True)
    check(x, weights, torch.empty(0, dtype=torch.long), stand_in_of(weights, fixed))


def test_stand_in_of_rank_0_is_the_mean():
    x, weights, index = case(SHAPES["odd"])
    width, hidden = weights.up.shape
    mean = randn(width, seed=12)
    empty = randn(0, hidden), randn(0), randn(0, hidden)
    check(x, weights, index, StandIn(*empty, weights.down @ mean, mean, randn(0, width)))


def test_stand_in_that_is_right_makes_dropping_harmless():
    """With a linear activation of one factor the stand-in can be exact: any set gives the dense output."""
    _, weights, index = case((6, 4, 9, 3))
    weights = MlpWeights(
        weights.gate, torch.zeros_like(weights.up), weights.down, lambda g: g, up_bias=torch.ones(9).double()
    )
    x = randn(6, 4).requires_grad_()
    exact = StandIn(
        torch.eye(4).double(), torch.zeros(4).double(), weights.gate.T @ weights.down.T, torch.zeros(4).double(),
        torch.zeros(9).double(), weights.gate.T.contiguous(),
    )  # fmt: skip
    torch.testing.assert_close(kept_mlp(x, weights, index, exact), masked(x, weights, torch.arange(9)))


@pytest.mark.parametrize("fixed", [False, True], ids=["channels", "fixed"])
def test_correction_is_the_same_function_in_parts(fixed):
    x, weights, index = case(SHAPES["odd"])
    stand_in = stand_in_of(weights, fixed)
    output, given_up = stand_in.correction(x, index)
    true = (weights.activation(x @ weights.gate.T) * (x @ weights.up.T))[:, index]
    torch.testing.assert_close(
        (true - given_up) @ weights.down[:, index].T + output, masked(x, weights, index, stand_in)
    )


def test_predict_is_what_kept_channels_give_up():
    x, weights, index = case(SHAPES["odd"])
    stand_in = stand_in_of(weights)
    torch.testing.assert_close(stand_in.predict(x)[:, index], stand_in.correction(x, index)[1])


@pytest.mark.parametrize("stood_in", [False, True], ids=["plain", "stand-in"])
def test_saved_for_backward_is_kept_width(stood_in):
    x, weights, index = case((40, 24, 64, 5))
    kept = kept_for_backward(lambda: kept_mlp(x, weights, index, stand_in_of(weights) if stood_in else None))
    assert {tuple(t.shape) for t in kept} == {(5,), (40, 10)}
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in kept)


@pytest.mark.parametrize("stood_in", [False, True], ids=["plain", "stand-in"])
def test_recomputation_stops_before_the_last_product(stood_in, monkeypatch):
    x, weights, index = case((40, 24, 64, 5))
    products = []
    gather_out = MlpWeights.gather_out
    monkeypatch.setattr(MlpWeights, "gather_out", lambda *a: products.append(1) or gather_out(*a))
    stand_in = stand_in_of(weights) if stood_in else None
    checkpoint(kept_mlp, x, weights, index, stand_in, use_reentrant=False).sum().backward()
    assert len(products) == 2  # forward and backward


def test_no_gradient_where_none_is_asked():
    x, weights, index = case(SHAPES["odd"])
    assert not kept_mlp(x.detach(), weights, index).requires_grad


def test_types_follow_linear():
    x, weights, index = case(SHAPES["odd"])
    x = x.detach().float().requires_grad_()
    weights = MlpWeights(weights.gate.float(), weights.up.float(), weights.down.float(), weights.activation)
    with torch.autocast("cpu", torch.bfloat16):
        y = kept_mlp(x, weights, index)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    want = torch.autograd.grad(kept_mlp(x, weights, index).sum(), x)[0]
    torch.testing.assert_close(x.grad, want, rtol=0.05, atol=0.05 * float(want.abs().max()))


def test_to_keeps_what_is_missing_missing():
    _, weights, _ = case(SHAPES["odd"])
    half = stand_in_of(weights, fixed=True).to(torch.device("cpu"), torch.bfloat16)
    assert half.output.dtype == torch.bfloat16
    assert half.channels is half.mean is None


def gathers(monkeypatch):
    """Names of the methods that gather, as they are called."""
    calls = []
    for name in ("gather_in", "gather_out"):
        own = getattr(MlpWeights, name)
        monkeypatch.setattr(MlpWeights, name, lambda *a, own=own, name=name: calls.append(name) or own(*a))
    return calls


@pytest.mark.parametrize("stood_in", [False, True], ids=["plain", "stand-in"])
def test_slices_of_few_channels_are_gathered_once(stood_in, monkeypatch):
    x, weights, index = case((6, 8, 64, 2))
    stand_in = stand_in_of(weights) if stood_in else None
    want = kept_mlp(x, weights, index, stand_in)
    want_grad = torch.autograd.grad(want.sum(), x)[0]
    calls, slices = gathers(monkeypatch), Slices()
    for _ in range(3):
        y = kept_mlp(x, weights, index, stand_in, slices=slices)
        assert torch.equal(y, want) and torch.equal(torch.autograd.grad(y.sum(), x)[0], want_grad)
    assert calls == ["gather_in", "gather_out"]


def test_slices_of_many_channels_are_not_kept(monkeypatch):
    x, weights, index = case((6, 8, 64, 3))
    calls, slices = gathers(monkeypatch), Slices()
    kept_mlp(x, weights, index, slices=slices).sum().backward()
    assert calls == ["gather_in", "gather_out", "gather_out", "gather_in"]


def test_slices_are_gathered_anew_when_what_they_come_from_changes():
    x, weights, index = case((6, 8, 64, 2), biased=True)
    slices, stand_in = Slices(), stand_in_of(weights)

    def through(weights, stand_in):
        got = kept_mlp(x, weights, index, stand_in, slices=slices)
        assert torch.equal(got, kept_mlp(x, weights, index, stand_in))
        return got

    first = through(weights, stand_in)
    weights.up.mul_(2)  # as loading a checkpoint does
    second = through(weights, stand_in)
    assert not torch.equal(second, first)
    weights.gate_bias.add_(1)
    assert not torch.equal(through(weights, stand_in), second)
    other = dataclasses.replace(weights, down=weights.down.clone() + 1)
    third = through(other, stand_in)
    assert not torch.equal(through(other, stand_in_of(other, fixed=True)), third)
    through(other, None)
    single = MlpWeights(other.gate.float(), other.up.float(), other.down.float(), other.activation)
    assert kept_mlp(x.detach().float(), single, index, slices=slices).dtype == torch.float32
