"""Instances given a sparse class, and given back their own.

Parameters, names and `state_dict` keys do not move, and nothing but the instance changes. The classes are made on
demand and rebuilt by `__reduce_ex__`, so a patched model can be copied and pickled.

Others put a `forward` on instances: accelerate's hooks for `device_map`, Liger's kernels, kernels of the hub. It would
hide the sparse class's own; it is set aside and serves where all channels are computed.
"""

import functools
from typing import Any

import torch
from torch import nn

__all__ = ["Patched", "Patches", "has_own_forward", "link_of", "patch", "unpatch"]

_LINK = "_sparselora"
_FORWARD = "_sparselora_forward"


class Patched:
    """Mixin of all sparse classes; combined by `patch` with the class a module has."""

    _dense_class: type
    _mixin: type
    traced = False  # whether a compiler may look inside

    def dense_forward(self, *args, **kwargs):
        """What the module did before it was patched."""
        if _FORWARD in self.__dict__:
            return self.__dict__[_FORWARD](*args, **kwargs)
        return self._dense_class.forward(self, *args, **kwargs)

    @property
    def overlaid(self) -> bool:
        """Whether `dense_forward` is one that others put on the instance."""
        return _FORWARD in self.__dict__

    def __reduce_ex__(self, protocol):
        return _blank, (self._dense_class, self._mixin), self.__dict__.copy()


def _blank(dense_class: type, mixin: type) -> nn.Module:
    cls = _sparse_class(dense_class, mixin)
    return cls.__new__(cls)


@functools.cache
def _sparse_class(dense_class: type, mixin: type) -> type:
    # a compiler would trace row numbers and channel sets, and trace them anew for every batch
    forward = mixin.forward if mixin.traced else torch.compiler.disable(mixin.forward)
    members = {"forward": forward, "_dense_class": dense_class, "_mixin": mixin, "__module__": dense_class.__module__}
    return type(f"Sparse{dense_class.__name__}", (mixin, dense_class), members)


def patch(module: nn.Module, mixin: type, link: object) -> None:
    """Give a module the sparse variant of its class; `link` is what the mixin needs to know, mostly a `LayerLink`."""
    module.__class__ = _sparse_class(type(module), mixin)
    module.__dict__[_LINK] = link
    if "forward" in module.__dict__:
        module.__dict__[_FORWARD] = module.__dict__.pop("forward")


def unpatch(module: nn.Module) -> None:
    """Give a patched module its class back and take everything else away."""
    module.__class__ = module._dense_class
    del module.__dict__[_LINK]
    if _FORWARD in module.__dict__:
        module.__dict__["forward"] = module.__dict__.pop(_FORWARD)


def has_own_forward(module: nn.Module) -> bool:
    """Whether others have put a `forward` on this instance, before it was patched or after."""
    return "forward" in module.__dict__ or _FORWARD in module.__dict__


def link_of(module: nn.Module) -> Any:
    """The link that `patch` left on a module."""
    return module.__dict__[_LINK]


class Patches:
    """Modules that exact savings patched, beside the sparse ones."""

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []

    def add(self, module: nn.Module, mixin: type, link: object) -> None:
        """Patch one more."""
        patch(module, mixin, link)
        self.modules.append(module)

    def remove(self) -> None:
        """Give all of them their class back."""
        while self.modules:
            unpatch(self.modules.pop())
