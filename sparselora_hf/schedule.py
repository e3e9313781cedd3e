"""When training is sparse: a pure function of the global step, so that resuming needs no memory of the past."""

import dataclasses
import math

from .config import SparseLoraConfig

__all__ = ["Schedule"]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Optimizer steps ``start <= step < end`` are sparse; `step` counts finished steps, from 0."""

    start: int
    end: int

    @classmethod
    def of(cls, config: SparseLoraConfig, max_steps: int) -> "Schedule":
        """Resolve fractions of a run of ``max_steps`` optimizer steps.

        Raises:
            ValueError: sparsity would end before it starts.
        """
        start, end = (_resolve(value, max_steps) for value in (config.start_step, config.end_step))
        if config.needs_statistics:
            start = max(start, 1)  # statistics come from dense steps: there must be one
        if start > end and max_steps:  # a run of no steps is not at fault
            raise ValueError(
                f"start_step {config.start_step} (step {start}) is after end_step {config.end_step} (step {end}) "
                f"in a run of {max_steps} steps: no step would be sparse. Lower start_step, train "
                "longer, or raise end_step where it lies before the end."
            )
        return cls(start, end)

    def is_sparse(self, step: int) -> bool:
        """Whether the step after ``step`` finished ones is sparse."""
        return self.start <= step < self.end

    def is_ever_sparse(self, max_steps: int) -> bool:
        """Whether any step of a run of ``max_steps`` is sparse."""
        return self.start < min(self.end, max_steps)


def _resolve(value: float | int, max_steps: int) -> int:
    return value if isinstance(value, int) else math.ceil(value * max_steps - 1e-9)
