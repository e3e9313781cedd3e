"""Prompt formats: one row of a dataset as `prompt` and `completion`, the split that makes context and output tokens.

`llm_adapters` is the text that the paper trains on for Math10K and Commonsense170K, byte for byte as its reference
code builds it (z-lab/sparselora, spft/data.py; the layout is LLM-Adapters', arXiv 2304.01933): every line but the
first is indented by sixteen spaces, and the first one ends in two. `alpaca` is the same template at the margin, as the
reference uses it for code and instruction following (spft/utils/data.py), where a space comes before the answer.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

__all__ = [
    "FORMATS",
    "PromptFormat",
    "alpaca",
    "code_feedback",
    "evol_instruct",
    "llm_adapters",
    "question_answer",
]

_TASK = "Below is an instruction that describes a task"
_REQUEST = "Write a response that appropriately completes the request."
_WITH_INPUT = f"{_TASK}, paired with an input that provides further context. {_REQUEST}"
_INDENT = " " * 16
_REFUSALS = ("sorry", "as an ai")  # answers that hold one are left out of WizardLM's data

Row = Mapping[str, Any]
Example = dict[str, str]


def _instruct(instruction: str, given: str = "") -> str:
    head, middle = (_WITH_INPUT, f"### Input:\n{given}\n\n") if given else (f"{_TASK}. {_REQUEST}", "")
    return f"{head}\n\n### Instruction:\n{instruction}\n\n{middle}### Response:\n"


def alpaca(row: Row, train_on: str = "output") -> Example:
    """Prompt from `instruction` and, where it is not empty, `input`; completion from the column `train_on`."""
    prompt = _instruct(row["instruction"].strip(), (row.get("input") or "").strip())
    return {"prompt": prompt, "completion": str(row[train_on]).strip()}


def llm_adapters(row: Row, train_on: str = "output") -> Example:
    """The paper's text for Math10K (`output`) and Commonsense170K (`answer`), nothing of the row stripped."""
    given = row.get("input") or ""
    head = _WITH_INPUT if given else f"{_TASK}. {_REQUEST}"
    lines = [
        "### Instruction:",
        row["instruction"],
        "",
        *(["### Input:", given, ""] if given else []),
        "### Response:",
    ]
    prompt = f"{head}  \n\n" + "".join(f"{_INDENT}{line}\n" for line in lines) + _INDENT
    return {"prompt": prompt, "completion": str(row[train_on])}


def question_answer(row: Row, train_on: str = "answer") -> Example:
    """Prompt from `question`, completion from `answer` (GSM8K)."""
    return {"prompt": f"Question: {row['question'].strip()}\nAnswer:", "completion": f" {row[train_on].strip()}"}


def code_feedback(row: Row, train_on: str = "answer") -> Example | None:
    """CodeFeedback: the answer ends with its first block of code; a row without one is left out."""
    text, fence, rest = row[train_on].partition("```")
    if not fence:
        return None
    block = rest.partition("```")[0]
    return {"prompt": _instruct(row["query"]), "completion": f" {text}```{block}```"}


def evol_instruct(row: Row, train_on: str = "output") -> Example | None:
    """WizardLM's evolved instructions; answers that refuse are left out."""
    if any(words in row[train_on].lower() for words in _REFUSALS):
        return None
    return {"prompt": _instruct(row["instruction"]), "completion": f" {row[train_on]}"}


@dataclasses.dataclass(frozen=True)
class PromptFormat:
    """A format and the columns that it reads beside the completion's.

    Args:
        build: makes an example of a row and the name of the completion's column, or None of a row to leave out.
        columns: columns of the prompt.
        completion: columns that may be completed with, the usual one first.
        leaves_out: whether some rows become no example.
    """

    build: Callable[[Row, str], Example | None]
    columns: tuple[str, ...]
    completion: tuple[str, ...]
    leaves_out: bool = False

    def column(self, train_on: str) -> str:
        """Column of the completion: the one asked for, where the format has a choice."""
        return train_on if train_on in self.completion else self.completion[0]

    def ask(self, question: str) -> str:
        """The prompt of a question that no row holds."""
        completion = "```"  # a completion that no format leaves out
        row = {"input": "", **dict.fromkeys(self.completion, completion), **dict.fromkeys(self.columns, question)}
        return self.build(row, self.completion[0])["prompt"]


FORMATS = {
    "alpaca": PromptFormat(alpaca, ("instruction",), ("output", "answer")),
    "code_feedback": PromptFormat(code_feedback, ("query",), ("answer",), leaves_out=True),
    "evol_instruct": PromptFormat(evol_instruct, ("instruction",), ("output",), leaves_out=True),
    "llm_adapters": PromptFormat(llm_adapters, ("instruction",), ("output", "answer")),
    "question_answer": PromptFormat(question_answer, ("question",), ("answer",)),
}
