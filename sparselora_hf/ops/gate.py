"""``act(gate) ⊙ up``, the heart of a gated MLP, with its backward pass written out.

Kept for backward are gate and up. Autograd's chain keeps the activated gate as well and reads and writes memory in 14
passes, 5 forward and 9 backward; one kernel each way makes 3 and 5.
"""

from collections.abc import Sequence
from functools import partial

import torch

from ..kernels.choice import Choice, choose
from ..kernels.runtime import kernels_of
from ..kernels.tiles import tile_for
from .once import once_differentiable

__all__ = ["activate", "activate_backward", "gated_activation"]

_aten = torch.ops.aten


def _derive_relu(grad: torch.Tensor, x: torch.Tensor, *, grad_input: torch.Tensor) -> None:
    _aten.threshold_backward.grad_input(grad, x, 0, grad_input=grad_input)


# the function into `out`; gradient behind it and input to `grad_input`, which may be the former
_FUNCTIONS = {
    "gelu": (_aten.gelu.out, _aten.gelu_backward.grad_input),
    "gelu_tanh": (
        partial(_aten.gelu.out, approximate="tanh"),
        partial(_aten.gelu_backward.grad_input, approximate="tanh"),
    ),
    "relu": (partial(torch.clamp_min, min=0), _derive_relu),
    "silu": (_aten.silu.out, _aten.silu_backward.grad_input),
}


def _rows(x: torch.Tensor) -> torch.Tensor:
    """``[..., W]`` to ``[T, W]``, columns contiguous."""
    x = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _gate_and_up(products: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    return products if len(products) == 2 else products[0].chunk(2, -1)


def activate(products: Sequence[torch.Tensor], kind: str, kernels: str | Choice) -> tuple[torch.Tensor, Choice]:
    """`gated_activation` apart from autograd, and the way it went."""
    gate, up = _gate_and_up([_rows(product) for product in products])
    way = choose("activation", gate, gate.shape[1], gate.shape[1], kernels)
    if way:
        tile = tile_for("activation", gate, way.tile)
        hidden = kernels_of("mlp").mlp_activation_fwd(gate, up, gate.shape[1], kind, tile)
    else:
        hidden = gate.new_empty(gate.shape)
        _FUNCTIONS[kind][0](gate, out=hidden)
        hidden *= up
    shape = products[0].shape
    return hidden if len(shape) == 2 else hidden.view(*shape[:-1], gate.shape[1]), way


def activate_backward(
    grad: torch.Tensor, products: Sequence[torch.Tensor], kind: str, way: Choice
) -> list[torch.Tensor]:
    """Gradients of the products, from that of the activations ``[..., N]``."""
    inputs, grad = [_rows(product) for product in products], _rows(grad)
    grads = [product.new_empty(product.shape) for product in inputs]
    (gate, up), (grad_gate, grad_up) = _gate_and_up(inputs), _gate_and_up(grads)
    if way:
        tile = tile_for("activation", gate, way.tile)
        kernels_of("mlp").mlp_activation_bwd(grad, gate, up, grad_gate, grad_up, kind, tile)
    else:
        function, derive = _FUNCTIONS[kind]
        function(gate, out=grad_up)
        grad_up *= grad
        torch.mul(grad, up, out=grad_gate)
        derive(grad_gate, gate, grad_input=grad_gate)
    return [
        part if product.dim() == 2 else part.view(product.shape) for part, product in zip(grads, products, strict=True)
    ]


class _GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kind, kernels, *products):
        ctx.save_for_backward(*products)
        hidden, way = activate(products, kind, kernels)
        ctx.chosen = kind, way
        return hidden

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return None, None, *activate_backward(grad, ctx.saved_tensors, *ctx.chosen)


def gated_activation(products: Sequence[torch.Tensor], kind: str, kernels: str | Choice = "auto") -> torch.Tensor:
    """Activations of a gated MLP.

    Args:
        products: gate and up, ``[..., N]`` each and of one type, or both in one matrix ``[..., 2N]``, gate first.
        kind: activation, by its name in `activation_kind`.
        kernels: as in `SparseLoraConfig`.

    Returns:
        ``[..., N]``. Differentiable in the products.
    """
    return _GatedActivation.apply(kind, kernels, *products)
