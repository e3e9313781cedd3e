"""``act(gate) ⊙ up`` and its gradients by Triton: the families' own chain, to a rounding of each step."""

import pytest
import torch
from cases import DEVICE, DTYPES, INTERPRETED, Draw
from helpers import ATTENTION, MLP, assert_same, lora_model, loss_and_gradients, make_batch
from torch.nn import functional as F

from sparselora_hf import SparseLoraConfig, sparsify
from sparselora_hf.ops import gate as gate_ops
from sparselora_hf.ops.gate import gated_activation

KINDS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
# float32 shows how two libraries take exponentials; others are rounded twice, to bf16 in the interpreter cut off
ROUNDINGS = {torch.float32: 8, torch.float16: 2, torch.bfloat16: 4 if INTERPRETED else 2}
SHAPES = {"odd": (37, 13), "tiles": (2, 33, 130), "one row": (1, 64), "no row": (0, 20)}


def close(got, want):
    """Within some units in the last place; NaN never passes."""
    rtol = ROUNDINGS[want.dtype] * torch.finfo(want.dtype).eps
    torch.testing.assert_close(got, want, rtol=rtol, atol=1e-5)  # where 1 + tanh or erf is nearly 0, digits are lost


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("joined", [False, True], ids=["two products", "one product"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_equal_to_the_chain(shape, joined, kind, dtype):
    draw, results = Draw(dtype), []
    both, grad = draw(*shape[:-1], 2 * shape[-1], scale=2.0), draw(*shape)
    for kernels in ("triton", None):
        leaves = [part.clone().requires_grad_() for part in ([both] if joined else both.chunk(2, -1))]
        gate, up = leaves[0].chunk(2, -1) if joined else leaves
        y = KINDS[kind](gate) * up if kernels is None else gated_activation(leaves, kind, kernels)
        y.backward(grad)
        results.append((y.detach(), *(leaf.grad for leaf in leaves)))
    (y, *grads), (y_want, *grads_want) = results
    assert y.shape == shape
    for got, want in zip((y, *grads), (y_want, *grads_want), strict=True):
        close(got, want)


def test_columns_that_are_not_contiguous_and_gradients_that_are_expanded():
    draw = Draw()
    gate, up = (draw(13, 37).t().requires_grad_() for _ in range(2))
    got, want = (torch.autograd.grad(y.sum(), (gate, up)) for y in (
        gated_activation([gate, up], "silu", "triton"), F.silu(gate) * up))  # fmt: skip
    for each, wanted in zip(got, want, strict=True):
        close(each, wanted)


@pytest.mark.parametrize("mode", ["triton", "torch"])
def test_the_kernels_do_run(mode, monkeypatch):
    """The comparison above does not compare PyTorch with itself."""
    monkeypatch.setattr(gate_ops, "_FUNCTIONS", {})
    parts = [Draw()(9, 8).requires_grad_() for _ in range(2)]
    if mode == "triton":
        gated_activation(parts, "silu", mode).sum().backward()
    else:
        with pytest.raises(KeyError):
            gated_activation(parts, "silu", mode)


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["", "checkpoints", "reentrant"])
def test_in_training(checkpointing):
    model = lora_model(targets=ATTENTION + MLP, layers=2).to(DEVICE)
    batch = {name: tensor.to(DEVICE) for name, tensor in make_batch().items()}
    want = loss_and_gradients(model, batch)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    with sparsify(model, SparseLoraConfig(exact=("activations",), kernels="triton")):
        assert_same(loss_and_gradients(model, batch), want, 1e-5)
