"""One decoder layer's forward and backward, recorded for batches of one form.

Where the layer is checkpointed, so are the recordings: the one of its backward begins with its forward again, as far
as backward has need of it, and nothing of the first one is kept but its input and its result.
"""

import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..ops.once import once_differentiable
from .form import NotNowError, Standing, UnfitError
from .recording import Place, Recording, drawing_from, random_state

__all__ = ["Input", "LayerGraph", "replayed"]


class Input:
    """A tensor that layers are given beside their hidden states, where recordings read it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.static, self.given = tensor.clone(), tensor
        self.take: weakref.ref | None = None

    def load(self, tensor: torch.Tensor, take: object) -> None:
        """Take over the tensor of a batch under way, once for all layers that are given it."""
        if self.take is not None and self.take() is take:
            if self.given is not tensor:
                raise NotNowError("layers are given several tensors where they were given one")
            return
        self.static.copy_(tensor)
        self.given, self.take = tensor, weakref.ref(take)


class LayerGraph:
    """One layer's forward and backward for batches of one form.

    Args:
        layer: the layer.
        form: of its arguments.
        inputs: its tensor arguments but the hidden states.
        call: hidden states to the layer's result, on what recordings read.
        place: of the recordings.
        is_checkpointed: whether backward runs the forward again.
    """

    def __init__(
        self,
        layer: nn.Module,
        form: Hashable,
        inputs: list[Input],
        call: Callable,
        place: Place,
        is_checkpointed: bool,
    ) -> None:
        self.form, self.inputs, self.is_checkpointed = form, inputs, is_checkpointed
        self.standing = Standing(layer)
        self.parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        self.learns = self.wants_grad = False
        self._call, self._place, self._layer = call, place, layer
        self._leaves: list[nn.Parameter] = []
        self._drawn: torch.Tensor | None = None
        self._shape = self._entry = self._hidden = self._result = self._grad = None
        self._groups: list[list[int]] | None = None
        self._forward: Recording | None = None
        self._backward: Recording | None = None

    @property
    def is_whole(self) -> bool:
        """Whether both directions are recorded, or the layer has no backward."""
        return self._forward is not None and (self._backward is not None or not self.learns)

    def record(self, hidden: torch.Tensor, is_static: bool) -> None:
        """Record the forward.

        Args:
            hidden: hidden states, ``[B, S, H]``.
            is_static: whether they lie where another recording leaves them each time.
        """
        self.wants_grad, self._shape = hidden.requires_grad, hidden.detach()
        self._entry, self._is_chained = self._shape if is_static else None, is_static
        self._forward = Recording(self._run_forward, self._place)
        self.entry, self.result = self._forward.outputs
        self._shape = None

    def _run_forward(self) -> list[torch.Tensor]:
        if self._entry is None:
            self._entry = torch.empty_like(self._shape)
        self._hidden = self._entry.detach().requires_grad_(self.wants_grad)
        if self.is_checkpointed:
            run = weakref.WeakMethod(self._run_layer)  # the result, which is kept here, keeps what is checkpointed
            ways = {"use_reentrant": False, "preserve_rng_state": False}  # random numbers are dealt with in replays
            self._result = checkpoint(lambda hidden: run()(hidden), self._hidden, **ways)
        else:
            self._result = self._run_layer(self._hidden)
        torch.clear_autocast_cache()  # of what was narrowed for this recording alone
        if not isinstance(self._result, torch.Tensor) or self._result.shape != self._entry.shape:
            raise UnfitError("a layer gives something else than hidden states")
        self.learns = self._result.requires_grad
        return [self._entry, self._result.detach().contiguous()]

    def _run_layer(self, hidden: torch.Tensor) -> torch.Tensor:
        with _fresh_leaves(self._layer) as leaves:
            self._leaves = self._leaves or leaves  # gradients go to those of the first time
            return self._call(hidden)

    def _run_backward(self) -> list[torch.Tensor | None]:
        """Where the gradient is read; the gradients of the hidden states and, in one tensor a type, of parameters."""
        if self._grad is None:
            self._grad = torch.empty_like(self._shape)
        wanted = [self._hidden] * self.wants_grad + self._leaves
        grads = list(torch.autograd.grad(self._result, wanted, self._grad, allow_unused=True))
        self._hidden = self._result = None  # recordings to come may have the memory of what backward needed
        self._leaves = []
        grad_hidden = grads.pop(0) if self.wants_grad else None
        self._groups = _by_type(grads)
        joined = [torch.cat([grads[place].reshape(-1) for place in places]) for places in self._groups]
        return [self._grad, None if grad_hidden is None else grad_hidden.contiguous(), *joined]

    def takes(self, hidden: torch.Tensor) -> bool:
        """Whether hidden states may be put where the recording reads them: another's result is not written over."""
        return not self._is_chained or hidden.data_ptr() == self.entry.data_ptr()

    def replay(self, hidden: torch.Tensor) -> torch.Tensor:
        """Forward: ``[B, S, H]`` to ``[B, S, H]``."""
        _move(hidden, self.entry)
        if self.is_checkpointed:
            self._drawn = random_state(hidden.device)
        self._forward.replay()
        # without a backward of its own nothing tells how long those above have need of it
        return self.result.detach() if self.learns else self.result.clone()

    def replay_backward(self, grad: torch.Tensor, is_static: bool) -> list[torch.Tensor | None]:
        """Gradient of the result to those of the hidden states and of the parameters, recorded the first time."""
        if self._backward is None:
            self._shape = grad.contiguous()
            self._grad = grad if is_static else None
            self._backward = Recording(self._run_backward, self._place)
            self.grad, self.grad_hidden, *self._joined = self._backward.outputs
            self._shape = None
        _move(grad, self.grad)
        with drawing_from(self._drawn, grad.device):  # dropout is the first forward's
            self._backward.replay()
        grads: list[torch.Tensor | None] = [None] * len(self.parameters)
        for places, joined in zip(self._groups, self._joined, strict=True):
            parameters = [self.parameters[place] for place in places]
            parts = joined.clone().split([parameter.numel() for parameter in parameters])
            for place, parameter, part in zip(places, parameters, parts, strict=True):
                grads[place] = part.view(parameter.shape)
        return [None if self.grad_hidden is None else self.grad_hidden.detach(), *grads]

    def release(self) -> None:
        """Nothing more is recorded: let go of all that lies in the recordings' memory."""
        self._call = self._layer = self._entry = self._hidden = self._result = self._grad = None
        self._leaves = []
        self._forward.release()
        if self._backward is not None:
            self._backward.release()


