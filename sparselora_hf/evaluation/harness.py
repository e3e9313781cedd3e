"""Tasks of lm-eval, for what has no protocol of the paper's own."""

from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["PREFIX", "check_harness", "run_harness"]

PREFIX = "lm_eval:"


def check_harness(names: Sequence[str]) -> None:
    """Say before any work that a task cannot be asked.

    Args:
        names: tasks, groups or tags of lm-eval.

    Raises:
        ImportError: there are names, but lm-eval is not installed.
        ValueError: lm-eval does not know one of them.
    """
    if not names:
        return
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(f"{PREFIX}{names[0]} needs lm-eval: pip install 'sparselora-hf[eval]'.") from error
    manager = TaskManager()
    for name in names:
        if not manager.match_tasks([name]):
            raise ValueError(f"lm-eval has no task {name!r}. See `lm_eval ls tasks`.")


def run_harness(
    name: str, load: Callable[[], tuple[Any, Any]], batch_size: int, limit: int | None
) -> dict[str, dict[str, Any]]:
    """Evaluate a task of lm-eval, or all of a group or tag.

    Args:
        name: the task, group or tag, one that `check_harness` has let pass.
        load: gives model and tokenizer.
        batch_size: questions a batch.
        limit: ask the first so many of each task.

    Returns:
        Figures as lm-eval names them, by task; those of a group, where lm-eval sums them up, by the group's name.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model, tokenizer = load()
    model = HFLM(model, tokenizer=tokenizer, batch_size=batch_size)
    manager = TaskManager()
    results = simple_evaluate(model, tasks=[name], limit=limit, task_manager=manager, log_samples=False)["results"]
    return {task: {str(key): value for key, value in figures.items()} for task, figures in results.items()}
