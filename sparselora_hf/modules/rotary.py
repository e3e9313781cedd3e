"""The exact saving ``rotary``: rotary position embedding of queries and keys in one function.

A family's attention calls `apply_rotary_pos_emb` of its own file. An attention that takes part runs its family's own
code over a copy of that file's names, in which this one is exchanged: nothing but the instance changes. How a family
turns is found by trying: one that turns otherwise is left alone. What others put in the place of any name that the
code uses, when training starts or later, serves.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from types import CellType, CodeType, FunctionType
from typing import Any

import torch
from torch import nn

from ..ops.rotary import lean_rotary, turns
from .classes import Patched, Patches, has_own_forward, link_of

__all__ = ["LeanAttention", "lean_attentions"]

_NAME = "apply_rotary_pos_emb"
_NARROW = (torch.float32, torch.bfloat16, torch.float16)
_TYPES = (*itertools.product(_NARROW, repeat=2), (torch.float64, torch.float64))


@dataclasses.dataclass(frozen=True)
class _Rotation:
    """In the place of a family's function.

    Args:
        own: the family's.
        types: types of queries and of angles for which `lean_rotary` gives what `own` gives, bit for bit.
        kernels: as in `SparseLoraConfig`.
    """

    own: Callable
    types: frozenset[tuple[torch.dtype, torch.dtype]]
    kernels: str

    def __call__(self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args, **kwargs):
        plain = type(q) is type(k) is type(cos) is type(sin) is torch.Tensor and not (args or kwargs)
        if plain and (q.dtype, cos.dtype) in self.types and turns(q, k, cos, sin):
            return lean_rotary(q, k, cos, sin, self.kernels)
        return self.own(q, k, cos, sin, *args, **kwargs)


@dataclasses.dataclass(frozen=True)
class _Forward:
    """The forward of a class of attentions with another rotation.

    Args:
        own: the class's.
        lean: the same code with a `_Rotation`.
        scope: the names of its file.
        seen: those of them that the code uses, with what they stood for.
    """

    own: Callable
    lean: Callable
    scope: dict[str, Any]
    seen: dict[str, Any]

    @classmethod
    def of(cls, own: Callable, kernels: str) -> "_Forward | None":
        """None where it cannot be had, or a family turns in another way."""
        code = own
        while hasattr(code, "__wrapped__"):
            code = code.__wrapped__
        if not isinstance(code, FunctionType):
            return None
        scope = code.__globals__
        seen = {name: scope[name] for name in _names(code.__code__) & scope.keys()}
        if _NAME not in seen or _has_own_forward(seen[_NAME]):
            return None
        types = frozenset(pair for pair in _TYPES if _turns_halves(seen[_NAME], *pair))
        lean = _exchanged(own, _Rotation(seen[_NAME], types, kernels)) if types else None
        return lean and cls(own, lean, scope, seen)

    def serves(self, own: Callable) -> bool:
        """Whether everything is as it was."""
        if own is not self.own or _has_own_forward(self.seen[_NAME]):
            return False
        scope = self.scope
        for name, value in self.seen.items():  # noqa: SIM110 (a generator takes several times as long)
            if scope.get(name) is not value:
                return False
        return True


def _has_own_forward(function: Callable) -> bool:
    """Whether a function is a module whose `forward` others have exchanged, as kernels of the hub do."""
    return "forward" in getattr(function, "__dict__", ())


def _names(code: CodeType) -> set[str]:
    """Names that a function's code uses, its nested functions' too: globals and attributes."""
    return set(code.co_names).union(*(_names(part) for part in code.co_consts if isinstance(part, CodeType)))


def _turns_halves(own: Callable, dtype: torch.dtype, angles: torch.dtype) -> bool:
    """Whether a family's function is `lean_rotary` for these types."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    q, k = draw(2, 4, 5, 8).to(dtype), draw(2, 2, 5, 8).to(dtype)
    cos, sin = draw(2, 5, 8).to(angles), draw(2, 5, 8).to(angles)
    try:
        with torch.no_grad():
            pairs = zip(own(q, k, cos, sin), lean_rotary(q, k, cos, sin, "torch"), strict=True)
            return all(got.dtype is want.dtype and torch.equal(got, want) for got, want in pairs)
    except Exception:  # whatever it is, it is not what is looked for
        return False


def _exchanged(function: Callable, rotation: _Rotation) -> Callable | None:
    """A function with another rotation, its decorators kept; None where one of them keeps it out of sight."""
    if not isinstance(function, FunctionType):
        return None
    scope, cells = function.__globals__, function.__closure__
    inner = getattr(function, "__wrapped__", None)
    if inner is None:
        scope = {**scope, _NAME: rotation}
    else:
        lean = _exchanged(inner, rotation)
        places = [place for place, cell in enumerate(cells or ()) if _holds(cell, inner)]
        if lean is None or len(places) != 1:
            return None
        cells = (*cells[: places[0]], CellType(lean), *cells[places[0] + 1 :])
    made = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, cells)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _holds(cell: CellType, value: object) -> bool:
    try:
        return cell.cell_contents is value
    except ValueError:  # empty as yet
        return False


class _Link:
    """What attentions of one class know.

    Copies and pickles look for the forward anew: it is no function that a file could name.
    """

    def __init__(self, kernels: str) -> None:
        self.kernels = kernels
        self.forward: _Forward | None = None
        self.tried = False

    def find(self, own: Callable) -> _Forward | None:
        """The lean forward for a class's own, looked for once."""
        if not self.tried:
            self.forward, self.tried = _Forward.of(own, self.kernels), True
        return self.forward

    def __reduce__(self):
        return _Link, (self.kernels,)


class LeanAttention(Patched):
    """Mixin of an attention. It depends on no batch: recomputation meets it before the batch comes back."""

    traced = True

    def forward(self, *args, **kwargs):
        """As the family's."""
        if torch.compiler.is_compiling() or not self.training:
            return self.dense_forward(*args, **kwargs)
        own = self._dense_class.forward
        found = link_of(self).find(own)
        if found is None or not found.serves(own):
            return self.dense_forward(*args, **kwargs)
        return found.lean(self, *args, **kwargs)


def lean_attentions(attentions: Iterable[nn.Module], kernels: str) -> Patches:
    """Let attentions turn queries and keys in one function.

    Args:
        attentions: attention modules; those that turn in another way, or whose forward others have replaced, are left
            alone.
        kernels: as in `SparseLoraConfig`.

    Returns:
        What undoes it; it holds no module where all are left alone.
    """
    patches, links = Patches(), {}
    for attention in attentions:
        link = links.setdefault(type(attention), _Link(kernels))
        if not has_own_forward(attention) and link.find(type(attention).forward) is not None:
            patches.add(attention, LeanAttention, link)
    return patches
