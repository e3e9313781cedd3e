"""Answers that others judge, in the form that they read: evalplus for code, FastChat for MT-Bench."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .interval import wilson
from .tasks import Question

__all__ = ["EXPORTS", "check_evalplus", "run_evalplus", "solution"]

_LAST_WORDS = 4096  # bytes of what evalplus says that an error is looked for in


def solution(row: dict[str, Any], answer: str) -> str:
    """A whole program from an answer to a HumanEval prompt.

    The answer's first block of code, or all of it without one; what the prompt has above its function goes before a
    whole function, the prompt itself before a body.
    """
    _, fence, rest = answer.partition("```")
    block = rest.split("\n", 1)[-1].partition("```")[0] if fence else answer
    head = f"def {row['entry_point']}"
    if head in block:
        return f"{row['prompt'].partition(head)[0]}{block.strip()}\n"
    return f"{row['prompt']}{block.rstrip()}\n"


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path


def write_samples(path: Path, questions: Sequence[Question], answers: dict[int, list[str]], model: str) -> Path:
    """Samples as evalplus reads them: `task_id` and `solution`."""
    lines = [
        {"task_id": question.key, "solution": solution(question.row, answer)}
        for place, question in enumerate(questions)
        for answer in answers[place]
    ]
    return _write_lines(path, lines)


def write_talks(path: Path, questions: Sequence[Question], answers: dict[int, list[str]], model: str) -> Path:
    """Conversations as FastChat's judge reads them."""
    lines = []
    for place, question in enumerate(questions):
        turns = answers[place]
        lines.append(
            {
                "question_id": question.key,
                "answer_id": hashlib.sha256("\0".join([model, str(question.key), *turns]).encode()).hexdigest()[:22],
                "model_id": model,
                "choices": [{"index": 0, "turns": turns}],
                "tstamp": time.time(),
            }
        )
    return _write_lines(path, lines)


EXPORTS: dict[str, Callable[..., Path]] = {"humaneval": write_samples, "mt_bench": write_talks}


def check_evalplus(limit: int | None) -> None:
    """Say before any work that evalplus will not judge.

    Args:
        limit: how many of the problems are asked; None is all.

    Raises:
        ImportError: evalplus is not installed.
        ValueError: there is a limit.
    """
    if find_spec("evalplus") is None:
        raise ImportError("Running generated code needs evalplus: pip install evalplus.")
    if limit is not None:
        raise ValueError(
            "--run-code: evalplus judges HumanEval whole or not at all. Leave out --limit, or --run-code."
        )


def run_evalplus(samples: Path) -> dict[str, Any]:
    """Run the generated code by evalplus, with the rights of this process, and read its verdicts.

    Returns:
        `score` and `interval` for HumanEval's tests, `plus_score` and `plus_interval` for HumanEval+'s, in per cent.

    Raises:
        OSError: evalplus gave no verdicts.
    """
    verdicts = samples.with_name(f"{samples.stem}_eval_results.json")
    verdicts.unlink(missing_ok=True)  # evalplus would take them for those of these samples
    command = [sys.executable, "-m", "evalplus.evaluate", "--dataset", "humaneval", "--samples", str(samples)]
    # what generated code writes past evalplus's guard has no end and need not be text, and processes that it leaves
    # behind keep a pipe open
    with tempfile.TemporaryFile() as errors:
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=errors)
        errors.seek(max(0, errors.seek(0, os.SEEK_END) - _LAST_WORDS))
        last = errors.read().decode(errors="replace").strip() or "it said nothing"
    if not verdicts.is_file():
        raise OSError(f"evalplus gave no verdicts on {samples}: {last.splitlines()[-1]}")
    return _pass_at_one(json.loads(verdicts.read_text(encoding="utf-8"))["eval"])


def _pass_at_one(verdicts: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    figures: dict[str, Any] = {"total": len(verdicts)}
    passed = {
        "": [[each["base_status"] == "pass" for each in task] for task in verdicts.values()],
        "plus_": [
            [each["base_status"] == each["plus_status"] == "pass" for each in task] for task in verdicts.values()
        ],
    }
    for name, tasks in passed.items():
        share = sum(sum(task) / len(task) for task in tasks) / len(tasks)
        figures[f"{name}score"] = round(100 * share, 2)
        figures[f"{name}interval"] = [round(100 * end, 2) for end in wilson(share, len(tasks))]
    return figures
