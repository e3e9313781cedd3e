"""What recordings of a layer depend on: the form of a batch and of a layer's arguments, and what the layer is."""

import itertools
from collections.abc import Callable, Hashable, Iterator
from operator import attrgetter, itemgetter, methodcaller
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as hooks_of_all

from .recording import has_waited

__all__ = ["Call", "NotNowError", "Standing", "UnfitError", "form_of_batch"]

_CONSTANTS = (type(None), bool, int, float, str, torch.dtype)
_BATCH = object()  # stands for the batch among a layer's arguments


class UnfitError(Exception):
    """Why a call is not recorded, or a recording does not serve."""


class NotNowError(UnfitError):
    """The same where another call may be."""


def form_of_batch(batch: Any) -> Hashable:
    """What recordings depend on in an `ActiveBatch`.

    From the numbers of context and output rows those of all others follow; the last layer, whose rows follow the
    labels, is not recorded.
    """
    plan = batch.plan
    return plan.shape, len(plan.context), len(plan.output), plan.groups, batch.sparse, batch.savings


class Call:
    """A layer's call, taken apart.

    Args:
        layer: the layer.
        forward: its own.
        args: what it is given by place.
        kwargs: what it is given by name.
        batch: the batch in hand.
        is_checkpointed: whether its backward runs its forward again.

    Attributes:
        hidden: hidden states.
        tensors: the other tensors among the arguments, whose values may differ from batch to batch.
        is_checkpointed: as above.
        form: what a recording depends on besides.

    Raises:
        UnfitError: it cannot be recorded.
    """

    def __init__(
        self,
        layer: nn.Module,
        forward: Callable,
        args: tuple,
        kwargs: dict[str, Any],
        batch: Any,
        is_checkpointed: bool,
    ) -> None:
        self.layer, self.is_checkpointed = layer, is_checkpointed
        self._forward, self._args, self._kwargs = forward, args, kwargs
        self._others = {name: _BATCH if value is batch else value for name, value in kwargs.items()}
        self.hidden = args[0] if args else self._others.pop("hidden_states", None)
        if len(args) > 1 or not isinstance(self.hidden, torch.Tensor):
            raise UnfitError("it is given more than hidden states by place")
        if self.hidden.device != batch.plan.context.device or not self.hidden.is_contiguous():
            raise UnfitError("its hidden states are on another device, or a view")
        self.tensors: list[torch.Tensor] = []
        of_hidden = self.hidden.shape, self.hidden.dtype, self.hidden.requires_grad
        of_others = _form(tuple(self._others.items()), self.tensors)
        self.form = of_hidden, of_others, _form_of_modes(layer, is_checkpointed)

    def check(self) -> None:
        """Look closer before it is recorded: at the layer, and whether the host has to wait in it."""
        _check_layer(self.layer)
        if has_waited(lambda: self._forward(*self._args, **self._kwargs)):
            raise UnfitError("it waits for the device, to read a number or a size")

    def on(self, hidden: torch.Tensor, tensors: list[torch.Tensor], batch: Any) -> Any:
        """The layer's result for other hidden states, tensors and batch."""
        places = iter(tensors)
        others = {name: _rebuilt(value, places, batch) for name, value in self._others.items()}
        return self._forward(hidden, **others)


def _form_of_modes(layer: nn.Module, is_checkpointed: bool) -> Hashable:
    if getattr(layer, "gradient_checkpointing", False) and not is_checkpointed:
        raise UnfitError("it is checkpointed, and not by gradient_checkpointing_kwargs={'use_reentrant': False}")
    if not layer.training or not torch.is_grad_enabled():
        raise UnfitError("it is not in training")
    if hooks_of_all._global_forward_hooks or hooks_of_all._global_forward_pre_hooks:
        raise UnfitError("there are hooks on all modules")
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if torch.is_anomaly_enabled() or (top is not None and top(True) is not None):
        raise UnfitError("others see what is saved for backward")
    return torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"), is_checkpointed


