"""A decoder layer that is replayed as CUDA graphs where its batch has been met before."""

from collections.abc import Iterable

from torch import nn

from ..state import SparseState
from .classes import Patched, Patches, has_own_forward, link_of

__all__ = ["graphed_layers"]


class GraphedLayer(Patched):
    """Mixin of a decoder layer; its link is the model's state and the layer's number."""

    def forward(self, *args, **kwargs):
        """As the family's."""
        state, number = link_of(self)
        return state.graphs.run(self, number, state, self.dense_forward, args, kwargs)


def graphed_layers(state: SparseState, layers: Iterable[tuple[int, nn.Module]]) -> Patches:
    """Let layers be recorded and replayed.

    Args:
        state: the model's.
        layers: numbers and layers; those whose forward others have replaced are left alone.

    Returns:
        What undoes it.
    """
    patches = Patches()
    for number, layer in layers:
        if not has_own_forward(layer):
            patches.add(layer, GraphedLayer, (state, number))
    return patches
