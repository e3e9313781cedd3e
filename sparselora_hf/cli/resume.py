"""Going on with a run from one of its checkpoints, and telling one that is done already."""

import math
from typing import Any

from ..checkpoints import newest_checkpoint, steps_taken

__all__ = ["resumed", "run_to_end"]


def resumed(given: str | None) -> str | bool | None:
    """Where to go on from: a flag gives text, in which ``true`` is the newest checkpoint and ``false`` none."""
    return {"true": True, "false": None}.get(str(given).lower(), given)


def run_to_end(trainer: Any, given: str | None) -> tuple[Any, bool]:
    """Train, or go on from where `resumed` says. A run that is done takes no step and gives what it had ended with.

    By itself the Trainer would take one step more, but for a run that ended with an epoch.

    Args:
        trainer: a `transformers.Trainer` whose `max_steps` is not 0.
        given: see `resumed`.

    Returns:
        What `trainer.train` returns, and whether the run was done before.
    """
    args, source = trainer.args, resumed(given)
    folder = newest_checkpoint(args.output_dir) if source is True else source
    taken, length = steps_taken(folder) if folder else 0, (args.max_steps, args.num_train_epochs)
    was_done = taken > 0 and taken >= _steps(trainer)
    if was_done:
        args.max_steps, args.num_train_epochs = -1, 0
    try:
        return trainer.train(resume_from_checkpoint=source), was_done
    finally:
        args.max_steps, args.num_train_epochs = length


def _steps(trainer: Any) -> int:
    """Optimizer steps of a whole run."""
    args = trainer.args
    if args.max_steps > 0:
        return args.max_steps
    epoch = math.ceil(len(trainer.get_train_dataloader()) / args.gradient_accumulation_steps)
    return math.ceil(args.num_train_epochs * epoch)
