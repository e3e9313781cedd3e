"""Tiny models whose base is quantised with bitsandbytes, and their twins with the dequantised weights."""

import copy

import pytest
import torch
from helpers import ATTENTION, add_lora, tiny_model
from torch import nn

from sparselora_hf.ops.quant import frozen_weight, read_whole

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

KINDS = {
    "nf4": {"quant_type": "nf4", "compress_statistics": False},
    "nf4-double": {"quant_type": "nf4", "compress_statistics": True},
    "fp4": {"quant_type": "fp4", "compress_statistics": False},
    "fp4-double": {"quant_type": "fp4", "compress_statistics": True},
    "int8": None,
}


def quantise(model: nn.Module, kind: str = "nf4-double", compute: torch.dtype = torch.float32) -> nn.Module:
    """Quantise the linears of all layers, in place."""
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and linear is not model.get_output_embeddings():
            model.set_submodule(name, _quantised(linear, KINDS[kind], compute))
    setattr(model, "is_loaded_in_8bit" if kind == "int8" else "is_loaded_in_4bit", True)
    return model


def _quantised(linear: nn.Linear, options: dict | None, compute: torch.dtype) -> nn.Module:
    shape, bias = (linear.in_features, linear.out_features), linear.bias is not None
    if options is None:
        new = bnb.nn.Linear8bitLt(*shape, bias=bias, has_fp16_weights=False)
    else:
        new = bnb.nn.Linear4bit(*shape, bias=bias, compute_dtype=compute, **options)
    new.load_state_dict(linear.state_dict())
    return new.to("cpu")


def dequantise(model: nn.Module) -> nn.Module:
    """A copy with plain linears that hold the dequantised weights."""
    model = copy.deepcopy(model)
    for name, linear in list(model.named_modules()):
        if isinstance(linear, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
            plain = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
            plain.weight.data = read_whole(frozen_weight(linear)).float()
            if linear.bias is not None:
                plain.bias.data = linear.bias.data.clone()
            model.set_submodule(name, plain)
    model.is_loaded_in_4bit = model.is_loaded_in_8bit = False
    return model


def pair(
    kind: str = "nf4-double", targets=ATTENTION, lora=None, model: nn.Module | None = None, **options
) -> tuple[nn.Module, nn.Module]:
    """A quantised model with adapters, and its twin with dequantised weights and the same adapters."""
    base = quantise(tiny_model(**options) if model is None else model, kind)
    twin = dequantise(base)
    return tuple(add_lora(model, targets, **(lora or {})).train() for model in (base, twin))
