"""A double of CUDA graphs on a CPU: operations are written down once, and done again in the same memory.

As on a GPU, no Python of a layer runs then, and whatever is no tensor stays what it was.
"""

from typing import ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Tape(TorchDispatchMode):
    """Writes down what is done, below autograd and autocast."""

    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if "empty" not in function.name():  # what memory holds at first is of no interest
            self.done.append((function, args, kwargs or {}, _tensors(result)))
        return result

    @torch.no_grad()
    def run(self):
        """Do it again."""
        for function, args, kwargs, results in self.done:
            written = _tensors((args, kwargs)) if function._schema.is_mutable else ()
            # a backward that is yet to be recorded must not see that its forward has been replayed
            with torch.autocast("cpu", enabled=False), torch.autograd._unsafe_preserve_version_counter(tuple(written)):
                now = _tensors(function(*args, **kwargs))
            for before, tensor in zip(results, now, strict=True):
                if before.data_ptr() != tensor.data_ptr():
                    before.data.copy_(tensor)


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Taped:
    """A recording's double."""

    def __init__(self, run, place):
        place.recordings.append(self)
        self._tape = _Tape()
        with self._tape, torch.random.fork_rng(()):  # while a GPU records it draws no numbers
            self.outputs = [None if tensor is None else tensor.data for tensor in run()]
        self.replays = 0

    def replay(self):
        self.replays += 1
        self._tape.run()

    def release(self):
        pass


class Here:
    """A place's double."""

    recordings: ClassVar[list] = []

    def __init__(self, device):
        self.device = device

    def clear(self):
        pass
