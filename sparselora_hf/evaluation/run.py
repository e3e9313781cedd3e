"""One task from questions to score."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .answers import AnswerFile
from .asking import Asker
from .generate import Generator
from .interval import pass_at_k, wilson
from .tasks import Question, Task

__all__ = ["answer_all", "fingerprint", "score"]


def fingerprint(texts: Sequence[str]) -> str:
    """Short hash of the prompts, to tell whether they are those of an earlier run."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def answer_all(
    questions: Sequence[Question],
    asker: Asker,
    generator: Generator,
    file: AnswerFile,
    batch_size: int,
    progress: Any = None,
) -> None:
    """Answer every question that a file lacks, batch by batch, the batches the same however often one starts.

    Args:
        questions: the questions.
        asker: makes prompts of them.
        generator: answers the prompts.
        file: where answers are kept.
        batch_size: questions a batch.
        progress: called with the number of answered questions, if given.
    """
    first = [asker.prompt(question.turns, []) for question in questions]
    generator.warn_of_long(first)
    for number, batch in enumerate(generator.batches(first, batch_size)):
        if any(place not in file.answers for place in batch):
            file.add(_converse(questions, batch, asker, generator, number))
        if progress is not None:
            progress(len(batch))


def _converse(
    questions: Sequence[Question], batch: list[int], asker: Asker, generator: Generator, seed: int
) -> dict[int, list[str]]:
    """Samples of single questions, or the turns of conversations."""
    turns = {place: questions[place].turns for place in batch}
    replies: dict[int, list[str]] = {place: [] for place in batch}
    for turn in range(max(map(len, turns.values()))):
        open_ones = [place for place in batch if turn < len(turns[place])]
        prompts = [asker.prompt(turns[place], replies[place]) for place in open_ones]
        for place, texts in zip(open_ones, generator.answer(prompts, seed), strict=True):
            replies[place] += texts
    return replies


def score(task: Task, questions: Sequence[Question], file: AnswerFile, details: Path) -> dict[str, Any]:
    """Compare the answers with the targets and note each verdict in a file.

    Returns:
        `score` and its 95 % `interval` in per cent, `correct` of `total`, and with several samples `pass@k` for each k
        of which `score` is the last; empty for a task that others judge.
    """
    if task.right is None:
        return {}
    verdicts, lines = [], []
    for place, question in enumerate(questions):
        answers = file.answers[place]
        verdicts.append([task.right(answer, question.target) for answer in answers])
        note = {"question": question.key, "target": question.target, "right": verdicts[-1], "answers": answers}
        lines.append(json.dumps(note) + "\n")
    details.write_text("".join(lines), encoding="utf-8")
    return _figures(verdicts)


def _figures(verdicts: list[list[bool]]) -> dict[str, Any]:
    total, samples = len(verdicts), len(verdicts[0])
    passed = {k: sum(pass_at_k(samples, sum(right), k) for right in verdicts) / total for k in range(1, samples + 1)}
    share = passed[samples]
    figures = {
        "score": round(100 * share, 2),
        "interval": [round(100 * end, 2) for end in wilson(share, total)],
        "correct": sum(any(right) for right in verdicts),
        "total": total,
    }
    return figures | ({f"pass@{k}": round(100 * value, 2) for k, value in passed.items()} if samples > 1 else {})
