"""`sparsify(model, config) -> handle`: patch one model by instance, and take every trace of it back.

Everything is checked before the first module is touched. Nothing global changes: two models in one process never
meet, and `SparseLoraHandle.restore` returns the model bit for bit.
"""

import dataclasses
import time

from torch import nn
from tqdm.auto import tqdm
from transformers.utils import logging

from .calibration import Calibration
from .config import SparseLoraConfig
from .cost import ModelShape
from .criteria import CRITERIA
from .decoder import Layer, causal_model, decoder_layers, projections
from .families import ModelFamily, find_family
from .handle import Decision, SparseLoraHandle
from .layers import kept_channels
from .meter import Meter, Part
from .modules.attention import AttentionHook
from .modules.branch import SlicedInput, SlicedOutput
from .modules.classes import Patched, patch
from .modules.detach import DetachHook
from .modules.forward import ForwardHook
from .modules.layout import TrainingLayout
from .modules.linear import SparseLinear
from .modules.lora import is_plain_lora
from .modules.mlp import SparseMlp
from .modules.norm import CompactHook
from .modules.recall import RecallHooks
from .ops.quant import frozen_weight, why_unreadable
from .placement import check_weights
from .state import LayerLink, SparseState
from .svd import LowRank
from .svd_cache import SvdCache
from .views import AttentionView, MlpView, base_linear
from .worth import Worth, attention_worth, mlp_worth

__all__ = ["check_model", "sparsify"]

_MLP, _ATTENTION = ("gate", "up", "down"), ("q", "k", "v", "o")


def check_model(model: nn.Module, config: SparseLoraConfig, family: ModelFamily | None = None) -> ModelFamily:
    """Check that a configuration fits a model, without touching it; its LoRA adapters are not looked at.

    Returns:
        The model's family.

    Raises:
        ValueError: unknown family, a layer that does not exist, a rank above a weight's, a weight that holds NaN or
            is not whole in this process.
    """
    base = causal_model(model)
    text_config = base.config.get_text_config()
    family = family or find_family(text_config.model_type)
    config.layer_sparsity(text_config.num_hidden_layers)
    smallest = min(text_config.hidden_size, text_config.intermediate_size)
    if config.is_sparse and CRITERIA[config.criterion].needs_factors and config.rank > smallest:
        raise ValueError(f"rank: {config.rank} exceeds {smallest}, the smallest side of a weight. Lower the rank.")
    check_weights(list(decoder_layers(model, config, family)), family)
    return family


def _check_adapters(model: nn.Module) -> None:
    from peft.tuners.lora import LoraLayer

    base = causal_model(model)
    if isinstance(base.get_output_embeddings(), LoraLayer):
        raise ValueError(
            "A LoRA adapter on lm_head is not supported: the loss is computed from the head's weight alone. "
            "Leave lm_head out of target_modules."
        )
    if not any(isinstance(module, LoraLayer) for module in model.modules()):
        raise ValueError(
            "The model carries no LoRA adapter: SparseLoRA speeds up LoRA fine-tuning. Pass "
            "peft_config=LoraConfig(...) to the trainer, or wrap the model with peft.get_peft_model first."
        )


def sparsify(
    model: nn.Module, config: SparseLoraConfig, *, family: ModelFamily | None = None, progress: bool | None = None
) -> SparseLoraHandle:
    """Patch a model that carries LoRA adapters for training with contextual sparsity.

    Sparsity starts switched off: see `SparseLoraHandle.set_enabled`. A training forward that is given `labels`
    takes its token plan from them.

    Args:
        model: a PEFT model, or a Hugging Face causal model with injected adapters.
        config: the configuration.
        family: description of a model family that is not in the table.
        progress: show a progress bar for the SVD; None shows one unless transformers' progress bars are off.

    Raises:
        ValueError: the configuration does not fit the model; the model is untouched then.
    """
    start = time.perf_counter()
    family = check_model(model, config, family)
    _check_adapters(model)
    if config.kernels == "triton":
        raise ValueError('kernels: "triton" is not available in this version. Use "auto" or "torch".')
    if any(isinstance(module, Patched) for module in model.modules()):
        raise ValueError("The model is sparse already. Call restore() on its handle first.")
    layers = list(decoder_layers(model, config, family))
    factors = _factors(layers, config, family, progress) if CRITERIA[config.criterion].needs_factors else {}
    calibration = Calibration(config)
    criterion = CRITERIA[config.criterion](factors, calibration, config)
    shape = ModelShape.from_config(causal_model(model).config)
    state = SparseState(config, criterion, calibration, Meter(shape))
    handle = SparseLoraHandle(model, state, family)
    try:
        handle._hooks.append(TrainingLayout(model))
        for layer in layers:
            handle._hooks += RecallHooks(state).register(layer.module, layer.attention)
            _patch_layer(handle, layer, last=layer.number == len(layers) - 1)
        base = causal_model(model)
        handle._hooks += ForwardHook(state).register(base)
        handle._hooks += CompactHook(state).register(getattr(base.base_model, family.norm))
        _detach_lowest(handle)
    except BaseException:
        handle.restore()
        raise
    handle.attach_seconds = time.perf_counter() - start
    return handle


def _detach_lowest(handle: SparseLoraHandle) -> None:
    """Let gradients end at the lowest layer with a trainable parameter, unless something below it is trained."""
    base = causal_model(handle.model)
    layers = getattr(base.base_model, handle.family.layers)
    lowest = next((layer for layer in layers if any(p.requires_grad for p in layer.parameters())), None)
    embeddings = base.get_input_embeddings().parameters()
    if "frozen_below" in handle.config.exact and lowest is not None and not any(p.requires_grad for p in embeddings):
        handle._hooks += DetachHook(handle.state).register(lowest)


