"""Walks through all modules of a model, which a Trainer takes three times a step, in a tenth of the time.

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

_children, _own_parameters = attrgetter("_modules"), attrgetter("_parameters")
_training, _values = attrgetter("training"), methodcaller("values")
_WALKS = ("modules", "named_modules", "named_children", "parameters", "named_parameters", "_named_members")


class QuickWalks:
    """Gives a model a `train` and a `parameters` that do what its own do; its `zero_grad` asks for the parameters.

    Args:
        model: the model that a Trainer holds.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._known: _Walk | None = None
        model.__dict__["train"] = self.train
        model.__dict__["parameters"] = self.parameters

    def __getstate__(self) -> dict[str, object]:
        return {"model": self.model, "_known": None}  # of a copy

    def remove(self) -> None:
        """Leave the model its own."""
        for name in ("train", "parameters"):
            self.model.__dict__.pop(name, None)

    def train(self, mode: bool = True) -> nn.Module:
        """`Module.train`."""
        modules = self._walk()
        if modules is None or any(training is not mode for training in map(_training, modules)):
            return type(self.model).train(self.model, mode)
        return self.model

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """`Module.parameters`, in its order."""
        modules = self._walk() if recurse else None
        if modules is None:
            return type(self.model).parameters(self.model, recurse)
        every = chain.from_iterable(map(_values, map(_own_parameters, modules)))
        return iter({id(parameter): parameter for parameter in every if parameter is not None}.values())

    def _walk(self) -> list[nn.Module] | None:
        """The modules in the order of `Module.modules`; None where one has walks of its own."""
        if self._known is None or not self._known.holds():
            self._known = _Walk(list(self.model.modules()))
        return self._known.modules if self._known.is_usual() else None


class _Walk:
    """Modules as they were met."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules
        self._kinds, self._children = list(map(type, modules)), self._met()
        self._is_usual = all(map(_is_usual, set(self._kinds)))
        self._pretrained = [module for module in modules if isinstance(module, PreTrainedModel)]

    def _met(self) -> list[nn.Module | None]:
        return list(chain.from_iterable(map(_values, map(_children, self.modules))))

    def holds(self) -> bool:
        """Whether each module still has its class and its children."""
        return self._children == self._met() and self._kinds == list(map(type, self.modules))

    def is_usual(self) -> bool:
        """Whether all are walked through as PyTorch does. Kernels of the hub are looked after in `train`."""
        return self._is_usual and not any(model.use_kernels for model in self._pretrained)


@functools.cache
def _is_usual(kind: type) -> bool:
    return kind.train in (nn.Module.train, PreTrainedModel.train) and all(
        getattr(kind, name) is getattr(nn.Module, name) for name in _WALKS
    )
