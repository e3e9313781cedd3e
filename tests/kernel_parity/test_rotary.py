import pytest
import torch
from cases import DEVICE, DTYPES, INTERPRETED, Draw, assert_near
from helpers import assert_same, loss_and_gradients, make_batch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from zoo import zoo_lora

from sparselora_hf import SparseLoraConfig, sparsify
from sparselora_hf.kernels.rotary import rotary
from sparselora_hf.ops.rotary import lean_rotary

SHAPES = {  # batch, heads of queries, of keys, tokens, width
    "grouped heads": (2, 8, 2, 7, 16),
    "one sequence": (1, 4, 4, 5, 64),
    "odd heads": (3, 7, 1, 3, 10),
    "more keys than queries": (1, 1, 6, 4, 2),
    "several blocks": (1, 70, 35, 2, 64),
    "wide": (1, 2, 1, 3, 256),
    "no token": (2, 4, 2, 0, 8),
    "no sequence": (0, 4, 2, 5, 8),
}
SOME = SHAPES["grouped heads"]


def projected(draw, batch, heads, tokens, width):
    """As a projection gives it."""
    return draw(batch, tokens, heads * width).view(batch, tokens, heads, width).transpose(1, 2)


def arguments(draw, shape, angles=None, shared=False):
    """Queries, keys, cosines and sines, whose halves differ here."""
    batch, heads, heads_k, tokens, width = shape
    angles = angles or draw
    q, k = projected(draw, batch, heads, tokens, width), projected(draw, batch, heads_k, tokens, width)
    return q, k, *(angles(1 if shared else batch, tokens, width) for _ in range(2))


def reference(q, k, cos, sin, grads):
    """In float64, by autograd."""
    leaves = [x.double().requires_grad_() for x in (q, k)]
    turned = apply_rotary_pos_emb(*leaves, cos.double(), sin.double())
    return turned, torch.autograd.grad(turned, leaves, [grad.double() for grad in grads])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["angles each", "angles shared"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_forward_and_backward(shape, shared, dtype):
    draw = Draw(dtype)
    q, k, cos, sin = arguments(draw, shape, shared=shared)
    grads = [draw(*x.shape) for x in (q, k)]
    turned, turned_back = reference(q, k, cos, sin, grads)
    for got, want in zip(rotary(q, k, cos, sin, dtype, False), turned, strict=True):
        assert_near(got, want, dtype)
    for got, want in zip(rotary(*grads, cos, sin, dtype, True), turned_back, strict=True):
        assert_near(got, want, dtype)
        assert got.transpose(1, 2).is_contiguous()


def by_autograd(run, q, k, cos, sin):
    leaves = [x.detach().requires_grad_() for x in (q, k)]
    turned = run(*leaves, cos, sin)
    draw = Draw(turned[0].dtype, seed=1)
    return *turned, *torch.autograd.grad(turned, leaves, [draw(*x.shape) for x in turned])


@pytest.mark.parametrize("angles", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounds_as_the_families_do(dtype, angles):
    if INTERPRETED and torch.bfloat16 in (dtype, angles):
        pytest.skip("the interpreter does not round to bfloat16, it cuts off")
    given = arguments(Draw(dtype), SOME, Draw(angles, seed=2))
    runs = (lambda *x: lean_rotary(*x, "triton")), apply_rotary_pos_emb
    for got, want in zip(*(by_autograd(run, *given) for run in runs), strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


@pytest.mark.parametrize("layout", ["heads first", "slice of heads", "expanded", "columns apart"])
def test_any_layout(layout):
    draw = Draw()
    batch, heads, heads_k, tokens, width = SOME
    make = {
        "heads first": lambda heads: draw(batch, heads, tokens, width),
        "slice of heads": lambda heads: projected(draw, batch, heads, tokens, 2 * width)[..., :width],
        "expanded": lambda heads: draw(1, 1, 1, 1).expand(batch, heads, tokens, width),
        "columns apart": lambda heads: draw(batch, heads, tokens, 2 * width)[..., ::2],
    }[layout]
    q, k, grad_q, grad_k = (make(each) for each in (heads, heads_k) * 2)
    cos, sin = draw(2, 1, tokens, 2 * width)[..., width:]
    turned, turned_back = reference(q, k, cos, sin, (grad_q, grad_k))
    leaves = [x.detach().requires_grad_() for x in (q, k)]
    results = lean_rotary(*leaves, cos, sin, "triton")
    back = torch.autograd.grad(results, leaves, (grad_q, grad_k))
    for got, want in zip((*results, *back), (*turned, *turned_back), strict=True):
        assert_near(got.detach(), want.detach(), torch.float32)


@pytest.fixture
def launched(monkeypatch):
    """Whether each launch was backward."""
    from sparselora_hf.kernels import rotary

    directions, launch = [], rotary.launch
    monkeypatch.setattr(rotary, "launch", lambda *a, **k: directions.append(k["BACKWARD"]) or launch(*a, **k))
    return directions


@pytest.mark.parametrize("angles", ["float64", "apart", "strides of their own"])
def test_without_a_kernel(angles, launched):
    draw = Draw()
    q, k, cos, sin = arguments(draw, SOME)
    if angles == "float64":
        cos, sin = cos.double(), sin.double()
    elif angles == "apart":
        cos, sin = (x.repeat_interleave(2, -1)[..., ::2] for x in (cos, sin))
    else:
        sin = sin.transpose(0, 1).contiguous().transpose(0, 1)
    got, want = lean_rotary(q, k, cos, sin, "triton"), apply_rotary_pos_emb(q, k, cos, sin)
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))
    assert not launched


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "phi"])
@pytest.mark.parametrize("checkpointing", ["none", "reentrant", "not reentrant"])
def test_in_training(family, checkpointing, launched):
    model = zoo_lora(family).to(DEVICE)
    batch = {name: tensor.to(DEVICE) for name, tensor in make_batch().items()}
    want = loss_and_gradients(model, batch)
    if checkpointing != "none":
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        model.enable_input_require_grads()
    with sparsify(model, SparseLoraConfig(exact=("rotary",), kernels="triton")):
        assert_same(loss_and_gradients(model, batch), want, 1e-4)
    assert launched.count(False) == (2 if checkpointing == "none" else 4)
    assert launched.count(True) == 2
