"""ARC-AGI tasks as text, and the rows of their test-time training.

A task is ``{"train": [{"input": grid, "output": grid}, ...], "test": [...]}``, grids being lists of rows of 0 to 9, as
in fchollet/ARC-AGI. Prompts are those that the transduction models of BARC were trained on (arXiv 2411.02272), which
the paper starts from: a cell is the name of its colour. Test-time training (arXiv 2411.07279) leaves out one example
of a task after the other, in turned, mirrored and recoloured copies.
"""

import random
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["COLORS", "conversation", "grid_text", "read_grid", "training_rows"]

COLORS = ("Black", "Blue", "Red", "Green", "Yellow", "Gray", "Pink", "Orange", "Purple", "Brown")

Grid = list[list[int]]

_SYSTEM = (
    "You are a world-class puzzle solver with exceptional pattern recognition skills. Your task is to analyze "
    "puzzles, spot patterns, and provide direct solutions."
)
_OPENING = (
    "Given input-output grid pairs as reference examples, carefully observe the patterns to predict the output grid "
    "for new test input. Each pair follows the same transformation rule. Grids are 2D arrays represented as strings, "
    "with cells (colors) separated by spaces and rows by newlines.\n"
    "Here are the input and output grids for the reference examples:\n"
)
_CLOSING = (
    "\n\nDirectly provide the output grids corresponding to the given test input grids, based on the patterns "
    "observed in the reference examples."
)
_ANSWER = "The output grid for the test input grid is:\n\n```\n{}\n```"


def grid_text(grid: Grid) -> str:
    """A grid as rows of colour names."""
    return "\n".join(" ".join(COLORS[cell] for cell in row) for row in grid)


def read_grid(text: str) -> Grid | None:
    """The last grid of colour names in a text, None where there is none or its rows differ in length."""
    blocks: list[Grid] = [[]]
    for line in text.replace("Grey", "Gray").split("\n"):
        words = line.split()
        if words and all(word in COLORS for word in words):
            blocks[-1].append([COLORS.index(word) for word in words])
        elif blocks[-1]:
            blocks.append([])
    grids = [block for block in blocks if block]
    return grids[-1] if grids and len({len(row) for row in grids[-1]}) == 1 else None


def conversation(examples: list[Mapping[str, Grid]], test_input: Grid) -> list[dict[str, str]]:
    """System and user message that ask for one output grid."""
    shown = "".join(
        f"Example {number}\nInput:\n{grid_text(pair['input'])}\n\nOutput:\n{grid_text(pair['output'])}\n\n\n"
        for number, pair in enumerate(examples, 1)
    )
    asked = f"Here is the input grid for the test example:\nInput:\n{grid_text(test_input)}\n"
    return [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": f"{_OPENING}{shown}{asked}{_CLOSING}"}]


def training_rows(task: Mapping[str, Any], copies: int = 8, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Rows to train on at test time: every example left out in turn, the others shown; the task's tests stay unseen.

    Args:
        task: the task.
        copies: copies of the task, the first one as it is, the others changed at random.
        seed: seed of the changes.

    Yields:
        Rows with a conversational `prompt` and `completion`.
    """
    draw = random.Random(seed)
    for copy in range(copies):
        pairs = [dict(pair) for pair in task["train"]]
        if copy:
            turns, mirrored, colors = draw.randrange(4), draw.random() < 0.5, [0, *draw.sample(range(1, 10), 9)]
            pairs = [{k: _changed(grid, turns, mirrored, colors) for k, grid in pair.items()} for pair in pairs]
            draw.shuffle(pairs)
        for left_out, pair in enumerate(pairs):
            shown = pairs[:left_out] + pairs[left_out + 1 :]
            answer = {"role": "assistant", "content": _ANSWER.format(grid_text(pair["output"]))}
            yield {"prompt": conversation(shown, pair["input"]), "completion": [answer]}


def _changed(grid: Grid, turns: int, mirrored: bool, colors: list[int]) -> Grid:
    rows = [row[::-1] for row in grid] if mirrored else grid
    for _ in range(turns):
        rows = [list(row) for row in zip(*rows[::-1], strict=True)]
    return [[colors[cell] for cell in row] for row in rows]
