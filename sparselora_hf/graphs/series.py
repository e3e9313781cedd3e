"""Which batches are recorded, and which are replayed."""

import functools
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..plan import TokenPlan
from .form import Call, NotNowError, UnfitError, form_of_batch
from .layer import Input, LayerGraph, replayed
from .recording import Place

__all__ = ["Graphs", "Take"]

_FORMS = 32  # so many are kept; one takes the host's memory of two graphs a layer
_MET = 1024  # so many are remembered as met
_TRIES = 3  # recordings of one form, where what it was made from changes
_TRIAL = 100  # batches until it shows whether forms come again


class Series:
    """What was recorded for batches of one form.

    Attributes:
        layers: by number.
        batch: the batch that recordings read, with rows of its own.
        inputs: while recording, by the tensor that a layer is given.
        tries: how often it was recorded.
        is_stale: whether it is to be recorded anew.
    """

    def __init__(self) -> None:
        self.layers: dict[int, LayerGraph] = {}
        self.batch: Any = None
        self.inputs: dict[int, Input] = {}
        self.tries = 0
        self.is_stale = False

    @property
    def is_whole(self) -> bool:
        """Whether each layer was recorded in both directions, as far as it has them."""
        return all(layer.is_whole for layer in self.layers.values())

    def release(self) -> None:
        """The recording is at its end: let go of all that lies in its memory."""
        for layer in self.layers.values():
            layer.release()
        self.batch.selections.clear()

    def forget(self) -> None:
        """Nothing is recorded of it."""
        self.layers.clear()
        self.inputs.clear()
        self.batch, self.is_stale = None, False


class Take:
    """One batch on its way through a series.

    Args:
        series: the series.
        plan: the batch's rows.
        records: whether recordings are made on the way.

    Attributes:
        pending: layers that wait for their backward.
        called: numbers of the layers that were called.
    """

    def __init__(self, series: Series, plan: TokenPlan, records: bool) -> None:
        self.series = series
        self.plan = plan
        self.records = records
        self.pending = 0
        self.called: set[int] = set()
        self._has_started = False

    def __reduce__(self):
        return _none, ()  # of a copy

    def enter(self, number: int) -> None:
        """A layer is called: once, or what was saved for the backward of the first call would be lost."""
        if number in self.called:
            raise NotNowError("it is called again for the same batch")
        self.called.add(number)

    def start(self) -> None:
        """Hand the batch's rows to the recordings, before the first of them is replayed."""
        if not self._has_started:
            self._has_started = True
            torch._foreach_copy_(_rows_of(self.series.batch.plan), _rows_of(self.plan))


def _none() -> None:
    return None


def _rows_of(plan: TokenPlan) -> list[torch.Tensor]:
    """Rows of a plan that layers read, those that there are."""
    rows = (plan.context, plan.output, plan.rest, plan.real, plan.sequence)
    return [part for part in rows if part is not None and len(part)]


