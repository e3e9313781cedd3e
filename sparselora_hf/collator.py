"""Data collator that lets each training batch bring its token plan along, built on the host beside the batch."""

from collections.abc import Callable
from typing import Any

from .plan import TokenPlan

__all__ = ["PLAN_KEY", "PlanCollator"]

PLAN_KEY = "sparselora_plan"


class PlanCollator:
    """Wrap a collator: its batches gain a `TokenPlan` under `PLAN_KEY`; batches without labels stay as they are.

    A plan made from labels that are on a GPU already would make the host wait for the device in every step.

    Args:
        collator: the collator in use.
        token_rule: see `SparseLoraConfig`.
        rounds: whether plans are rounded, for CUDA graphs.
    """

    def __init__(self, collator: Callable[[list], dict[str, Any]], token_rule: str, rounds: bool = False) -> None:
        self.collator = collator
        self.token_rule = token_rule
        self.rounds = rounds

    def __call__(self, examples: list) -> dict[str, Any]:
        """Collate, then plan."""
        batch = self.collator(examples)
        if "labels" in batch:
            plan = TokenPlan.of_inputs(batch, self.token_rule)
            batch[PLAN_KEY] = plan.rounded() if self.rounds else plan
        return batch
