"""Tasks of lm-eval, for what has no protocol of the paper's own."""

from collections.abc import Callable
from typing import Any

__all__ = ["PREFIX", "run_harness"]

PREFIX = "lm_eval:"


def run_harness(name: str, load: Callable[[], tuple[Any, Any]], batch_size: int, limit: int | None) -> dict[str, Any]:
    """Evaluate one task of lm-eval; returns its figures as lm-eval names them.

    Args:
        name: the task.
        load: gives model and tokenizer.
        batch_size: questions a batch.
        limit: ask the first so many.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: lm-eval does not know the task.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(f"{PREFIX}{name} needs lm-eval: pip install 'sparselora-hf[eval]'.") from error
    manager = TaskManager()
    if not manager.match_tasks([name]):
        raise ValueError(f"lm-eval has no task {name!r}. See `lm_eval ls tasks`.")
    model, tokenizer = load()
    model = HFLM(model, tokenizer=tokenizer, batch_size=batch_size)
    results = simple_evaluate(model, tasks=[name], limit=limit, task_manager=manager, log_samples=False)["results"]
    return {str(key): value for key, value in results[name].items()}
