"""`sparsify(model, config) -> handle`: patch one model by instance, and take every trace of it back.

Everything is checked before the first module is touched. Nothing global changes: two models in one process never
meet, and `SparseLoraHandle.restore` returns the model bit for bit.
"""

import time
from collections.abc import Iterator

from peft import PeftModel
from torch import nn
from tqdm.auto import tqdm
from transformers.utils import logging

from .calibration import Calibration
from .config import SparseLoraConfig, check_settings
from .cost import ModelShape
from .counting import count_layers
from .criteria import CRITERIA
from .decoder import Layer, causal_model, decoder_layers, language_decoder
from .distributed import rank_and_world
from .factors import ScoredWeights
from .families import ModelFamily, find_family
from .graphs.series import Graphs
from .handle import Decision, SparseLoraHandle
from .kernels.runtime import blocker
from .meter import Meter, MeteredPart
from .modules.adapter import lean_adapters
from .modules.attention import AttentionHook
from .modules.branch import SlicedInput, SlicedOutput
from .modules.checkpointing import KeepAttention
from .modules.classes import Patched, patch
from .modules.detach import DetachHook
from .modules.forward import ForwardHook
from .modules.gate import lean_mlps
from .modules.graph import GraphedCheckpoints, graphed_layers
from .modules.layout import TrainingLayout
from .modules.linear import SparseLinear
from .modules.mask import MaskHook
from .modules.mlp import SparseMlp
from .modules.norm import CompactHook
from .modules.recall import RecallHooks
from .modules.rms import lean_norms
from .modules.rotary import lean_attentions
from .modules.walks import QuickWalks
from .parts import Part, attention_part, decide, mlp_part, stand_in_rank
from .placement import check_weights
from .selfcheck import difference
from .state import LayerLink, SparseState
from .versions import check_versions, peft_skips_model_hooks
from .views import AttentionView, MlpView, Projection, base_linear, part_of

__all__ = ["attach", "check_adapters", "check_model", "sparsify"]

logger = logging.get_logger(__name__)

_EXPERTS = "experts stay dense"


def check_model(model: nn.Module, config: SparseLoraConfig, family: ModelFamily | None = None) -> ModelFamily:
    """Check that a configuration fits a model, without touching it; its LoRA adapters are not looked at.

    Returns:
        The model's family.

    Raises:
        ValueError: no Hugging Face model, one that is sparse already or wrapped for several devices, unknown family, a
            layer that does not exist, a projection that is no linear, a configuration without the fields of a
            `ModelShape`, a rank above a scored weight's, a weight that holds NaN or is not whole in this process.
    """
    family = _check_config(model, config, family)
    layers = list(decoder_layers(model, config, family))
    check_weights(layers, family)
    ModelShape.from_config(causal_model(model).config, family)  # what the meter counts by
    if CRITERIA[config.criterion].needs_rank:
        normalised = family.normalises_queries(causal_model(model).config.get_text_config())
        for layer in layers:
            _check_rank(layer, config, family, normalised)
    return family


def _check_config(model: nn.Module, config: SparseLoraConfig, family: ModelFamily | None) -> ModelFamily:
    check_settings(config)
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise ValueError(
            f"The model is wrapped in {type(model).__name__}. Call sparsify before accelerator.prepare, or pass "
            "model.module."
        )
    if not hasattr(causal_model(model), "config"):
        raise ValueError(
            f"A {type(model).__name__} is no model of transformers or PEFT. If it contains one, pass that part."
        )
    if any(isinstance(module, Patched) for module in model.modules()):
        raise ValueError(
            "The model is sparse already. Call restore() on its handle first, which is sparse_handle of the earlier "
            "trainer, or what sparsify returned. If you have neither, load the model again. A copy of a sparse model "
            "has no handle of its own: copy the handle by copy.deepcopy(handle), and restore that; its model is the "
            "copy."
        )
    text_config = causal_model(model).config.get_text_config()
    family = family or find_family(text_config.model_type)
    config.layer_sparsity(text_config.num_hidden_layers)
    return family


