"""The tasks that `sparselora eval` knows: where their questions are, how they are asked, when an answer is right."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..arc import conversation, read_grid
from .scoring import chosen, is_number, last_number

__all__ = ["GROUPS", "TASKS", "Question", "Task", "find_tasks", "load_questions"]

_LLM_ADAPTERS = "https://raw.githubusercontent.com/AGI-Edgerunners/LLM-Adapters/main/dataset/{}/test.json"
_MT_BENCH = "https://raw.githubusercontent.com/lm-sys/FastChat/main/fastchat/llm_judge/data/mt_bench/question.jsonl"


@dataclasses.dataclass(frozen=True)
class Question:
    """One question.

    Args:
        key: its name in the benchmark, or its number.
        turns: what is asked, one turn after the other: text that the adapter's prompt format goes around, or whole
            conversations.
        target: the right answer, as the task compares it; None where others judge.
        row: the row that it was made of.
    """

    key: Any
    turns: list[Any]
    target: Any
    row: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Task:
    """One benchmark.

    Args:
        name: name on the command line, and of its file in a folder of data.
        source: where it is fetched from.
        read: makes a row's questions, given its number.
        columns: columns that a row must have; of a tuple among them, one.
        right: whether an answer is right; None where others judge.
        new_tokens: most tokens of an answer.
        example: a row, by way of description; `--smoke` asks it.
        prompt_format: how questions are asked where the adapter does not say.
        samples: answers to a question.
        temperature: how freely they are drawn.
    """

    name: str
    source: str
    read: Callable[[int, Mapping[str, Any]], list[Question]]
    columns: tuple[str | tuple[str, ...], ...]
    right: Callable[[str, Any], bool] | None
    new_tokens: int
    example: Mapping[str, Any]
    prompt_format: str = "llm_adapters"
    samples: int = 1
    temperature: float = 0.0


def _number_question(number: int, row: Mapping[str, Any]) -> list[Question]:
    text = row["question"] if "question" in row else row["instruction"]
    answer = str(row["answer"]).rsplit("####", 1)[-1]  # GSM8K's own rows show the way to it
    target = last_number(answer)
    if target is None:
        raise ValueError(f"Row {number}: the answer {row['answer']!r} is no number.")
    return [Question(number, [text], target, row)]


def _arithmetic(name: str, folder: str) -> Task:
    row = {"instruction": "Tom has 3 apples and buys 4 more. How many has he?", "answer": "7.0"}
    columns = (("instruction", "question"), "answer")
    return Task(name, _LLM_ADAPTERS.format(folder), _number_question, columns, is_number, 256, row)


def _choice(name: str, folder: str, *options: str) -> Task:
    def read(number: int, row: Mapping[str, Any]) -> list[Question]:
        if row["answer"] not in options:
            raise ValueError(f"Row {number}: the answer {row['answer']!r} is not one of {', '.join(options)}.")
        return [Question(number, [row["instruction"]], row["answer"], row)]

    def right(answer: str, target: str) -> bool:
        return chosen(answer, options) == target

    asked = f"Please choose the correct answer: is water wet?\n\nAnswer format: {'/'.join(options)}"
    row = {"instruction": asked, "answer": options[0]}
    return Task(name, _LLM_ADAPTERS.format(folder), read, ("instruction", "answer"), right, 32, row)


def _numbered(word: str, count: int) -> tuple[str, ...]:
    return tuple(f"{word}{number}" for number in range(1, count + 1))


def _code_question(number: int, row: Mapping[str, Any]) -> list[Question]:
    text = f"Complete this Python function. Answer with the whole function.\n\n```python\n{row['prompt']}```"
    return [Question(row["task_id"], [text], None, row)]


def _talk_question(number: int, row: Mapping[str, Any]) -> list[Question]:
    return [Question(row["question_id"], list(row["turns"]), None, row)]


def _grid_questions(number: int, row: Mapping[str, Any]) -> list[Question]:
    name = row.get("name", number)
    if not row["test"] or not all(pair.get("output") for pair in row["test"]):
        raise ValueError(f"Row {number}: the task {name} has no test, or one without its output.")
    return [
        Question(f"{name}/{place}", [conversation(row["train"], pair["input"])], pair["output"], row)
        for place, pair in enumerate(row["test"])
    ]


def _same_grid(answer: str, target: list[list[int]]) -> bool:
    return read_grid(answer) == target


_FLIP = {"input": [[1, 0]], "output": [[0, 1]]}

_MATH = (_arithmetic("gsm8k", "gsm8k"), _arithmetic("svamp", "SVAMP"), _arithmetic("mawps", "mawps"))
_COMMONSENSE = (
    _choice("boolq", "boolq", "true", "false"),
    _choice("piqa", "piqa", *_numbered("solution", 2)),
    _choice("social_i_qa", "social_i_qa", *_numbered("answer", 5)),
    _choice("hellaswag", "hellaswag", *_numbered("ending", 4)),
    _choice("winogrande", "winogrande", *_numbered("option", 2)),
    _choice("arc_easy", "ARC-Easy", *_numbered("answer", 5)),
    _choice("arc_challenge", "ARC-Challenge", *_numbered("answer", 5)),
    _choice("openbookqa", "openbookqa", *_numbered("answer", 5)),
)

TASKS = {
    task.name: task
    for task in (
        *_MATH,
        *_COMMONSENSE,
        Task(
            "humaneval",
            "openai/openai_humaneval",
            _code_question,
            ("task_id", "prompt", "entry_point"),
            None,
            512,
            {"task_id": "HumanEval/0", "prompt": "def one():\n    '''One.'''\n", "entry_point": "one"},
            prompt_format="code_feedback",
        ),
        Task(
            "mt_bench",
            _MT_BENCH,
            _talk_question,
            ("question_id", "category", "turns"),
            None,
            1024,
            {"question_id": 81, "category": "writing", "turns": ["Write a line.", "Now in rhyme."]},
            prompt_format="evol_instruct",
        ),
        Task(
            "arc_agi",
            "",
            _grid_questions,
            ("train", "test"),
            _same_grid,
            2048,
            {"train": [_FLIP, _FLIP], "test": [_FLIP]},
            prompt_format="chat",
            samples=2,
            temperature=1.0,
        ),
    )
}

GROUPS = {
    group: tuple(task.name for task in tasks) for group, tasks in (("math", _MATH), ("commonsense", _COMMONSENSE))
}

_ALIASES = {
    "siqa": "social_i_qa",
    "arc-easy": "arc_easy",
    "arc-challenge": "arc_challenge",
    "social-iqa": "social_i_qa",
}


def find_tasks(names: list[str]) -> list[Task]:
    """Tasks by name, groups unfolded.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    found: list[Task] = []
    for name in names:
        key = _ALIASES.get(name.lower(), name.lower())
        if key not in TASKS and key not in GROUPS:
            known = ", ".join([*TASKS, *GROUPS])
            raise ValueError(f"There is no task {name!r}. Tasks: {known}, and lm_eval:NAME for those of lm-eval.")
        found += [TASKS[each] for each in GROUPS.get(key, (key,))]
    return found


