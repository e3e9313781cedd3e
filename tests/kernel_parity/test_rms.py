import pytest
import torch
from cases import DEVICE, DTYPES, INTERPRETED, Draw, assert_near
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from sparselora_hf.kernels.rms import rms_norm_bwd, rms_norm_fwd

EPS = 1e-3
NORMS = {  # class, offset, whether it rounds early
    "early": (LlamaRMSNorm, 0.0, True),
    "late": (Olmo2RMSNorm, 0.0, False),
    "from 1": (Gemma2RMSNorm, 1.0, False),
}
SHAPES = {
    "odd": (37, 45),
    "heads": (2, 3, 21, 16),
    "whole tile": (17, 128),
    "one row a block": (2, 2049),
    "one number": (3, 1),
    "no token": (0, 24),
    "no batch": (0, 5, 24),
}


def make_norm(kind, width, dtype, draw):
    norm = kind(width, EPS).to(DEVICE, dtype).requires_grad_(False)
    norm.weight.copy_(draw(width))
    return norm


def hidden_states(draw, *shape):
    x = draw(*shape)
    x[:1] *= 1e-2  # where eps shows
    return x


def assert_same_rounding(got, want):
    """Up to the order of a sum in float32: no element is further off than its neighbour, and few are off at all."""
    bits = torch.int32 if got.dtype == torch.float32 else torch.int16
    steps = (got.contiguous().view(bits).long() - want.contiguous().view(bits).long()).abs()
    assert got.shape == want.shape
    assert steps.max() <= (4 if got.dtype == torch.float32 else 1)
    assert got.dtype == torch.float32 or (steps > 0).float().mean() < 0.01


def reference_grad(x, grad, weight, offset):
    """In float64, by autograd."""
    leaf = x.double().requires_grad_()
    y = leaf * (leaf.square().mean(-1, keepdim=True) + EPS).rsqrt() * (weight.double() + offset)
    (grad_x,) = torch.autograd.grad(y, leaf, grad.double())
    return y.detach(), grad_x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_forward_and_backward(shape, norm, dtype):
    kind, offset, early = norm
    draw = Draw(dtype)
    weight = make_norm(kind, shape[-1], dtype, draw).weight
    x, grad = hidden_states(draw, *shape), draw(*shape)
    want, want_grad = reference_grad(x, grad, weight, offset)
    assert_near(rms_norm_fwd(x, weight, offset, EPS, early), want, dtype)
    assert_near(rms_norm_bwd(grad, x, weight, offset, EPS), want_grad, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
def test_rounds_as_the_module_does(norm, dtype):
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter does not round to bfloat16, it cuts off")
    kind, offset, early = norm
    draw = Draw(dtype)
    module = make_norm(kind, 64, dtype, draw)
    x = hidden_states(draw, 50, 64)
    assert_same_rounding(rms_norm_fwd(x, module.weight, offset, EPS, early), module(x))


@pytest.mark.parametrize("layout", ["transposed", "columns apart", "every second row", "expanded"])
def test_any_layout(layout):
    draw = Draw()
    weight = draw(24)
    x, grad = {
        "transposed": lambda: (draw(2, 5, 3, 24).transpose(1, 2), draw(2, 5, 3, 24).transpose(1, 2)),
        "columns apart": lambda: (draw(24, 7).t(), draw(7, 48)[:, ::2]),
        "every second row": lambda: (draw(10, 24)[::2], draw(5, 3, 24)[:, 1]),
        "expanded": lambda: (draw(24).expand(5, 24), draw(1).expand(5, 24)),
    }[layout]()
    want, want_grad = reference_grad(x, grad, weight, 0.0)
    assert_near(rms_norm_fwd(x, weight, 0.0, EPS, True), want, torch.float32)
    assert_near(rms_norm_bwd(grad, x, weight, 0.0, EPS), want_grad, torch.float32)
