"""Backward passes that are no functions of their own: right once, an error the second time."""

import pytest
import torch

from sparselora_hf.ops.once import once_differentiable

recorded = []  # whether gradients were, in each backward pass


class _Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        recorded.append(torch.is_grad_enabled())
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


@pytest.mark.parametrize("create_graph", [False, True])
def test_first_derivative(create_graph):
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    (grad,) = torch.autograd.grad(_Cube.apply(x).sum(), x, create_graph=create_graph)
    assert torch.equal(grad, torch.tensor([3.0, 12.0]))
    assert recorded[-1] is False


def test_second_derivative_is_refused():
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    (grad,) = torch.autograd.grad(_Cube.apply(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
