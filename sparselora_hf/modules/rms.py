"""The exact saving ``norms``: RMSNorms of the decoder layers with a lean backward pass.

Which modules are RMSNorms, whether their weight counts from 0 or from 1, and where they round, is found by trying: a
norm of another formula, or one that is trained, is left alone.
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
    """``x / sqrt(mean(x²) + eps) · (weight + offset)``.

    Args:
        eps: as above.
        offset: as above.
        early: whether the normalised values are rounded before they meet the weight, or the product alone; None
            where neither gives a norm's very numbers.
    """

    eps: float
    offset: float
    early: bool | None

    def holds(self, norm: nn.Module) -> bool:
        """Whether a norm computes this."""
        weight = norm.weight.float()
        x = torch.randn(2, len(weight), generator=torch.Generator().manual_seed(0), device="cpu").to(
            weight.device, norm.weight.dtype
        )
        x[1] *= self.eps**0.5  # where eps shows
        normed, got = x.float() * (x.float().square().mean(-1, keepdim=True) + self.eps).rsqrt(), norm(x)
        if self.early is None:
            tolerance = {"rtol": max(1e-5, 4 * torch.finfo(x.dtype).eps), "atol": 1e-6}
            return torch.allclose(got.float(), normed * (weight + self.offset), **tolerance)
        rounded = normed.to(x.dtype).float() if self.early else normed
        return got.dtype == x.dtype and torch.equal(got, (rounded * (weight + self.offset)).to(x.dtype))


class _LeanNorm(Patched):
    """Mixin of an RMSNorm. It depends on no batch: recomputation meets it before the batch comes back."""

    traced = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., H]`` to ``[..., H]``."""
        if torch.compiler.is_compiling() or self.weight.requires_grad:
            return self.dense_forward(x)
        formula, kernels = link_of(self)
        # by mode, not by `torch.is_grad_enabled`: reentrant checkpointing runs the first of two equal passes without
        replaced = self.training and not self.overlaid
        early = formula.early if replaced else None
        return lean_rms_norm(x, self.dense_forward, self.weight, formula.offset, formula.eps, early, kernels)


def lean_norms(layers: Iterable[nn.Module], kind: type[nn.Module], eps: float, kernels: str) -> Patches:
    """Make the RMSNorms of a decoder's layers lean, those of queries and keys too.

    Args:
        layers: decoder layers.
        kind: class of the decoder's final norm, by which the others are known.
        eps: as the model's configuration has it.
        kernels: as in `SparseLoraConfig`.

    Returns:
        What undoes it.
    """
    patches = Patches()
    for layer in layers:
        with whole_weights(layer), torch.no_grad():
            for norm, formula in _lean(layer, kind, eps):
                patches.add(norm, _LeanNorm, (formula, kernels))
    return patches


def _lean(layer: nn.Module, kind: type[nn.Module], eps: float) -> Iterator[tuple[nn.Module, _Formula]]:
    """Frozen norms of a layer that are RMSNorms, each with its formula."""
    formulas = [_Formula(eps, offset, early) for early in (True, False, None) for offset in (0.0, 1.0)]
    for norm in [module for module in layer.modules() if type(module) is kind]:
        if [name for name, _ in norm.named_parameters()] == ["weight"] and not norm.weight.requires_grad:
            formula = next((formula for formula in formulas if formula.holds(norm)), None)
            if formula is not None:
                yield norm, formula
