"""What the layers of a model hold, counted in its modules: the shape by which the cost of a step is computed."""

import dataclasses

from torch import nn

from .config import SparseLoraConfig
from .decoder import Layer, decoder_layers
from .families import ModelFamily
from .shapes import LayerShape, ModelShape
from .views import AttentionView, MlpView, base_linear

__all__ = ["count_layers"]


def count_layers(shape: ModelShape, model: nn.Module, family: ModelFamily) -> ModelShape:
    """The shape of a model with what each of its layers has.

    Args:
        shape: what its configuration gives. How many experts a token passes through is known from there alone.
        model: the model, or its decoder; its weights may be on the meta device.
        family: its row.
    """
    layers = decoder_layers(model, SparseLoraConfig(), family)
    own = tuple(_layer_shape(layer, shape, family) for layer in layers)
    same = own[0] if len(set(own)) == 1 else None
    return dataclasses.replace(shape, **vars(same)) if same else dataclasses.replace(shape, own=own)


def _layer_shape(layer: Layer, shape: ModelShape, family: ModelFamily) -> LayerShape:
    experts = shape.intermediate - shape.droppable
    if layer.mlp is None:  # no MLP beside the experts, or all of it is trained
        mlp = LayerShape(shape.intermediate, 0)
    else:
        width = MlpView.of(layer.mlp, family).width
        mlp = LayerShape(width + experts, width) if layer.experts else LayerShape(width)
    if layer.attends:
        view = AttentionView.of(layer.attention, family)
        queries = view.layout.heads * view.layout.head_dim
        gates = base_linear(view.modules["q"]).out_features - queries if "q" in view.modules else 0
        return dataclasses.replace(mlp, gates=gates)
    core = shape.core if layer.attention is getattr(layer.module, family.attention, None) else 0
    return dataclasses.replace(mlp, linears=_linears(layer.attention), core=core)


def _linears(module: nn.Module) -> tuple[tuple[int, int], ...]:
    """Inputs and outputs of the linears in a module, without those that PEFT has put there."""
    linears = (
        part
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear) and "lora_" not in name and "modules_to_save" not in name
    )
    return tuple((linear.in_features, linear.out_features) for linear in linears)
