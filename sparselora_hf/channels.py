"""Channel sets: which channels of a layer a batch keeps, and how they line up under grouped queries.

With ``g`` query heads per key/value head, kv channel ``(h, d)`` belongs to the query channels ``(g·h + i, d)``,
``i = 0 .. g-1``, as `repeat_kv` lays them out.
"""

import dataclasses
import functools

import torch

from .ops.mlp import Slices

__all__ = ["ChannelSelection", "HeadLayout", "Share", "top_channels"]

_TOGETHER = 16  # channels of 16 bits that a GPU reads at once


@dataclasses.dataclass(frozen=True)
class HeadLayout:
    """Heads of an attention module: ``heads`` query heads over ``kv_heads`` key/value heads of ``head_dim``."""

    heads: int
    kv_heads: int
    head_dim: int

    @property
    def groups(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.kv_heads

    @property
    def kv_width(self) -> int:
        """Width of the key and value projections."""
        return self.kv_heads * self.head_dim

    def pool_queries(self, scores: torch.Tensor) -> torch.Tensor:
        """L2 norm over the query channels of each kv channel: ``[heads · head_dim]`` to ``[kv_heads · head_dim]``."""
        return torch.linalg.vector_norm(scores.view(self.kv_heads, self.groups, self.head_dim), dim=1).reshape(-1)

    def expand(self, index: torch.Tensor) -> torch.Tensor:
        """Query channels of kv channels: ``[K]`` to ``[groups · K]``, those of the first query heads first."""
        return _query_channels(self, index.device).index_select(1, index).flatten()


@functools.lru_cache(maxsize=64)
def _query_channels(layout: HeadLayout, device: torch.device) -> torch.Tensor:
    """Query channels of each kv channel, ``[groups, kv]``."""
    channels = torch.arange(layout.heads * layout.head_dim, device=device)
    return channels.view(layout.kv_heads, layout.groups, layout.head_dim).transpose(0, 1).reshape(layout.groups, -1)


@dataclasses.dataclass(frozen=True)
class Share:
    """Output channels of one role in a fused linear: ``span`` of every ``stride`` rows, the ``first`` skipped.

    Rows that lie together are one span, as long as the share, and ``stride`` is the linear's whole height.
    """

    first: int
    span: int
    stride: int

    def width(self, height: int) -> int:
        """Channels of the role in a fused linear of so many rows."""
        return height // self.stride * self.span

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Rows of the fused linear that hold the role's channels ``index``."""
        return torch.div(index, self.span, rounding_mode="floor") * self.stride + self.first + index % self.span

    def take(self, fused: torch.Tensor) -> torch.Tensor:
        """The role's rows of a weight ``[out, in]`` or entries of a bias ``[out]``; a view where they lie together."""
        return fused.unflatten(0, (-1, self.stride)).narrow(1, self.first, self.span).flatten(0, 1)


@dataclasses.dataclass(frozen=True)
class ChannelSelection:
    """One kept set: ``narrow`` are its channels at kv (or MLP) width, ``wide`` at query width; both int64.

    ``slices`` is what was gathered of an MLP's weights for it.
    """

    narrow: torch.Tensor
    wide: torch.Tensor
    slices: Slices = dataclasses.field(default_factory=Slices, repr=False, compare=False)

    @classmethod
    def of(cls, index: torch.Tensor, layout: HeadLayout | None = None) -> "ChannelSelection":
        """Selection of channels; with a layout they are kv channels and are expanded to query channels."""
        return cls(index, index if layout is None else layout.expand(index))


def top_channels(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """The ``keep`` channels of highest score; NaN counts as lowest.

    A fixed count whatever the scores: shapes do not depend on data, so nothing waits for the device. They are sorted
    where that brings channels together in memory, and sorting is not free: one in a hundred lies alone anyway.
    """
    index = scores.neg().topk(keep, largest=False, sorted=False).indices  # whose order has NaN as highest
    return index.sort().values if keep * _TOGETHER > len(scores) else index