def _check_rank(layer: Layer, config: SparseLoraConfig, family: ModelFamily, normalised: bool) -> None:
    """Refuse a rank above that of a weight by which channels are scored: key and value are the narrowest."""
    parts = [attention_part(layer, family, config, normalised)]
    if layer.mlp is not None:
        parts.append(mlp_part(layer, family, config))
    for part in parts:
        is_sparse = part.keep < part.width and (part.worth.ever or not config.dense_if_slower)
        if is_sparse and config.rank > min(part.hidden, part.width):
            raise ValueError(
                f"rank: {config.rank} exceeds {min(part.hidden, part.width)}, the smallest side of a weight of "
                f"{part.name}. Lower the rank."
            )


def check_adapters(model: nn.Module) -> None:
    """Check that a model carries LoRA adapters, none of them on its head.

    Raises:
        ValueError: it does not.
    """
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
        progress: show a progress bar for the SVD, on rank 0; None shows it unless transformers' progress bars are off.

    Raises:
        ImportError: a library whose version is not supported.
        TypeError: no `SparseLoraConfig`.
        ValueError: the configuration does not fit the model; the model is untouched then.
    """
    check_versions("torch", "transformers", "peft", "accelerate")
    return attach(model, config, check_model(model, config, family), progress)


def attach(
    model: nn.Module, config: SparseLoraConfig, family: ModelFamily, progress: bool | None = None
) -> SparseLoraHandle:
    """`sparsify` for a model whose weights have been through `check_model`: a pass over all of them is saved."""
    start = time.perf_counter()
    _check_config(model, config, family)
    check_adapters(model)
    obstacle = blocker(causal_model(model).get_input_embeddings().weight.device) if config.kernels == "triton" else ""
    if obstacle:
        raise ValueError(
            f'kernels: "triton" is not available: {obstacle}. Use "auto", which takes Triton where it is.'
        )
    text_config = causal_model(model).config.get_text_config()
    normalised = family.normalises_queries(text_config)
    layers = list(decoder_layers(model, config, family))
    plans = [(layer, *plan) for layer in layers for plan in _plan(layer, config, family, normalised)]
    scored = ScoredWeights(config)
    if CRITERIA[config.criterion].needs_factors:
        _factor(scored, plans, config, family, progress)
    calibration = Calibration(config)
    criterion = CRITERIA[config.criterion](scored.factors, calibration, config)
    shape = count_layers(ModelShape.from_config(causal_model(model).config, family), model, family)
    meter = Meter(shape, stand_in_rank(config))
    handle = SparseLoraHandle(model, SparseState(config, criterion, calibration, meter), family, scored)
    try:
        handle._hooks += [TrainingLayout(model), QuickWalks(model)]
        handle._hooks += ForwardHook(handle.state).register(language_decoder(model), *_entrances(model))
        attentions = [layer.attention for layer in layers]
        handle._hooks += MaskHook(handle.state).register(language_decoder(model))
        handle._hooks += RecallHooks(handle.state).register(language_decoder(model), attentions)
        for layer, part, decision in plans:
            _patch_part(handle, layer, part, decision, last=layer.number == len(layers) - 1)
        norm = part_of(language_decoder(model), family, "norm")
        handle._hooks += CompactHook(handle.state).register(norm, layers[-1].module)
        _detach_lowest(handle)
        _keep_averages(handle)
        _make_lean(handle, layers)
        _keep_attention(handle)
        _record(handle, layers)
    except BaseException:
        handle.restore()
        raise
    handle.attach_seconds = time.perf_counter() - start
    return handle


def _plan(
    layer: Layer, config: SparseLoraConfig, family: ModelFamily, normalised: bool
) -> Iterator[tuple[Part | None, Decision]]:
    """What becomes of each part of a layer; experts are no part, but the report names them."""
    attention = attention_part(layer, family, config, normalised)
    yield attention, decide(attention, config)
    if layer.mlp is not None:
        mlp = mlp_part(layer, family, config)
        yield mlp, decide(mlp, config)
    if layer.experts:
        yield None, Decision(f"{layer.name}.{layer.experts}", "dense", 0, 0, _EXPERTS)


def _entrances(model: nn.Module) -> list[nn.Module]:
    """Modules whose hooks a forward meets: the causal model's, and PEFT's tuner's where it passes by the model's."""
    tuner = [model.base_model] if isinstance(model, PeftModel) and peft_skips_model_hooks() else []
    return [causal_model(model), *tuner]


def _factor(
    scored: ScoredWeights,
    plans: list[tuple[Layer, Part | None, Decision]],
    config: SparseLoraConfig,
    family: ModelFamily,
    progress: bool | None,
) -> None:
    """SVD factors of every weight that a sparse module is scored by."""
    wanted: list[tuple[tuple[int, str], Projection]] = []
    for layer, part, decision in plans:
        if decision.outcome == "sparse":
            view = MlpView.of(layer.mlp, family) if part.is_mlp else AttentionView.of(layer.attention, family)
            roles = view.inputs if "mlp" in part.kinds or "qk" in part.kinds else ("v",)
            wanted += [((layer.number, role), view.inputs[role]) for role in roles]
    show = logging.is_progress_bar_enabled() if progress is None else progress
    show = bool(show and wanted) and rank_and_world()[0] == 0
    bar = tqdm(wanted, desc="SparseLoRA: SVD of the frozen weights", disable=not show)
    for key, projection in bar:
        scored.follow(*key, projection.weight)


def _patch_part(handle: SparseLoraHandle, layer: Layer, part: Part | None, decision: Decision, last: bool) -> None:
    """Patch one part, unless it is to stay dense or turns out not to be itself at sparsity 0."""
    if decision.outcome != "dense":
        patched, hooks = len(handle._patched), len(handle._hooks)
        _give_classes(handle, layer, part, decision, last)
        reason = difference(handle.state, layer.number, part, handle.family)
        if reason:
            logger.warning(f"SparseLoRA: {part.name} stays dense: {reason}.")
            handle.undo(patched, hooks)
            decision = Decision(part.name, "dense", part.width, part.width, reason)
    handle.decisions.append(decision)
    handle.state.last_layer_is_sparse |= last and decision.outcome == "sparse"
    meter, worth = handle.state.meter, part.worth if part and handle.config.dense_if_slower else None
    if part is None and layer.mlp is not None:
        return  # counted as the MLP beside the experts
    figures = MeteredPart(decision.width, decision.keep, worth)
    (meter.attention if part and not part.is_mlp else meter.mlp).append(figures)


def _give_classes(handle: SparseLoraHandle, layer: Layer, part: Part, decision: Decision, last: bool) -> None:
    sparse = decision.outcome == "sparse"
    worth = part.worth if sparse and handle.config.dense_if_slower else None

    def link(role: str) -> LayerLink:
        drops = sparse and not (role in ("q", "k") and "qk" not in part.kinds)
        keep = decision.keep if drops else None
        return LayerLink(handle.state, layer.number, role, keep, last, handle.family, worth)

    if part.is_mlp:
        _patch(handle, part.module, SparseMlp, link("mlp"))
        return
    for role, module in part.modules.items():
        _patch(handle, base_linear(module), SparseLinear, link(role))
        if handle.config.lora_branch == "sliced" and link(role).keep is not None:
            _slice_branch(handle, module, link(role))
    hook = AttentionHook(link("attention"), part.kinds)
    handle._hooks.append(part.module.register_forward_pre_hook(hook, with_kwargs=True))


def _slice_branch(handle: SparseLoraHandle, module: nn.Module, link: LayerLink) -> None:
    if isinstance(module, nn.Linear):
        return  # no adapter on this projection
    branch, mixin = (module.lora_A, SlicedInput) if link.role == "o" else (module.lora_B, SlicedOutput)
    for name, linear in branch.items():
        # DoRA sends an identity through the branch, whose rows are no tokens; AdaLoRA has bare matrices
        if isinstance(linear, nn.Linear) and name not in module.lora_variant:
            _patch(handle, linear, mixin, link)


def _patch(handle: SparseLoraHandle, module: nn.Module, mixin: type, link: LayerLink) -> None:
    patch(module, mixin, link)
    handle._patched.append(module)


def _detach_lowest(handle: SparseLoraHandle) -> None:
    """Let gradients end at the lowest layer with a trainable parameter, unless something below it is trained."""
    if "frozen_below" not in handle.config.exact:
        return
    decoder = language_decoder(handle.model)
    layers = part_of(decoder, handle.family, "layers")
    lowest = next((layer for layer in layers if any(p.requires_grad for p in layer.parameters())), None)
    below = _trained_below(handle.model, layers, part_of(decoder, handle.family, "norm"))
    if below:
        handle.state.withheld["frozen_below"] = f"{below} is trained and lies below the decoder layers"
    elif lowest is not None:
        handle._hooks += DetachHook(handle.state).register(lowest)


def _keep_averages(handle: SparseLoraHandle) -> None:
    """VeLoRA compresses what an adapter reads by its average over all positions: none of them may be left out."""
    if any(hasattr(module, "lora_velora_embed") for module in handle.model.modules()):
        names = {"last_layer", "padding"} & set(handle.config.exact)
        handle.state.withheld.update(dict.fromkeys(sorted(names), "VeLoRA adapters average over all positions"))


def _make_lean(handle: SparseLoraHandle, layers: list[Layer]) -> None:
    """Activations, norms, adapters and rotations of the layers in fewer passes over memory."""
    if "activations" in handle.config.exact:
        mlps = [(layer.number, layer.mlp) for layer in layers if layer.mlp is not None]
        links = ((mlp, LayerLink(handle.state, number, "mlp", None, False, handle.family)) for number, mlp in mlps)
        handle._hooks.append(lean_mlps(links))
    if "norms" in handle.config.exact:
        kind = type(part_of(language_decoder(handle.model), handle.family, "norm"))
        config = causal_model(handle.model).config.get_text_config().to_dict()
        eps = config.get("rms_norm_eps") or config.get("norm_eps")
        modules = [layer.module for layer in layers] if eps else []
        handle._hooks.append(lean_norms(modules, kind, eps, handle.config.kernels))
    if "adapters" in handle.config.exact:
        views = (AttentionView.of(layer.attention, handle.family) for layer in layers if layer.attends)
        handle._hooks.append(lean_adapters(view.modules for view in views))
    if "rotary" in handle.config.exact:
        patches = lean_attentions((layer.attention for layer in layers), handle.config.kernels)
        handle._hooks.append(patches)
        if not patches.modules:
            handle.state.withheld["rotary"] = (
                "the attention rotates its heads in another way, or by code that cannot be read"
            )


def _keep_attention(handle: SparseLoraHandle) -> None:
    """Attention's results kept for recomputation, on a CPU."""
    if "recomputation" not in handle.config.exact:
        return
    if handle.device.type == "cpu":
        handle._hooks += KeepAttention(handle.state, handle.family).register(language_decoder(handle.model))
    else:
        handle.state.withheld["recomputation"] = "on a GPU it would save little time and cost memory"


