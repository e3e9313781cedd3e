import pytest
import torch
from cases import DTYPES, Draw, assert_near
from torch.nn import functional as F

from sparselora_hf.kernels.mlp import mlp_activation_bwd, mlp_activation_fwd, mlp_in_fwd
from sparselora_hf.kernels.tiles import Tile

TILE, FLAT = Tile(64, 32, 64, 4, 2), Tile(16, 64)
KINDS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
SHAPES = {"odd": (37, 45, 70, 13), "tiles": (130, 140, 90, 67), "no token": (0, 8, 9, 4), "none kept": (5, 8, 9, 0)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_in(shape, biased, gated, dtype):
    tokens, hidden, width, keep = shape
    draw = Draw(dtype)
    x, gate, up = draw(tokens, hidden), draw(width, hidden, scale=0.2), draw(width, hidden, scale=0.2)
    biases = (draw(width), draw(width)) if biased else (None, None)
    index = draw.subset(width, keep)
    wide, h = mlp_in_fwd(x, gate if gated else None, up, index, "silu", TILE, *biases)
    parts = [(gate, biases[0]), (up, biases[1])][0 if gated else 1 :]
    double = [F.linear(x.double(), w[index].double(), None if b is None else b[index].double()) for w, b in parts]
    assert_near(wide, torch.cat(double, 1), dtype)
    assert_near(h, F.silu(double[0]) * (double[1] if gated else 1), dtype)


def parts(wide, keep, gated):
    """Gate or None, and up with what follows it."""
    return (wide[:, :keep], wide[:, keep:]) if gated else (None, wide)


def activation_bwd(grad, wide, keep, gated, *args):
    """Gradient of the joined products, of which backward may see the first alone."""
    grad_wide = grad.new_empty(len(grad), grad.shape[1] + gated * keep)
    seen = parts(wide[:, : (1 + gated) * keep], keep, gated)
    mlp_activation_bwd(grad, *seen, *parts(grad_wide, keep, gated), *args)
    return grad_wide


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("tail", [0, 5])
@pytest.mark.parametrize("corrected", [False, True], ids=["", "corrected"])
def test_activation(kind, gated, tail, corrected):
    tokens, keep, dtype = 37, 13, torch.float32
    draw = Draw(dtype)
    wide, grad = draw(tokens, (1 + gated) * keep + tail), draw(tokens, keep + tail)
    less, grad_less = (draw(tokens, keep), draw(tokens, tail)) if corrected else (None, None)

    def definition(wide):
        h = KINDS[kind](wide[:, :keep]) * (wide[:, keep : 2 * keep] if gated else 1)
        return torch.cat([h - (less.double() if corrected else 0), wide[:, (1 + gated) * keep :]], 1)

    leaf = wide.double().requires_grad_()
    want = definition(leaf)
    (grad_want,) = torch.autograd.grad(want, leaf, grad.double())
    if corrected and tail:
        grad_want[:, -tail:] -= grad_less.double()
    assert_near(mlp_activation_fwd(*parts(wide, keep, gated), keep, kind, FLAT, less), want.detach(), dtype)
    got = activation_bwd(grad, wide, keep, gated, kind, FLAT, grad_less if tail else None)
    assert_near(got, grad_want, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "keep", "tail"), [(0, 4, 2), (3, 0, 2), (40, 70, 60)])
def test_activation_narrow_types_and_empty(tokens, keep, tail, dtype):
    draw = Draw(dtype)
    wide, grad = draw(tokens, 2 * keep + tail), draw(tokens, keep + tail)
    leaf = wide.double().requires_grad_()
    want = torch.cat([F.silu(leaf[:, :keep]) * leaf[:, keep : 2 * keep], leaf[:, 2 * keep :]], 1)
    assert_near(mlp_activation_fwd(*parts(wide, keep, True), keep, "silu", FLAT), want.detach(), dtype)
    got = activation_bwd(grad, wide, keep, True, "silu", FLAT)
    assert_near(got, torch.autograd.grad(want, leaf, grad.double())[0], dtype)
