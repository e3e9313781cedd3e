"""Random numbers drawn from a given seed for a while, without disturbing the caller's."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["seeded"]


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Draw from a seed on the CPU and on a device; behind it both go on as if nothing had been drawn.

    `torch.manual_seed` would seed every GPU, and those that nothing has used yet as soon as something does.
    """
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng([device] if on_gpu else []):
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