def _record(handle: SparseLoraHandle, layers: list[Layer]) -> None:
    """CUDA graphs of the layers that are the same for every batch: what the last one computes follows its labels."""
    if not handle.config.cuda_graphs:
        return
    obstacle = 'criterion "random" draws on the host' if handle.config.criterion == "random" else ""
    fit = [] if obstacle else [layer for layer in layers[:-1] if layer.attends and not layer.experts]
    if not fit:
        reason = obstacle or "there is no layer but the last, and those with experts or without attention"
        logger.warning(f"SparseLoRA: cuda_graphs is of no effect: {reason}.")
        return
    handle.state.graphs = Graphs()
    handle._hooks.append(graphed_layers(handle.state, [(layer.number, layer.module) for layer in fit]))
    handle._hooks += GraphedCheckpoints(handle.state, handle.family).register(language_decoder(handle.model))


def _trained_below(model: nn.Module, layers: nn.Module, norm: nn.Module) -> str:
    """Name of a trainable parameter that feeds the decoder layers; empty where there is none."""
    base = causal_model(model)
    above = [layers, norm, *(child for child in base.children() if child is not base.base_model)]  # and the heads
    not_below = {id(p) for module in above for p in module.parameters()}
    not_below -= {id(p) for p in base.get_input_embeddings().parameters()}  # a tied head is both
    names = (name for name, p in base.named_parameters() if p.requires_grad and id(p) not in not_below)
    return next(names, "")
