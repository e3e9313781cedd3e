"""Work of a GPU recorded once and replayed by one call of the host: CUDA graphs.

A recording reads and writes the addresses that it was made with. Its memory comes from a pool that nothing else takes
from, and is given back to the pool as soon as all recordings of a series are made: those of the next series may use
it again, since only one series is under way at a time. What a recording gives is therefore known by address alone.
"""

import contextlib
import gc
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch

__all__ = ["Place", "Recording", "can_record", "drawing_from", "has_waited", "random_state"]

Tensors = Sequence[torch.Tensor | None]


def can_record(device: torch.device) -> bool:
    """Whether work on a device can be recorded: NVIDIA's, with PyTorch's own allocator, whose addresses stay."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_allocator_backend() == "native"


def has_waited(run: Callable[[], object]) -> bool:
    """Do something without gradients, and say whether the host had to wait for the device, which no graph can do.

    Random numbers are drawn as if nothing had been done: a run that is resumed does it later than one that goes on.
    A recording that fails leaves PyTorch's random numbers and its allocator in a state that nothing else can use.
    """
    before, as_before = torch.cuda.get_sync_debug_mode(), torch.random.fork_rng(range(torch.cuda.device_count()))
    with warnings.catch_warnings(record=True) as told, torch.no_grad(), as_before:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")  # which warns of itself, too
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(before)
            torch.clear_autocast_cache()  # PyTorch of 2025 uses what was narrowed here without gradients again
    return any("synchronizing CUDA operation" in str(warning.message) for warning in told)


def random_state(device: torch.device) -> torch.Tensor:
    """Where a device is in its random numbers; the host need not wait for it."""
    return _generator_of(device).get_state()


@contextlib.contextmanager
def drawing_from(state: torch.Tensor | None, device: torch.device) -> Iterator[None]:
    """Random numbers are those from a state on, and afterwards what they would have been; None changes nothing."""
    if state is None:
        yield
        return
    generator = _generator_of(device)
    before = generator.get_state()
    generator.set_state(state)
    try:
        yield
    finally:
        generator.set_state(before)


def _generator_of(device: torch.device) -> torch.Generator:
    return torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[device.index]


class Place:
    """Where recordings of one device are made: a stream and a pool of memory.

    Args:
        device: the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def clear(self) -> None:
        """Before a series: memory that lies idle is free for it."""
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()

    @contextlib.contextmanager
    def record(self, graph: torch.cuda.CUDAGraph):
        """Record what is queued meanwhile, in this thread; what other threads do is their own affair."""
        collects = gc.isenabled()
        gc.disable()  # the end of another graph in between would end the recording
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        try:
            with torch.cuda.stream(self._stream):
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    yield
                except BaseException:
                    _give_up(graph)
                    raise
                graph.capture_end()
        finally:
            if collects:
                gc.enable()


def _give_up(graph: torch.cuda.CUDAGraph) -> None:
    with contextlib.suppress(RuntimeError):  # the fault itself is told by whoever called
        graph.capture_end()


class Recording:
    """Work that was recorded.

    Args:
        run: queues the work, and gives contiguous tensors or None.
        place: where it is recorded.

    Attributes:
        outputs: what `run` gave; each replay writes it anew.
    """

    def __init__(self, run: Callable[[], Tensors], place: Place) -> None:
        self._graph = torch.cuda.CUDAGraph()
        with place.record(self._graph):
            self._held = run()
        self.outputs = [None if tensor is None else _by_address(tensor) for tensor in self._held]

    def replay(self) -> None:
        """Queue the work on the current stream."""
        self._graph.replay()

    def release(self) -> None:
        """Let the pool have the memory back: recordings to come may use what this one gave."""
        self._held = ()


class _Address:
    """A tensor's memory, in the form that PyTorch takes from other libraries; it keeps nothing alive."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.__cuda_array_interface__ = {
            "shape": (tensor.numel() * tensor.element_size(),),
            "typestr": "|u1",
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }


def _by_address(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor over the same memory, which may be given to others while it is used."""
    if not tensor.is_contiguous():
        raise ValueError(f"a recording gives a tensor of strides {tensor.stride()} for {tuple(tensor.shape)}")
    if not tensor.numel():
        return tensor.detach()
    return torch.as_tensor(_Address(tensor), device=tensor.device).view(tensor.dtype).view(tensor.shape)