class Graphs:
    """Recordings of a model's layers, by the forms of its batches."""

    def __init__(self) -> None:
        self._place: Place | None = None
        self._series: dict[Hashable, Series] = {}  # the one that was met last is the last, here and below
        self._met: dict[Hashable, bool] = {}
        self._batches = self._replayed = 0
        self._trial: list[bool] = []  # of the first that could be recorded, whether they were replayed
        self._recording: Series | None = None
        self._under_way: weakref.ref | None = None
        self._addresses: set[int] = set()  # of what recordings give, while a series is recorded

    def __reduce__(self):
        return Graphs, ()  # a copy of a model has other weights

    @property
    def under_way(self) -> Take | None:
        """The batch that was the last to be replayed, until nothing knows of it any more."""
        return None if self._under_way is None else self._under_way()

    def clear(self) -> None:
        """Forget all recordings: what they were made from may change."""
        if self._place is not None:
            self._place.clear()  # a graph that is still at work is not to be taken apart
        if (under_way := self.under_way) is not None:  # the traceback of an error may keep it for long
            under_way.pending = 0  # it shares no memory with recordings to come
        for series in self._series.values():
            series.forget()
        self._series.clear()
        self._met.clear()
        self._trial.clear()
        self._recording = self._place = None

    @property
    def is_idle(self) -> bool:
        """Whether the trial is over, and of hardly any of its batches the form had come before."""
        return len(self._trial) > _TRIAL and sum(self._trial) < _TRIAL // 10

    def figures(self) -> dict[str, float]:
        """Share of batches that were replayed since the last call, for the log."""
        share = round(self._replayed / self._batches, 4) if self._batches else 0.0
        self._replayed = self._batches = 0
        return {"sparselora/replayed": share}

    def meet(self, batch: Any) -> None:
        """A new `ActiveBatch` has come. What becomes of it its first layer tells, by what it is given."""
        self._settle()
        self._batches += 1
        batch.may_replay = batch.gather is None

    def take(self, batch: Any, form: Hashable) -> Take | None:
        """What a batch records or replays; None where it runs as ever.

        Args:
            batch: the `ActiveBatch`.
            form: of what its first layer is given.
        """
        under_way = self.under_way
        if under_way is not None and under_way.pending > 0:
            return None
        series = self._series_of((form_of_batch(batch), form), batch.plan.context.device)
        if series is None:
            return None
        records = not series.layers
        if records:
            self._recording, series.batch = series, batch.twin()
            series.tries += 1
            self._addresses.clear()
        else:
            self._replayed += 1
        self._try(not records)
        take = Take(series, batch.plan, records)
        self._under_way = weakref.ref(take)
        return take

    def _series_of(self, form: Hashable, device: torch.device) -> Series | None:
        """The series of a form, to be recorded where it is empty; None where a form is met for the first time."""
        series = self._series.pop(form, None)
        if series is None:
            is_met = self._met.pop(form, False)
            _put(self._met, form, True, _MET)
            if not is_met:
                self._try(False)
                return None
            series = Series()
        is_made = series.layers and not series.is_stale
        if not is_made and series.tries < _TRIES:
            if self._place is None or self._place.device != device:
                self._place = Place(device)
            self._place.clear()
            series.forget()
        _put(self._series, form, series, _FORMS)
        return series if is_made or series.tries < _TRIES else None

    def _try(self, is_replayed: bool) -> None:
        if len(self._trial) <= _TRIAL:
            self._trial.append(is_replayed)

    def _settle(self) -> None:
        series, self._recording = self._recording, None
        if series is not None and series.is_whole:
            series.release()
        elif series is not None:  # a forward without a backward, or interrupted
            series.forget()

    def run(
        self,
        layer: nn.Module,
        number: int,
        state: Any,
        forward: Callable,
        args: tuple,
        kwargs: dict[str, Any],
        checkpointed: Callable | None = None,
    ) -> Any:
        """A layer's forward.

        Args:
            layer: the layer.
            number: its number.
            state: the model's `SparseState`.
            forward: the layer's own.
            args: what it is given by place.
            kwargs: what it is given by name.
            checkpointed: where the layer is checkpointed, what does that without recordings.
        """
        batch, launched = state.batch, checkpointed or functools.partial(forward, *args, **kwargs)
        if batch is None or not batch.may_replay:
            return launched()
        try:
            call = Call(layer, forward, args, kwargs, batch, checkpointed is not None)
            batch.take = batch.take or self.take(batch, call.form)
            graph = self._graph(batch.take, call, number, state)
        except UnfitError as reason:
            batch.may_replay = False  # recordings above may read what this layer's was to write
            if not isinstance(reason, NotNowError):
                state.warn_once(f"SparseLoRA: layer {number} and those above are not made CUDA graphs: {reason}.")
            return launched()
        batch.take.pending += graph.learns
        return replayed(self, graph, batch.take, call.hidden)

    def _graph(self, take: Take | None, call: Call, number: int, state: Any) -> LayerGraph:
        if take is None:
            raise NotNowError("the form is met for the first time, or another batch is under way")
        take.enter(number)
        return self._record(take, call, number, state) if take.records else _found(take, call, number)

    def _record(self, take: Take, call: Call, number: int, state: Any) -> LayerGraph:
        call.check()
        series, batch = take.series, take.series.batch  # which a series forgets where another forward comes between
        inputs = [self._input(series, tensor) for tensor in call.tensors]

        def run(hidden: torch.Tensor) -> torch.Tensor:
            with _in_hand(state, batch):
                return call.on(hidden, [place.static for place in inputs], batch)

        graph = LayerGraph(call.layer, call.form, inputs, run, self._place, call.is_checkpointed)
        with _told("forward"):
            graph.record(call.hidden, call.hidden.data_ptr() in self._addresses)
        self._addresses.add(graph.result.data_ptr())
        series.layers[number] = graph
        return graph

    def _input(self, series: Series, tensor: torch.Tensor) -> Input:
        if id(tensor) not in series.inputs:
            series.inputs[id(tensor)] = Input(tensor)
        return series.inputs[id(tensor)]

    def backward(self, graph: LayerGraph, grad: torch.Tensor) -> list[torch.Tensor | None]:
        """Gradients of a layer's hidden states and of its parameters."""
        if graph.is_whole:
            return graph.replay_backward(grad, False)
        with _told("backward"):
            grads = graph.replay_backward(grad, grad.data_ptr() in self._addresses)
        if graph.grad_hidden is not None:
            self._addresses.add(graph.grad_hidden.data_ptr())
        return grads


def _found(take: Take, call: Call, number: int) -> LayerGraph:
    """A layer's recording, with what it reads in place."""
    graph = take.series.layers.get(number)
    if graph is None:
        raise NotNowError("it was not recorded")
    if graph.form != call.form or not graph.standing.holds() or not graph.takes(call.hidden):
        take.series.is_stale = True
        raise NotNowError("it has changed since")
    take.start()
    for place, tensor in zip(graph.inputs, call.tensors, strict=True):
        place.load(tensor, take)
    return graph


def _put(known: dict, form: Hashable, value: object, most: int) -> None:
    """Put a value last, and let go of the first where there are too many."""
    known[form] = value
    if len(known) > most:
        del known[next(iter(known))]


@contextmanager
def _in_hand(state: Any, batch: Any) -> Iterator[None]:
    """The batch that recordings read is the one in hand meanwhile."""
    before, state.batch = state.batch, batch
    try:
        yield
    finally:
        state.batch = before


@contextmanager
def _told(direction: str) -> Iterator[None]:
    """A fault of a recording with its remedy: CUDA is in no state to go on in."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"SparseLoRA: a layer's {direction} cannot be recorded as a CUDA graph ({error}). Train with "
            "cuda_graphs=False."
        ) from error
