"""The exact saving ``norms``: RMSNorms of the decoder layers with a lean backward pass.

Which modules are RMSNorms, and whether their weight counts from 0 or from 1, is found by trying: a norm of another
formula, or one that is trained, is left alone.
"""

import dataclasses
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from ..distributed import whole_weights
from ..ops.rms import lean_rms_norm
from .classes import Patched, Patches, link_of

__all__ = ["lean_norms"]


@dataclasses.dataclass(frozen=True)
class _Formula:
    """``x / sqrt(mean(x²) + eps) · (weight + offset)``."""

    eps: float
    offset: float

    def holds(self, norm: nn.Module) -> bool:
        """Whether a norm computes this."""
        weight = norm.weight.float()
        x = torch.randn(2, len(weight), generator=torch.Generator().manual_seed(0)).to(
            weight.device, norm.weight.dtype
        )
        x[1] *= self.eps**0.5  # where eps shows
        inverse = (x.float().square().mean(-1, keepdim=True) + self.eps).rsqrt()
        want, got = x.float() * inverse * (weight + self.offset), norm(x).float()
        return torch.allclose(got, want, rtol=max(1e-5, 4 * torch.finfo(x.dtype).eps), atol=1e-6)


class _LeanNorm(Patched):
    """Mixin of an RMSNorm. It depends on no batch: recomputation meets it before the batch comes back."""

    traced = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., H]`` to ``[..., H]``."""
        if torch.compiler.is_compiling() or self.weight.requires_grad:
            return self.dense_forward(x)
        formula = link_of(self)
        return lean_rms_norm(x, self.dense_forward, self.weight, formula.offset, formula.eps)


def lean_norms(layers: Iterable[nn.Module], kind: type[nn.Module], eps: float) -> Patches:
    """Make the RMSNorms of a decoder's layers lean, those of queries and keys too.

    Args:
        layers: decoder layers.
        kind: class of the decoder's final norm, by which the others are known.
        eps: as the model's configuration has it.

    Returns:
        What undoes it.
    """
    patches = Patches()
    for layer in layers:
        with whole_weights(layer), torch.no_grad():
            for norm, formula in _lean(layer, kind, eps):
                patches.add(norm, _LeanNorm, formula)
    return patches


def _lean(layer: nn.Module, kind: type[nn.Module], eps: float) -> Iterator[tuple[nn.Module, _Formula]]:
    """Frozen norms of a layer that are RMSNorms, each with its formula."""
    formulas = [_Formula(eps, offset) for offset in (0.0, 1.0)]
    for norm in [module for module in layer.modules() if type(module) is kind]:
        if [name for name, _ in norm.named_parameters()] == ["weight"] and not norm.weight.requires_grad:
            formula = next((formula for formula in formulas if formula.holds(norm)), None)
            if formula is not None:
                yield norm, formula
