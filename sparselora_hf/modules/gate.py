"""The exact saving ``activations``: ``act(gate) ⊙ up`` of gated MLPs in one function, where all channels are computed.

Projections are called as the modules that they are, so adapters, quantised weights and hooks keep their meaning. What
an MLP does between them is found by trying: one that does anything else is left alone.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..families import ModelFamily
from ..ops.activations import activation_kind
from ..ops.gate import gated_activation
from ..ops.seeded import seeded
from ..state import LayerLink
from ..views import MlpView, base_linear
from .classes import Patched, Patches, has_own_forward, link_of

__all__ = ["LeanMlp", "lean_mlps", "view_of"]


def view_of(mlp: nn.Module) -> MlpView:
    """View of a patched MLP. It is kept for the next call, and made anew where a part is another by then."""
    link = link_of(mlp)
    if link.view is None or not link.view.is_of(mlp, link.family):
        link.view = MlpView.of(mlp, link.family)
    return link.view


class LeanMlp(Patched):
    """Mixin of an MLP. It depends on no batch: recomputation meets it before the batch comes back."""

    traced = True

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """``[..., H]`` to ``[..., H]``."""
        return self.dense_forward(x, *args, **kwargs)

    def dense_forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """The same with all channels."""
        if torch.compiler.is_compiling() or args or kwargs or not (self.training and link_of(self).lean):
            return super().dense_forward(x, *args, **kwargs)
        view, kernels = view_of(self), link_of(self).state.config.kernels
        products = [module(x) for role, module in view.modules.items() if role != "down"]
        return view.down.module(_activations(view, products, kernels))


def _activations(view: MlpView, products: list[torch.Tensor], kernels: str) -> torch.Tensor:
    """``[..., N]`` from what the linears give that lead into an MLP."""
    kind = activation_kind(view.activation)
    if kind is None or len({product.dtype for product in products}) > 1:
        return view.combine(products if len(products) > 1 else products[0].chunk(2, -1))
    return gated_activation(products, kind, kernels)


def lean_mlps(mlps: Iterable[tuple[nn.Module, LayerLink]]) -> Patches:
    """Make gated MLPs lean, those that are sparse already where they compute all channels.

    Args:
        mlps: each with the link that it gets unless it has one.

    Returns:
        What undoes it.
    """
    patches = Patches()
    for mlp, link in mlps:
        if _fits(mlp, link):
            if not isinstance(mlp, LeanMlp):
                patches.add(mlp, LeanMlp, link)
            link_of(mlp).lean = True
    return patches


class _Given(nn.Module):
    """In the place of a projection: gives what it was made with, and enters what it was given into a log."""

    def __init__(self, y: torch.Tensor, log: list[tuple["_Given", torch.Tensor]]) -> None:
        super().__init__()
        self.y = y
        self.log = log

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.log.append((self, x))
        return self.y


def _fits(mlp: nn.Module, link: LayerLink) -> bool:
    """Whether an MLP's own forward is ``down(act(gate(x)) ⊙ up(x))``, with an activation that is known.

    It is run on two rows, in training mode, with given results in the place of its projections: no weight is read.
    """
    view = MlpView.of(mlp, link.family)
    if has_own_forward(mlp) or not link.family.is_gated or activation_kind(view.activation) is None:
        return False
    x, given = _rows_and_results(view)
    *products, closing = given.values()
    try:
        with torch.no_grad(), seeded(x.device, 0), _with_given(mlp, link.family, given):
            y = mlp.dense_forward(x) if isinstance(mlp, Patched) else mlp.forward(x)
            want = _activations(view, [product.y for product in products], link.state.config.kernels)
        called, inputs = zip(*closing.log, strict=True)
        tolerance = {"rtol": max(1e-5, 4 * torch.finfo(x.dtype).eps), "atol": 1e-5}
        once = list(called) == [*products, closing] and all(torch.equal(seen, x) for seen in inputs[:-1])
        return once and torch.allclose(inputs[-1], want, **tolerance) and torch.equal(y, closing.y)
    except Exception:  # whatever it is, the MLP is not what its family's row says
        return False


def _rows_and_results(view: MlpView) -> tuple[torch.Tensor, dict[str, _Given]]:
    """Two random rows, and random results of every linear for them, wide enough to meet a clamp."""
    down = base_linear(view.down.module)
    weight = next(iter((*down.parameters(), *down.buffers())))  # of some quantisers it has another name
    dtype = weight.dtype if weight.is_floating_point() and weight.itemsize > 1 else torch.float32
    generator, log = torch.Generator().manual_seed(0), []

    def draw(width: int) -> torch.Tensor:
        return torch.randn(2, width, generator=generator, device="cpu").mul_(10).to(weight.device, dtype)

    widths = {role: base_linear(module).out_features for role, module in view.modules.items()}
    return draw(view.hidden), {role: _Given(draw(width), log) for role, width in widths.items()}


@contextmanager
def _with_given(mlp: nn.Module, family: ModelFamily, given: dict[str, _Given]) -> Iterator[None]:
    """An MLP in training mode, with other modules in the place of its projections."""
    names = {role: getattr(family, role) for role in given}
    own = {name: getattr(mlp, name) for name in names.values()}
    modes = [(module, module.training) for module in mlp.modules()]
    try:
        for role, name in names.items():
            setattr(mlp, name, given[role])
        mlp.train()
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for name, module in own.items():
            setattr(mlp, name, module)
