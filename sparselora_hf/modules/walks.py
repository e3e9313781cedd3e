"""Walks through all modules of a model, which a Trainer takes three times a step, in an eighth of the time.

`model.train()`, `model.parameters()` to clip gradients and `model.zero_grad()` visit some 1,700 modules of an 8B model
with adapters through recursive Python. Here the modules are remembered, and at every walk it is compared whether each
still has the children it had, so what others add, replace or take away is seen.
"""

import functools
from collections.abc import Iterator
from itertools import chain
from operator import attrgetter, methodcaller

from torch import nn
from transformers import PreTrainedModel

__all__ = ["QuickWalks"]

_children, _own_parameters, _training = attrgetter("_modules"), attrgetter("_parameters"), attrgetter("training")
_values = methodcaller("values")  # not `dict.values`: compressed-tensors puts mappings of its own in their place
_OWN = {"train", "parameters"}
_WALKS = ("modules", "named_modules", "named_children", "parameters", "named_parameters", "_named_members")


class QuickWalks:
    """Gives a model a `train` and a `parameters` that do what its own do; its `zero_grad` asks for the parameters.

    A model that others gave such methods, or a module in it, keeps them.

    Args:
        model: the model that a Trainer holds.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._known: _Walk | None = None
        if not _OWN & model.__dict__.keys():
            model.__dict__.update(train=self.train, parameters=self.parameters)

    def __getstate__(self) -> dict[str, object]:
        return {"model": self.model, "_known": None}  # of a copy

    def remove(self) -> None:
        """Leave the model its own."""
        if getattr(self.model.__dict__.get("train"), "__self__", None) is self:
            for name in _OWN:
                del self.model.__dict__[name]

    def train(self, mode: bool = True) -> nn.Module:
        """`Module.train`."""
        modules = self._walk()
        if modules is not None and _are_all(modules, mode):
            return self.model
        return type(self.model).train(self.model, mode)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """`Module.parameters`, in its order."""
        modules = self._walk() if recurse else None
        if modules is None:
            return type(self.model).parameters(self.model, recurse)
        every = chain.from_iterable(map(_values, filter(None, map(_own_parameters, modules))))
        return iter({id(parameter): parameter for parameter in every if parameter is not None}.values())

    def _walk(self) -> list[nn.Module] | None:
        """The modules in the order of `Module.modules`; None where one has walks of its own."""
        if self._known is None or not self._known.holds():
            self._known = _Walk(list(self.model.modules()))
        return self._known.modules if self._known.is_usual() else None


def _are_all(modules: list[nn.Module], mode: bool) -> bool:
    """Whether all are in training mode, or all in evaluation mode."""
    modes = map(_training, modules)
    return all(modes) if mode is True else mode is False and not any(modes)


class _Walk:
    """Modules as they were met."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules
        self._kinds, self._children = list(map(type, modules)), list(map(dict, map(_children, modules)))
        self._is_usual = all(map(_is_usual, set(self._kinds))) and not any(
            _OWN & m.__dict__.keys() for m in modules[1:]
        )
        self._pretrained = [module for module in modules if isinstance(module, PreTrainedModel)]

    def holds(self) -> bool:
        """Whether each module still has its class and its children."""
        return self._children == list(map(_children, self.modules)) and self._kinds == list(map(type, self.modules))

    def is_usual(self) -> bool:
        """Whether all are walked through as PyTorch does. Kernels of the hub are looked after in `train`."""
        return self._is_usual and not any(model.use_kernels for model in self._pretrained)


@functools.cache
def _is_usual(kind: type) -> bool:
    return kind.train in (nn.Module.train, PreTrainedModel.train) and all(
        getattr(kind, name) is getattr(nn.Module, name) for name in _WALKS
    )
