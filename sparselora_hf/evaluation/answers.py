"""Answers on disk, batch by batch, so that an evaluation that was ended goes on where it was.

The first line of the file holds the settings that answers depend on; each further line is one answered question. A
line that was cut short, and with it the batch that was under way, is answered again.
"""

import json
import os
from pathlib import Path
from typing import Any

from ..files import write_atomically

__all__ = ["AnswerFile"]


class AnswerFile:
    """Answers of one task, written as they come.

    Args:
        path: the file; it and its folder are made where they are missing.
        settings: what the answers depend on, as plain values.
        overwrite: start anew, whatever is there.

    Attributes:
        answers: question number to answer, those of earlier runs included.

    Raises:
        ValueError: the file was written under other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any], overwrite: bool = False) -> None:
        self.path = path
        self.answers: dict[int, list[str]] = {}
        lines = [] if overwrite or not path.exists() else _whole_lines(path)
        if lines:
            _check_same(path, lines[0], settings)
            self.answers = {line["question"]: line["answers"] for line in lines[1:]}
        whole = "".join(f"{json.dumps(line)}\n" for line in [settings, *lines[1:]])
        write_atomically(path, whole.encode())

    def add(self, answers: dict[int, list[str]]) -> None:
        """Append the answers of one batch."""
        lines = [json.dumps({"question": number, "answers": texts}) + "\n" for number, texts in answers.items()]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))
            file.flush()
            os.fsync(file.fileno())
        self.answers.update(answers)


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    *lines, _ = path.read_text(encoding="utf-8").split("\n")  # what follows the last line break was cut short
    return [json.loads(line) for line in lines]


def _check_same(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    changed = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    if changed:
        name = changed[0]
        raise ValueError(
            f"{path} holds answers given with {name} = {before.get(name)!r}, now it is {now.get(name)!r}. "
            "Add --overwrite to start anew, or choose another --output."
        )
