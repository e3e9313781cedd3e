"""Activation functions by the name that kernels know them by."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from ..hooks import has_hooks

__all__ = ["activation_kind"]

# classes by name: transformers' and torch's own
_CLASSES = {
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "ReLU": "relu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
}
_FUNCTIONS = {F.silu: "silu", F.gelu: "gelu", F.relu: "relu", torch.relu: "relu"}
_APPROXIMATE = {"none": "gelu", "tanh": "gelu_tanh"}


def activation_kind(activation: Callable[[torch.Tensor], torch.Tensor]) -> str | None:
    """``silu``, ``gelu``, ``gelu_tanh``, ``relu``, or None for any other function, and for a module with hooks."""
    if not isinstance(activation, nn.Module):
        return _FUNCTIONS.get(activation)
    if has_hooks(activation):
        return None
    if type(activation) is nn.GELU:
        return _APPROXIMATE[activation.approximate]
    return _CLASSES.get(type(activation).__name__)
