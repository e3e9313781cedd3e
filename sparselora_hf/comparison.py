"""The same training with several trainers, each in a process of its own, measured alike and set side by side."""

import dataclasses
import multiprocessing
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .measure import Evaluation, RunClock, StepTime, StepTimer, median_step, peak_memory, reset_peak_memory

__all__ = ["Outcome", "draw", "exact_match", "in_fresh_process", "measure", "shared_loss"]

logger = logging.get_logger(__name__)

COLORS = ("0.45", "tab:green", "tab:blue", "tab:olive", "tab:orange", "tab:purple")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One trained adapter.

    Attributes:
        name: what it is called in tables.
        losses: training loss of every step.
        steps: time of every step.
        evaluations: loss on held-out rows during the run.
        first_sparse: index of the first sparse step; None where there is none.
        attach_seconds: what making the model sparse took, before training.
        seconds: training, dense steps and fits included, evaluations not.
        memory: bytes at the peak of training; None where the system does not tell.
        score: held-out score in per cent; None where none was asked for.
        sparsity: largest share of channels that was dropped for context tokens.
        flops: FLOPs of the frozen linears of every step, as a share of the dense ones.
        config: settings of sparsity, where there are any.
    """

    name: str
    losses: list[float]
    steps: list[StepTime]
    evaluations: list[Evaluation]
    first_sparse: int | None
    attach_seconds: float
    seconds: float
    memory: int | None
    score: float | None
    sparsity: float
    flops: list[float]
    config: dict[str, Any] | None

    def step(self, first: int) -> StepTime:
        """Median step from index `first` on."""
        return median_step(self.steps[first:])

    @property
    def loss(self) -> float:
        """Mean training loss of the last tenth of the run."""
        last = self.losses[-max(1, len(self.losses) // 10) :]
        return sum(last) / len(last)

    @property
    def total_seconds(self) -> float:
        """Attaching and training."""
        return self.attach_seconds + self.seconds

    def seconds_to(self, loss: float) -> float | None:
        """Attaching and training up to the first evaluation at or below a loss; None where it was not reached."""
        reached = (e.seconds for e in self.evaluations if e.loss <= loss)
        seconds = next(reached, None)
        return None if seconds is None else self.attach_seconds + seconds


def in_fresh_process(function: Callable, *arguments: Any) -> Any:
    """Call in a process of its own: each trainer starts from the same clean memory."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _quieten() -> None:
    from datasets import disable_progress_bars

    warnings.simplefilter("ignore", FutureWarning)  # transformers on its own renamings: not the user's business here
    disable_progress_bars()
    logging.disable_progress_bar()


def measure(
    name: str, build: Callable[[list[Any]], Any], score: Callable[[Any], float | None] = lambda trainer: None
) -> Outcome:
    """Train, save and score one trainer.

    Args:
        name: what the outcome is called.
        build: makes the trainer from a list of callbacks; it must log every step.
        score: takes the trained trainer.
    """
    from transformers.trainer_callback import PrinterCallback

    from .trainer import SparseLoraTrainer

    _quieten()
    timer, clock = StepTimer(), RunClock()
    trainer = build([timer, clock])
    trainer.remove_callback(PrinterCallback)
    handle = trainer.sparse_handle if isinstance(trainer, SparseLoraTrainer) else None
    reset_peak_memory()
    trainer.train()
    memory = peak_memory()
    trainer.save_model()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    sparsity = [entry.get("sparselora/channel_sparsity", 0.0) for entry in history]
    return Outcome(
        name=name,
        losses=[entry["loss"] for entry in history],
        steps=timer.steps,
        evaluations=clock.evaluations,
        first_sparse=next((i for i, value in enumerate(sparsity) if value > 0), None),
        attach_seconds=0.0 if handle is None else handle.attach_seconds,
        seconds=clock.seconds,
        memory=memory,
        score=score(trainer),
        sparsity=max(sparsity),
        flops=[1.0 - entry.get("sparselora/linear_flops_saved", 0.0) for entry in history],
        config=None if handle is None else handle.config.to_dict(),
    )


def shared_loss(outcomes: Sequence[Outcome]) -> float | None:
    """The lowest evaluation loss that every run reached; None without evaluations."""
    lowest = [min((e.loss for e in outcome.evaluations), default=None) for outcome in outcomes]
    return None if None in lowest else max(lowest)


def exact_match(model: Any, tokenizer: Any, rows: Sequence[dict[str, str]], batch: int = 64) -> float:
    """Share of held-out completions that greedy generation gives word for word, in per cent."""
    import torch

    model.eval()
    right = 0
    longest = max(len(tokenizer(row["completion"])["input_ids"]) for row in rows) + 1
    for first in range(0, len(rows), batch):
        part = rows[first : first + batch]
        inputs = tokenizer([row["prompt"] for row in part], return_tensors="pt", padding=True, padding_side="left")
        inputs = {key: inputs[key].to(model.device) for key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            output = model.generate(
                **inputs, max_new_tokens=longest, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
        answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(answer.strip() == row["completion"].strip() for answer, row in zip(answers, part, strict=True))
    return 100.0 * right / len(rows)


def draw(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Write a picture: the losses of all runs, and the time of every step, with the start of sparsity marked.

    The losses are those of the evaluations over seconds of attaching and training where there are any, else those
    of training over steps. Without matplotlib there is a warning in its place.
    """
    try:
        import matplotlib
    except ImportError:  # what was measured is worth more than its picture
        logger.warning(f"{path.name} is not drawn: matplotlib is missing. pip install 'sparselora-hf[plots]'.")
        return

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6))
    for outcome, color in zip(outcomes, COLORS, strict=False):
        _draw_loss(left, outcome, color)
        milliseconds = [1e3 * step.wall for step in outcome.steps]
        right.plot(range(1, len(milliseconds) + 1), milliseconds, ".", color=color, label=outcome.name)
    starts = {o.first_sparse for o in outcomes} - {None}
    for start in starts:
        right.axvline(start + 1, color="tab:green", linestyle=":", label="sparsity starts")
    right.set_xlabel("step")
    right.set_ylabel("step time, ms")
    right.set_ylim(bottom=0)
    left.set_yscale("log")
    right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_loss(axis: Any, outcome: Outcome, color: str) -> None:
    if outcome.evaluations:
        points = [(outcome.attach_seconds + e.seconds, e.loss) for e in outcome.evaluations]
        labels, marker = ("seconds of attaching and training", "evaluation loss"), "o"
    else:
        points = list(enumerate(outcome.losses, 1))
        labels, marker = ("step", "training loss"), ""
    axis.plot(*zip(*points, strict=True), marker=marker, markersize=3, color=color, label=outcome.name)
    axis.set_xlabel(labels[0])
    axis.set_ylabel(labels[1])