def _why_dense(modules: dict[str, nn.Module]) -> str:
    """Reason why a part of a layer cannot be sparse; empty where it can."""
    for role, module in modules.items():
        base = base_linear(module)
        unreadable = why_unreadable(base)
        if unreadable:
            return f"{role} is {unreadable}"
        if base.weight.requires_grad:
            return f"the weight of {role} is trained"
        if role in _MLP and not is_plain_lora(module):
            return f"the adapter on {role} is not plain LoRA"
    return ""


def _factors(
    layers: list[Layer], config: SparseLoraConfig, family: ModelFamily, progress: bool | None
) -> dict[tuple[int, str], LowRank]:
    """SVD factors of every weight that a sparse module is scored by, in the weight's own type."""
    wanted = []
    for layer in layers:
        roles = (("gate", "up") if layer.mlp_sparsity else ()) + (("q", "k", "v") if layer.attention_sparsity else ())
        modules = projections(layer, family)
        linears = [((layer.number, role), base_linear(modules[role])) for role in roles]
        wanted += [(key, linear) for key, linear in linears if not why_unreadable(linear)]
    cache = SvdCache(config.cache_dir)
    show = logging.is_progress_bar_enabled() if progress is None else progress
    bar = tqdm(wanted, desc="SparseLoRA: SVD of the frozen weights", disable=not (show and wanted))
    factors = {}
    for key, linear in bar:
        weight = frozen_weight(linear)
        factors[key] = cache.factors(weight, config.rank, config.seed).to(weight.device, weight.dtype)
    return factors


def _patch_layer(handle: SparseLoraHandle, layer: Layer, last: bool) -> None:
    for part in (_attention_part(handle, layer), _mlp_part(handle, layer)):
        decision = _decide(handle, part)
        handle.decisions.append(decision)
        parts = handle.state.meter.mlp if part.links == ("mlp",) else handle.state.meter.attention
        parts.append(Part(part.width, decision.keep, part.worth if handle.config.dense_if_slower else None))
        if decision.outcome == "dense":
            continue
        keep, worth = (decision.keep, part.worth) if decision.outcome == "sparse" else (None, None)
        worth = worth if handle.config.dense_if_slower else None
        links = {r: LayerLink(handle.state, layer.number, r, keep, last, handle.family, worth) for r in part.links}
        if "mlp" in links:
            _patch(handle, part.module, SparseMlp, links["mlp"])
        else:
            _patch_attention(handle, part, links)


@dataclasses.dataclass(frozen=True)
class _Part:
    """Attention or MLP of one layer: its module and projections, the sparsity asked for and what it would gain."""

    name: str
    module: nn.Module
    projections: dict[str, nn.Module]
    links: tuple[str, ...]
    width: int
    keep: int
    worth: Worth


def _attention_part(handle: SparseLoraHandle, layer: Layer) -> _Part:
    view = AttentionView.of(layer.attention, handle.family)
    modules = {role: getattr(view, role) for role in _ATTENTION}
    query = base_linear(view.q)
    keep = kept_channels(view.layout.kv_width, layer.attention_sparsity)
    worth = attention_worth(query.in_features, view.layout, keep, query.weight.device.type)
    name = f"{layer.name}.{handle.family.attention}"
    links = (*_ATTENTION, "attention")
    return _Part(name, layer.attention, modules, links, view.layout.kv_width, keep, worth)


def _mlp_part(handle: SparseLoraHandle, layer: Layer) -> _Part:
    view, config = MlpView.of(layer.mlp, handle.family), handle.config
    modules = {role: getattr(view, role) for role in _MLP}
    gate = base_linear(view.gate)
    keep = kept_channels(view.width, layer.mlp_sparsity)
    rank = config.compensation_rank if config.compensation == "low_rank" else 0
    worth = mlp_worth(gate.in_features, view.width, keep, rank, gate.weight.device.type)
    return _Part(f"{layer.name}.{handle.family.mlp}", layer.mlp, modules, ("mlp",), view.width, keep, worth)


def _decide(handle: SparseLoraHandle, part: _Part) -> Decision:
    """What becomes of a part: sparse, exact savings alone, or dense."""
    otherwise = "exact" if handle.config.exact else "dense"
    obstacle = _why_dense(part.projections)
    if obstacle:
        return Decision(part.name, "dense", part.width, part.width, obstacle)
    if part.keep == part.width:
        return Decision(part.name, otherwise, part.width, part.width)
    if handle.config.dense_if_slower and not part.worth.ever:
        return Decision(part.name, otherwise, part.width, part.width, "would not be faster sparse")
    return Decision(part.name, "sparse", part.width, part.keep)


def _patch_attention(handle: SparseLoraHandle, part: _Part, links: dict[str, LayerLink]) -> None:
    for role, module in part.projections.items():
        _patch(handle, base_linear(module), SparseLinear, links[role])
        if handle.config.lora_branch == "sliced" and links[role].keep is not None:
            _slice_branch(handle, module, links[role])
    hook = AttentionHook(links["attention"])
    handle._hooks.append(part.module.register_forward_pre_hook(hook, with_kwargs=True))


def _slice_branch(handle: SparseLoraHandle, module: nn.Module, link: LayerLink) -> None:
    if isinstance(module, nn.Linear):
        return  # no adapter on this projection
    branch, mixin = (module.lora_A, SlicedInput) if link.role == "o" else (module.lora_B, SlicedOutput)
    for linear in branch.values():
        _patch(handle, linear, mixin, link)


def _patch(handle: SparseLoraHandle, module: nn.Module, mixin: type, link: LayerLink) -> None:
    patch(module, mixin, link)
    handle._patched.append(module)
