"""A backward pass that cannot be differentiated itself, at less cost to the host than torch's own guard."""

import functools
from collections.abc import Callable

import torch
from torch.autograd import function

__all__ = ["once_differentiable"]


def once_differentiable(backward: Callable) -> Callable:
    """As `torch.autograd.function.once_differentiable`, which enters and leaves contexts that mostly hold already.

    Gradients are recorded in a backward pass with ``create_graph=True`` alone; there torch's guard takes over.
    """
    guarded = function.once_differentiable(backward)

    @functools.wraps(backward)
    def wrapper(ctx, *grads):
        return guarded(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

    return wrapper