def load_questions(task: Task, data: str | None, limit: int | None = None) -> list[Question]:
    """Questions of a task.

    Args:
        task: the task.
        data: file, folder or name on the hub; None fetches the task's own. A folder holds one file a task, named
            after it, or LLM-Adapters' layout, ``boolq/test.json``.
        limit: take the rows at the start, this many.

    Raises:
        OSError: the data cannot be reached.
        ValueError: a column is missing, or an answer is none.
    """
    from ..prompts import READERS, read_rows

    source = task.source if data is None else _file_of(task, Path(data)) if Path(data).is_dir() else data
    if not source:
        raise ValueError(f"{task.name} has no data of its own to fetch. Name a file of tasks: --data FILE.")
    try:
        # a file has one split, `train`; a name on the hub may have a dot too
        rows = read_rows(source, "train" if Path(source).suffix.lower() in READERS else "test")
    except OSError as error:
        raise OSError(
            f"The data of {task.name}, {source}, cannot be reached ({type(error).__name__}). Without a network give a "
            "file or folder: --data PATH."
        ) from error
    _check_columns(task, source, rows.column_names)
    rows = rows if limit is None else rows.take(min(limit, len(rows)))
    return [question for number, row in enumerate(rows) for question in task.read(number, row)]


def _file_of(task: Task, folder: Path) -> str:
    stem = task.source.rsplit("/", 2)[-2] if task.source.endswith("/test.json") else task.name
    names = {task.name, stem, f"{task.name}_test", "HumanEval" if task.name == "humaneval" else task.name}
    paths = [folder / f"{name}{end}" for name in sorted(names) for end in (".json", ".jsonl", "/test.json")]
    there = [path for path in paths if path.is_file()]
    if not there:
        raise FileNotFoundError(
            f"{folder} holds no data of {task.name}: no {task.name}.json, {task.name}.jsonl or {stem}/test.json."
        )
    return str(there[0])


def _check_columns(task: Task, source: str, there: list[str]) -> None:
    for column in task.columns:
        if not set(column if isinstance(column, tuple) else (column,)) & set(there):
            name = " or ".join(column) if isinstance(column, tuple) else column
            raise ValueError(f"{task.name} needs the column {name}. {source} has: {', '.join(there)}.")
