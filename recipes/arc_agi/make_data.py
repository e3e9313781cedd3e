"""Rows of test-time training and test questions from ARC-AGI's task files (github.com/fchollet/ARC-AGI).

    python recipes/arc_agi/make_data.py ARC-AGI/data/evaluation --output arc_agi

Writes `train.jsonl`, conversations made of the tasks' own examples, and `arc_agi.jsonl`, the tasks with their tests,
for `sparselora eval --task arc_agi --data arc_agi`. No test input or output is trained on.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparselora_hf.arc import training_rows


def read(path: Path) -> dict[str, Any]:
    """A task.

    Raises:
        ValueError: the file holds none.
    """
    try:
        task = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(task, dict) or not {"train", "test"} <= task.keys():
        raise ValueError(f"{path} is no task: it needs the keys train and test.")
    return task


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tasks", type=Path, help="folder with one JSON file a task")
    parser.add_argument("--output", type=Path, default=Path("arc_agi"))
    parser.add_argument("--copies", type=int, default=8, help="changed copies of a task")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    files = sorted(args.tasks.glob("*.json"))
    if not files:
        raise FileNotFoundError(f"{args.tasks} holds no task, no file *.json.")
    tasks = {path.stem: read(path) for path in files}
    rows = [
        row
        for number, task in enumerate(tasks.values())
        for row in training_rows(task, args.copies, args.seed + number)
    ]
    questions = [{"name": name, "train": task["train"], "test": task["test"]} for name, task in tasks.items()]
    args.output.mkdir(parents=True, exist_ok=True)
    for name, lines in (("train", rows), ("arc_agi", questions)):
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        (args.output / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    from sparselora_hf.cli.main import guarded

    raise SystemExit(guarded(main, sys.argv[1:]))
