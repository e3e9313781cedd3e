"""Tasks of lm-eval, for what has no protocol of the paper's own."""

from typing import Any

__all__ = ["PREFIX", "run_harness"]

PREFIX = "lm_eval:"


def run_harness(
    name: str, base: str, adapter: str | None, dtype: str, batch_size: int, limit: int | None
) -> dict[str, Any]:
    """Evaluate one task of lm-eval; returns its figures as lm-eval names them.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: lm-eval does not know the task.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(f"{PREFIX}{name} needs lm-eval: pip install 'sparselora-hf[eval]'.") from error
    import torch

    manager = TaskManager()
    if not manager.match_tasks([name]):
        raise ValueError(f"lm-eval has no task {name!r}. See `lm_eval ls tasks`.")
    device = str(torch.accelerator.current_accelerator() or "cpu")
    model = {"pretrained": base, "dtype": dtype, **({"peft": adapter} if adapter else {})}
    settings = {"tasks": [name], "batch_size": batch_size, "limit": limit, "device": device, "task_manager": manager}
    results = simple_evaluate(model="hf", model_args=model, log_samples=False, **settings)["results"]
    return {str(key): value for key, value in results[name].items()}
