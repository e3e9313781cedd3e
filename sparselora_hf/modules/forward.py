"""Hooks on the causal model: the token plan of a training forward, and dense forwards in between."""

import inspect

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING

from ..plan import TokenPlan
from ..state import SparseState

__all__ = ["ForwardHook"]

_UNKNOWN = (
    "SparseLoRA: a forward without a label for each token runs dense, since its context tokens are not known. For a "
    "sparse one call the whole model, and pass labels of the shape of input_ids."
)
_RESHAPED = (
    "SparseLoRA: the model has changed the length of the batch before its decoder, as some models do that replace one "
    "image or audio token by many states. The labels no longer match the tokens, so the batch runs dense. Let the "
    "processor write one token for every state."
)


class ForwardHook:
    """Pair of hooks around the model's forward.

    A training forward with `labels` starts a batch, unless the trainer began one already for its tokens. The labels
    are those of tokens, or of whole sequences where a classifier of transformers reads the state of one token. With
    any others a forward is dense. So is one without gradients, whatever the mode; the batch under way comes back after
    it, for recomputation.

    A user's loss may call the decoder by itself. The decoder is dense then, except on the tokens of a trainer's batch.
    It is dense as well where the model gives it a batch of another shape than that of the labels.
    """

    def __init__(self, state: SparseState) -> None:
        self.state = state

    def register(self, decoder: nn.Module, *models: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
        """Put both hooks on models of which one call passes a single one, and on their decoder, before any other hook.

        Returns:
            What removes them.
        """
        hooked = [(decoder, self.before_decoder), *((model, self.before) for model in models)]
        return [
            handle
            for module, before in hooked
            for handle in (
                module.register_forward_pre_hook(before, with_kwargs=True),
                module.register_forward_hook(self.after, always_call=True),
            )
        ]

    @torch.compiler.disable
    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Decide on the batch of this forward; where only its loss is read, let the head see labelled rows alone."""
        self.state.set_aside.append(self.state.batch)
        kwargs = _named(module, args, kwargs)
        if not module.training or not torch.is_grad_enabled():
            self._warn_in_evaluation_mode(module, kwargs)
            self.state.end()
        elif not self._takes_up_pinned(kwargs):
            self._begin(module, kwargs, loss_only=self.state.loss_only and not args and _shifts_labels(module))
            if self.state.head_rows is not None:
                return (), {**kwargs, "labels": self.state.batch.plan.unshifted_head[1]}
        return None

    @torch.compiler.disable
    def before_decoder(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Keep a decoder that is called by itself from the batch of another forward: nothing tells its labels."""
        is_inside = bool(self.state.set_aside)
        self.state.set_aside.append(self.state.batch)
        kwargs = _named(module, args, kwargs)
        learns = module.training and torch.is_grad_enabled()
        if is_inside or (learns and self._takes_up_pinned(kwargs)):
            self._leave_reshaped(kwargs)
            return
        self.state.end()
        if learns:
            self.state.warn_once(_UNKNOWN)

    @torch.compiler.disable
    def after(self, module: nn.Module, args: tuple, output: object) -> None:
        """Bring the batch back that a dense forward had set aside."""
        if not self.state.pinned:
            self.state.head_rows = None
        before = self.state.set_aside.pop() if self.state.set_aside else None
        if self.state.batch is None:
            self.state.batch = before

    def _leave_reshaped(self, kwargs: dict) -> None:
        """Forget a batch whose plan has other rows than the decoder is given, for recomputation too."""
        shape = _shape(kwargs)
        if self.state.batch is None or shape is None or shape == self.state.batch.plan.shape:
            return
        self.state.end()
        self.state.set_aside[:] = [None] * len(self.state.set_aside)
        self.state.warn_once(_RESHAPED)

    def _warn_in_evaluation_mode(self, module: nn.Module, kwargs: dict) -> None:
        """`from_pretrained` gives a model in evaluation mode, and PEFT's wrapper does not change that."""
        waits = self.state.enabled or self.state.calibration.gathers
        if waits and not module.training and torch.is_grad_enabled() and kwargs.get("labels") is not None:
            self.state.warn_once(
                "SparseLoRA: the model is in evaluation mode, where it is dense and nothing is learned for sparse "
                "steps. To train it call model.train() first, to evaluate it use torch.no_grad()."
            )

    def _takes_up_pinned(self, inputs: dict) -> bool:
        """Put the trainer's batch in hand again if these inputs are its own, and say whether they are."""
        pin = self.state.pinned_to
        if not self.state.pinned or pin is None:
            return self.state.pinned  # without a pin every forward is of that batch
        fits = pin.fits(inputs)
        if fits:
            self.state.batch = pin.batch
        return fits

    def _begin(self, module: nn.Module, kwargs: dict, loss_only: bool) -> None:
        labels, ids, pools = kwargs.get("labels"), kwargs.get("input_ids"), _pools(module)
        if labels is None or not (ids is not None if pools else _is_per_token(labels, kwargs)):
            self.state.end()
            self.state.warn_once(_UNKNOWN)
            return
        if not pools:
            plan = TokenPlan.of_inputs(kwargs, self.state.config.token_rule)
            routers, embeds = _balances_experts(module, kwargs), kwargs.get("inputs_embeds")
            leaf_inputs = embeds is not None and embeds.requires_grad
            loss_only = loss_only and not _records(module, kwargs) and "shift_labels" not in kwargs
            batch = self.state.begin(
                plan, labels.device, loss_only=loss_only, routers=routers, leaf_inputs=leaf_inputs
            )
            if "logits" in batch.savings:
                self.state.head_rows = batch.plan.unshifted_head[0]
            return
        pad_token_id = module.config.get_text_config().pad_token_id
        plan = TokenPlan.of_pooled(ids, kwargs.get("attention_mask"), pad_token_id)
        # nothing but the pooled states is made of the model's output, unless it records more
        self.state.begin(plan, labels.device, loss_only=not _records(module, kwargs))


def _balances_experts(model: nn.Module, kwargs: dict) -> bool:
    """Whether a forward tells what the routers of a mixture of experts say, of which a loss is made."""
    asked = kwargs.get("output_router_logits")
    return bool(getattr(model.config.get_text_config(), "output_router_logits", False) if asked is None else asked)


def _is_asked(model: nn.Module, kwargs: dict, name: str) -> bool:
    """Whether a forward is asked for one more output, by its arguments or else by the model's configuration."""
    asked = kwargs.get(name)
    return bool(getattr(model.config, name) if asked is None else asked)


def _records(model: nn.Module, kwargs: dict) -> bool:
    """Whether a forward gives states or attentions of all layers beside its logits."""
    return any(_is_asked(model, kwargs, name) for name in ("output_hidden_states", "output_attentions"))


def _pools(model: nn.Module) -> bool:
    """Whether a model reads one known token of each sequence, as transformers' classifiers do; others may read any."""
    return _has_forward_of(model, "ForSequenceClassification")


def _shifts_labels(model: nn.Module) -> bool:
    """Whether a model's loss holds each row of its logits against the label behind it and is made of nothing else.

    So does the `loss_function` that transformers gives causal models, with images too. Some of the latter
    write their loss out in place of it, and look at the attention mask; others may have been given one of one's own.
    """
    if not _has_forward_of(model, "ForCausalLM", "ForConditionalGeneration"):
        return False
    model = _inner(model)
    is_called = "loss_function" in inspect.unwrap(type(model).forward).__code__.co_names
    return is_called and model.loss_function is LOSS_MAPPING["ForCausalLM"]


def _has_forward_of(model: nn.Module, *kinds: str) -> bool:
    """Whether a model has the forward that transformers gives these kinds of models, and not one of others' making."""
    forward = type(_inner(model)).forward
    names = tuple(f"{kind}.forward" for kind in kinds)
    return forward.__qualname__.endswith(names) and forward.__module__.startswith("transformers.")


def _inner(model: nn.Module) -> PreTrainedModel:
    """The model inside PEFT's tuner, or the model itself."""
    return model if isinstance(model, PreTrainedModel) else model.model


def _is_per_token(labels: torch.Tensor, kwargs: dict) -> bool:
    """Whether there is a label for each token."""
    shape = _shape(kwargs)
    return labels.dim() == 2 if shape is None else labels.shape == shape


def _shape(kwargs: dict) -> torch.Size | None:
    """``[B, S]`` of a forward's tokens; None where it is given none."""
    ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    tokens = ids if ids is not None else embeds
    return None if tokens is None else tokens.shape[:2]


def _named(module: nn.Module, args: tuple, kwargs: dict) -> dict:
    """Arguments of a forward by name, those given by place too."""
    return {**dict(zip(inspect.signature(module.forward).parameters, args)), **kwargs} if args else kwargs  # noqa: B905
