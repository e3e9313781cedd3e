"""The decoder of a model, layer by layer, through the names of its family."""

import dataclasses
from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

from .config import SparseLoraConfig
from .families import ModelFamily
from .views import AttentionView, MlpView, part_of

__all__ = ["Layer", "causal_model", "decoder_layers", "language_decoder", "projections"]


def causal_model(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model inside a PEFT wrapper, or the model itself."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


def language_decoder(model: nn.Module) -> nn.Module:
    """The stack of decoder layers: of a vision-language model, its language tower."""
    return causal_model(model).get_decoder()


@dataclasses.dataclass
class Layer:
    """One decoder layer, its two parts and the sparsity asked for each.

    Args:
        number: counted from 0.
        name: name in the model.
        module: the layer.
        attention: its attention module, or what it has in its place.
        attends: whether that is an attention with projections.
        mlp: its MLP; in a mixture of experts the MLP that every token passes through, None where there is none.
        mlp_name: name of the MLP in the layer.
        experts: name of the experts in the layer, empty where it is no mixture.
        mlp_sparsity: sparsity asked for the MLP.
        attention_sparsity: sparsity asked for the attention.
    """

    number: int
    name: str
    module: nn.Module
    attention: nn.Module
    attends: bool
    mlp: nn.Module | None
    mlp_name: str
    experts: str
    mlp_sparsity: float
    attention_sparsity: float


def decoder_layers(model: nn.Module, config: SparseLoraConfig, family: ModelFamily) -> Iterator[Layer]:
    """The layers of a model's decoder, lowest first."""
    names = {id(module): name for name, module in model.named_modules()}
    modules = list(part_of(language_decoder(model), family, "layers"))
    mlp_sparsity, attention_sparsity = config.layer_sparsity(len(modules))
    for number, module in enumerate(modules):
        yield Layer(
            number,
            names[id(module)],
            module,
            *_attention_of(module, family),
            *_mlp_of(module, family),
            mlp_sparsity[number],
            attention_sparsity[number],
        )


def _attention_of(layer: nn.Module, family: ModelFamily) -> tuple[nn.Module, bool]:
    """What mixes the tokens of a layer, and whether it is an attention with projections."""
    if family.mixer and getattr(layer, family.attention, None) is None:
        return part_of(layer, family, "mixer"), False
    return part_of(layer, family, "attention"), family.has_projections


def _mlp_of(layer: nn.Module, family: ModelFamily) -> tuple[nn.Module | None, str, str]:
    """The MLP of a layer, its name, and the name of the layer's experts."""
    mlp = part_of(layer, family, "mlp")
    own = getattr(mlp, "original_module", mlp)  # inside what PEFT's `modules_to_save` trains as a whole
    children = dict(own.named_children())
    if family.experts not in children:
        beside = dict(layer.named_children()).get(family.experts_beside)
        return mlp, family.mlp, "" if beside is None else family.experts_beside
    shared = children.get(family.shared_mlp) if own is mlp else None
    return shared, f"{family.mlp}.{family.shared_mlp}", f"{family.mlp}.{family.experts}"


def projections(layer: Layer, family: ModelFamily) -> dict[str, nn.Module]:
    """Linears of a layer by role, as they stand in the model; those of experts are not among them."""
    mlp = MlpView.of(layer.mlp, family).modules if layer.mlp is not None else {}
    attention = AttentionView.of(layer.attention, family).modules if layer.attends else {}
    return {**mlp, **attention}