def _by_type(grads: list[torch.Tensor | None]) -> list[list[int]]:
    """Places of gradients, those of one type together."""
    groups: dict[torch.dtype, list[int]] = {}
    for place, grad in enumerate(grads):
        if grad is not None:
            groups.setdefault(grad.dtype, []).append(place)
    return list(groups.values())


def _move(tensor: torch.Tensor, place: torch.Tensor) -> None:
    if tensor.data_ptr() != place.data_ptr():
        place.copy_(tensor)


@contextmanager
def _fresh_leaves(layer: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Trainable parameters of a layer exchanged for others over the same memory, in their order.

    The node that takes in a parameter's gradient belongs to the stream on which it was made, and a recording must
    have nothing to do with any stream but its own.
    """
    exchanged, fresh = [], {}
    try:
        for module in layer.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.requires_grad:
                    exchanged.append((module, name, parameter))
                    module._parameters[name] = fresh.setdefault(id(parameter), nn.Parameter(parameter.detach()))
        yield list(fresh.values())
    finally:
        for module, name, parameter in exchanged:
            module._parameters[name] = parameter


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, graphs, graph, take, hidden, *parameters):
        ctx.set_materialize_grads(False)
        ctx.of = graphs, graph, take
        ctx.is_spent = False
        ctx.is_kept = not isinstance(hidden.grad_fn, _Replay._backward_cls)  # a gradient may outlive the step there
        return graph.replay(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        graphs, graph, take = ctx.of
        if ctx.is_spent or graphs.under_way is not take:
            raise RuntimeError(
                "SparseLoRA: with cuda_graphs a forward has one backward. For a second one, as with "
                "retain_graph=True, train with cuda_graphs=False."
            )
        ctx.is_spent = True
        take.pending -= 1
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        grad_hidden, *grads = graphs.backward(graph, grad)
        if ctx.is_kept and grad_hidden is not None:
            grad_hidden = grad_hidden.clone()
        return None, None, None, grad_hidden, *grads


def replayed(graphs: Any, graph: LayerGraph, take: Any, hidden: torch.Tensor) -> torch.Tensor:
    """A layer's result, ``[B, S, H]`` to ``[B, S, H]``, differentiable once where the layer learns.

    Args:
        graphs: the model's `Graphs`, which replay the backward.
        graph: the layer's.
        take: the batch under way.
        hidden: hidden states.
    """
    if not graph.learns:
        return graph.replay(hidden)
    return _Replay.apply(graphs, graph, take, hidden, *graph.parameters)