def _form(value: object, tensors: list[torch.Tensor]) -> Hashable:
    """What a recording depends on in an argument; its tensors are collected."""
    if isinstance(value, torch.Tensor):
        if value.requires_grad:
            raise UnfitError("an argument has a gradient")
        tensors.append(value)
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, tuple):
        return tuple(_form(part, tensors) for part in value)
    if isinstance(value, _CONSTANTS) or value is _BATCH:
        return value
    kind = type(value).__name__
    remedy = " (model.config.use_cache = False spares it)" if kind.endswith("Cache") else ""
    raise UnfitError(f"it is given a {kind}{remedy}")


def _rebuilt(value: object, places: Iterator[torch.Tensor], batch: Any) -> object:
    if isinstance(value, torch.Tensor):
        return next(places)
    if isinstance(value, tuple):
        return tuple(_rebuilt(part, places, batch) for part in value)
    return batch if value is _BATCH else value


class Standing:
    """What a recording of a layer takes for granted of its modules: numbers they keep, hooks, adapters, addresses."""

    def __init__(self, layer: nn.Module) -> None:
        self._modules = list(layer.modules())
        self._named = list(map(vars, self._modules))
        self._numbers = list(map(_getter, self._named))
        self._adapters = [module for module in self._modules if hasattr(module, "lora_A")]
        self._children = list(map(dict, map(_CHILDREN, self._modules)))
        self._facts = self._look()

    def holds(self) -> bool:
        """Whether all is as it was."""
        return self._children == list(map(_CHILDREN, self._modules)) and self._facts == self._look()

    def _look(self) -> tuple[list, ...]:
        own = itertools.chain.from_iterable(map(_VALUES, map(_OWN, self._modules)))
        hooks = [list(map(len, map(kind, self._modules))) for kind in _HOOKS]
        adapters = [
            (tuple(a.active_adapters), a.disable_adapters, tuple(a.merged_adapters), tuple(a.scaling.items()))
            for a in self._adapters
        ]
        addresses = [(p.data_ptr(), p.requires_grad) for p in own if p is not None]
        numbers = [get(named) for get, named in zip(self._numbers, self._named, strict=True)]
        replaced = ["forward" in named for named in self._named]
        return numbers, replaced, hooks, adapters, addresses


def _getter(named: dict[str, Any]) -> itemgetter:
    """Takes the plain attributes out of a module's own: its mode, a dropout's probability, the scale of attention."""
    return itemgetter(*(name for name, value in named.items() if isinstance(value, (bool, int, float, str))))


_CHILDREN, _OWN = map(attrgetter, ("_modules", "_parameters"))
_HOOKS = [
    attrgetter(f"_{kind}") for kind in ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
]
_VALUES = methodcaller("values")


def _check_layer(layer: nn.Module) -> None:
    """Refuse a layer in which others look on, who would not be told of a replay, or that is out of the ordinary.

    Raises:
        UnfitError: it is.
    """
    if layer._forward_hooks or hasattr(layer, "_get_fsdp_state"):
        raise UnfitError("others are given what it gives, or take its parameters apart")
    for name, module in layer.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        # before the layer itself they are called at a replay, too
        if name and not (all(map(_is_ours, hooks)) and not module._backward_hooks | module._backward_pre_hooks):
            raise UnfitError(f"{name} has hooks")
        adapters = getattr(module, "lora_A", None)
        if adapters is not None and (not isinstance(adapters, nn.ModuleDict) or module.lora_variant):
            raise UnfitError(f"{name} has an adapter that is no plain LoRA")
    for name, parameter in layer.named_parameters():
        if type(parameter) is not nn.Parameter or not parameter.is_contiguous() or not parameter.is_floating_point():
            raise UnfitError(f"{name} is quantised, or spread over processes")


def _is_ours(hook: Callable) -> bool:
    return str(getattr(hook, "__module__", "")).partition(".")[0] == __package__.partition(".")[0]
