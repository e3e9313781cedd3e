"""ARC-AGI tasks as text and as rows of test-time training."""

import pytest

from sparselora_hf.arc import COLORS, conversation, grid_text, read_grid, training_rows

PAIRS = [
    {"input": [[0, 1, 2], [3, 4, 5]], "output": [[6, 7], [8, 9]]},
    {"input": [[1]], "output": [[2, 2]]},
    {"input": [[5, 5]], "output": [[0]]},
]
TASK = {"train": PAIRS, "test": [{"input": [[7, 7, 7]], "output": [[3]]}]}


def test_grids_go_to_text_and_back():
    grid = [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert grid_text(grid) == "Black Blue Red Green Yellow\nGray Pink Orange Purple Brown"
    assert read_grid(f"The output grid is:\n\n```\n{grid_text(grid)}\n```\nDone.") == grid


@pytest.mark.parametrize(
    ("text", "grid"),
    [
        ("Blue Red\n\nthen\nGreen", [[3]]),
        ("Grey", [[5]]),
        ("Blue Red\nBlue", None),
        ("the Blue cell moves", None),
        ("", None),
    ],
    ids=["the last", "grey", "ragged", "prose", "empty"],
)
def test_odd_answers(text, grid):
    assert read_grid(text) == grid


def test_conversation_shows_examples_and_asks():
    """The layout that BARC's transduction models were trained on (arXiv 2411.02272)."""
    system, user = conversation(PAIRS[1:2], [[7]])
    assert system["role"] == "system"
    assert "reference examples:\nExample 1\nInput:\nBlue\n\nOutput:\nRed Red\n\n\nHere is the input" in user["content"]
    assert "test example:\nInput:\nOrange\n\n\nDirectly provide the output grids" in user["content"]


def test_every_example_is_left_out_once_and_tests_are_never_seen():
    rows = list(training_rows(TASK, copies=1))
    assert [row["completion"][0]["content"] for row in rows] == [
        f"The output grid for the test input grid is:\n\n```\n{grid_text(pair['output'])}\n```" for pair in PAIRS
    ]
    for row, pair in zip(rows, PAIRS, strict=True):
        asked = row["prompt"][1]["content"]
        assert asked.count("Example") == 2
        assert f"Output:\n{grid_text(pair['output'])}\n" not in asked
        assert f"Input:\n{grid_text(pair['input'])}\n\n\nDirectly" in asked
    assert not any("Orange Orange Orange" in row["prompt"][1]["content"] for row in rows)


def test_copies_are_of_the_same_shape_up_to_turning_and_repeat_with_their_seed():
    rows = list(training_rows(TASK, copies=6, seed=3))
    assert len(rows) == 18
    assert rows == list(training_rows(TASK, copies=6, seed=3))
    assert rows != list(training_rows(TASK, copies=6, seed=4))
    texts = {row["prompt"][1]["content"] for row in rows}
    assert len(texts) > 10
    for row in rows:
        grid = read_grid(row["completion"][0]["content"])
        shape = (len(grid), len(grid[0]))
        assert shape in {(2, 2), (1, 2), (2, 1), (1, 1)}
        assert all(0 <= cell < len(COLORS) for line in grid for cell in line)


def test_a_turned_copy_is_the_same_task():
    """A task that copies its input still copies it however it is turned, mirrored and coloured."""
    same = [{"input": grid, "output": grid} for grid in ([[1, 2], [3, 0]], [[4, 5, 6]])]
    for row in training_rows({"train": same, "test": []}, copies=8):
        asked = read_grid(row["prompt"][1]["content"].split("Directly")[0])
        assert asked == read_grid(row["completion"][0]["content"])
