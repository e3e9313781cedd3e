"""What the processes of a data-parallel run must agree on, and how they do.

Adapters are shared by all ranks, so what was fitted to dense steps must be too: every rank brings its sample, all fit
to the union, and rank 0's result holds. Sets chosen per batch are each rank's own, as those of the micro-batches of an
accumulated step are. Without a process group there is one rank and nothing is sent.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

__all__ = ["add_up", "agree", "gather_objects", "rank_and_world", "whole_weights"]


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if _is_distributed() else (0, 1)


def gather_objects(value: Any) -> list[Any]:
    """The value of every rank, by rank; every rank must call."""
    if not _is_distributed():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def add_up(tensor: torch.Tensor) -> None:
    """Replace a contiguous tensor by the sum over ranks; every rank must call."""
    if _is_distributed():
        dist.all_reduce(tensor)


def agree(tensors: Iterable[torch.Tensor]) -> None:
    """Replace tensors by those of rank 0; every rank must call, with the same shapes."""
    if not _is_distributed():
        return
    for tensor in tensors:
        sent = tensor.contiguous()
        dist.broadcast(sent, src=0)
        tensor.copy_(sent)


@contextlib.contextmanager
def whole_weights(module: nn.Module, model: nn.Module | None = None) -> Iterator[None]:
    """Weights of a module in full, where FSDP2 keeps a shard of them on each rank; every rank must enter.

    Args:
        module: a part of the model.
        model: the whole model, which FSDP2 gathers as one where it has no policy to wrap parts by; None is the module.
    """
    from torch.distributed.fsdp import FSDPModule

    inside, whole = set(module.modules()), module if model is None else model
    units = [part for part in whole.modules() if isinstance(part, FSDPModule)]
    sharded = [part for part in units if part in inside or module in part.modules()]
    for part in sharded:
        part.unshard()
    try:
        yield
    finally:
        for part in sharded:
            part.reshard()
