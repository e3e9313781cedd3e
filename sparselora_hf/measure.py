"""Measuring a training run: time of each optimizer step by wall and process clock, and peak memory."""

import dataclasses
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import TrainerCallback

__all__ = ["Evaluation", "RunClock", "StepTime", "StepTimer", "median_step", "peak_memory", "reset_peak_memory"]

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step: by the wall clock, and by the process's own, all threads added up."""

    wall: float
    cpu: float


def _now() -> StepTime:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return StepTime(time.perf_counter(), time.process_time())


class StepTimer(TrainerCallback):
    """Times every optimizer step, from its first micro-batch to the end of the optimizer's update.

    Attributes:
        steps: one `StepTime` per step, in order.
    """

    def __init__(self) -> None:
        self.steps: list[StepTime] = []
        self._start = StepTime(0.0, 0.0)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """Start the clocks."""
        self._start = _now()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Stop them."""
        end = _now()
        self.steps.append(StepTime(end.wall - self._start.wall, end.cpu - self._start.cpu))


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Loss on held-out rows after `step` optimizer steps and `seconds` of training."""

    step: int
    seconds: float
    loss: float


class RunClock(TrainerCallback):
    """Seconds of training from its first step on, data and dense steps included, evaluations taken off.

    Attributes:
        evaluations: one `Evaluation` per evaluation, in order.
        seconds: the whole run's, once it has ended.
    """

    def __init__(self) -> None:
        self.evaluations: list[Evaluation] = []
        self.seconds = self._start = self._paused = 0.0

    def _elapsed(self) -> float:
        return _now().wall - self._start - self._paused

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Start the clock."""
        self._start, self._paused = _now().wall, 0.0

    def on_evaluate(self, args, state, control, metrics, **kwargs) -> None:
        """Take the evaluation's own time off and note its loss."""
        self._paused += metrics["eval_runtime"]
        self.evaluations.append(Evaluation(state.global_step, self._elapsed(), metrics["eval_loss"]))

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Stop the clock."""
        self.seconds = self._elapsed()


def median_step(steps: Sequence[StepTime]) -> StepTime:
    """Medians of both clocks."""
    return StepTime(statistics.median(s.wall for s in steps), statistics.median(s.cpu for s in steps))


def reset_peak_memory() -> None:
    """Start a new peak: of the device's allocator on CUDA, of the process's resident set on Linux, else of nothing."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif _CLEAR_REFS.exists():
        _CLEAR_REFS.write_text("5")  # proc(5): resets the peak of the resident set


def peak_memory() -> int | None:
    """Bytes at the peak since `reset_peak_memory`, or None where the system does not tell."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if not _STATUS.exists():
        return None
    peak = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024
