"""`sparselora eval`: answer a benchmark's questions with an adapter and score the answers as the paper does.

Answers are written batch by batch: a run that was ended goes on where it was. Generated code is written, never run,
unless `--run-code` asks for it, and then by evalplus, whose guard stops accidents and no attack.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import write_atomically
from .settings import positive

__all__ = ["main"]

RESULTS = "results.json"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sparselora eval", description=__doc__.split("\n\n")[0])
    parser.add_argument("adapter", nargs="?", help="folder or hub name of the adapter; left out, the model alone")
    parser.add_argument(
        "--task", nargs="+", required=True, metavar="TASK", help="gsm8k, boolq, ..., math, commonsense, lm_eval:NAME"
    )
    parser.add_argument("--model", help="base model; left out, the adapter's own")
    parser.add_argument("--model-revision", default="main", help="branch, tag or commit of a base model on the hub")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the base model")
    parser.add_argument("--data", help="file, folder or hub name of the questions; left out, they are fetched")
    parser.add_argument("--output", type=Path, help="folder of results; left out, ADAPTER/eval or eval/HUB_NAME")
    parser.add_argument("--prompt-format", help="left out, that of the training or else the task's")
    parser.add_argument("--batch-size", type=positive, default=8)
    parser.add_argument("--limit", type=positive, help="ask the first so many rows")
    parser.add_argument("--max-new-tokens", type=positive, help="left out, the task's")
    parser.add_argument("--samples", type=positive, help="answers to each question; left out, the task's")
    parser.add_argument("--temperature", type=float, help="0 is greedy; left out, the task's")
    parser.add_argument("--top-p", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="auto", help="type of the weights")
    parser.add_argument(
        "--load-in-4bit", action="store_true", help="as QLoRA does, where the training noted no other way"
    )
    parser.add_argument(
        "--run-code", action="store_true", help="run generated code by evalplus, with your rights: use a container"
    )
    parser.add_argument("--overwrite", action="store_true", help="answer anew what was answered before")
    return parser


def _notes(folder: str) -> dict[str, Any]:
    """What `sparselora sft` noted beside an adapter, or a whole model: prompt format, settings of quantisation."""
    from ..config import read_settings
    from .recipe import DATA_FILE

    path = Path(folder) / DATA_FILE
    return read_settings(path) if path.is_file() else {}


def _sampling(task: Any, args: argparse.Namespace) -> Any:
    from ..evaluation.generate import Sampling

    given = {"new_tokens": args.max_new_tokens, "samples": args.samples, "temperature": args.temperature}
    usual = {name: getattr(task, name) if value is None else value for name, value in given.items()}
    return Sampling(**usual, top_p=args.top_p, seed=args.seed)


def _own_folder(name: str) -> Path:
    """Where answers of an adapter or model go; never to a folder of its name on the hub, which would stand for it."""
    return Path(name) / "eval" if Path(name).is_dir() else Path("eval") / name


class _Evaluation:
    """Tasks of one call, with the model that answers them, loaded once."""

    def __init__(self, args: argparse.Namespace, base: str, tasks: list[Any]) -> None:
        from ..evaluation.models import adapter_hash, weights_mark
        from ..evaluation.tasks import load_questions

        self.args, self.base = args, base
        self.output = args.output or _own_folder(args.adapter or base)
        self.sampling = {task.name: _sampling(task, args) for task in tasks}
        self.questions = {task.name: load_questions(task, args.data, args.limit) for task in tasks}
        for name, questions in self.questions.items():
            if self.sampling[name].samples > 1 and any(len(question.turns) > 1 for question in questions):
                raise ValueError(f"samples: in the conversations of {name} every turn has one answer. Leave it out.")
        self.adapter = adapter_hash(args.adapter) or args.adapter
        self.weights = weights_mark(base)
        self.notes = _notes(args.adapter or base)
        self._loaded: tuple[Any, Any] | None = None

    def model(self) -> tuple[Any, Any]:
        from ..evaluation.models import QLORA, load_model

        if self._loaded is None:
            args = self.args
            quantization = self.notes.get("quantization") or (QLORA if args.load_in_4bit else None)
            options = (args.dtype, quantization, args.model_revision, args.trust_remote_code)
            self._loaded = load_model(self.base, args.adapter, *options)
        return self._loaded

    def settings(self) -> dict[str, Any]:
        """What the results of every task depend on."""
        args = self.args
        told = {"model": self.base, "weights": self.weights, "adapter": self.adapter}
        told |= {"model_revision": args.model_revision, "batch_size": args.batch_size}
        told |= {"quantization": self.notes.get("quantization"), "load_in_4bit": args.load_in_4bit}
        return told | {"dtype": args.dtype, "limit": args.limit}

    def run(self, task: Any, progress: Any) -> dict[str, Any]:
        """Answer and score one task."""
        import dataclasses

        from ..evaluation.answers import AnswerFile
        from ..evaluation.asking import Asker
        from ..evaluation.exports import EXPORTS, run_evalplus
        from ..evaluation.generate import Generator
        from ..evaluation.run import answer_all, fingerprint, score

        args, questions, sampling = self.args, self.questions[task.name], self.sampling[task.name]
        model, tokenizer = self.model()
        prompt_format = args.prompt_format or self.notes.get("prompt_format") or task.prompt_format
        asker = Asker(prompt_format, tokenizer)
        settings = {"task": task.name, **self.settings(), "prompt_format": prompt_format}
        settings |= dataclasses.asdict(sampling)
        settings["questions"] = fingerprint([asker.prompt(question.turns, []) for question in questions])
        file = AnswerFile(self.output / f"{task.name}.answers.jsonl", settings, args.overwrite)
        answer_all(questions, asker, Generator(model, tokenizer, sampling), file, args.batch_size, progress)
        result = score(task, questions, file, self.output / f"{task.name}.scored.jsonl")
        if task.name in EXPORTS:
            path = self.output / f"{task.name}.jsonl"
            name = Path(args.adapter or self.base).name
            result = {"written": str(EXPORTS[task.name](path, questions, file.answers, name))}
            result |= run_evalplus(path) if args.run_code and task.name == "humaneval" else {}
        return {**result, "adapter": args.adapter, "settings": settings}


def _write(folder: Path, name: str, result: dict[str, Any]) -> None:
    """Add one task's result to those that the folder holds."""
    path = folder / RESULTS
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_atomically(path, json.dumps({**results, name: result}, indent=2, default=str).encode() + b"\n")


def _line(name: str, result: dict[str, Any]) -> str:
    if "score" in result:
        low, high = result["interval"]
        figures = f"{result['score']:6.2f} %  [{low:.1f}, {high:.1f}] of {result['total']}"
        plus = f", with evalplus's tests {result['plus_score']:.2f} %" if "plus_score" in result else ""
        return f"{name:14} {figures}{plus}"
    if "written" in result:
        return f"{name:14} answers in {result['written']}"
    return f"{name:14} " + ", ".join(f"{key} {value:.4g}" for key, value in result.items() if isinstance(value, float))


def main(argv: Sequence[str]) -> int:
    """Evaluate; a line for each task on the screen, everything in ``results.json``.

    Raises:
        ImportError, OSError, ValueError: an unknown task, an adapter of another model, data that is not fit.
    """
    args = _parser().parse_args(argv)
    from rich.console import Console

    from ..evaluation.exports import check_evalplus
    from ..evaluation.harness import PREFIX, check_harness, run_harness
    from ..evaluation.models import base_of
    from ..evaluation.tasks import find_tasks

    if args.adapter is None and args.model is None:
        raise ValueError("Name an adapter, or a model alone with --model.")
    foreign = [name.removeprefix(PREFIX) for name in args.task if name.startswith(PREFIX)]
    tasks = find_tasks([name for name in args.task if not name.startswith(PREFIX)])
    check_harness(foreign)
    if args.run_code and any(task.name == "humaneval" for task in tasks):
        check_evalplus(args.limit)
    own = base_of(args.adapter) if args.adapter else None
    evaluation = _Evaluation(args, args.model or own, tasks)
    console = Console(soft_wrap=True, markup=False, highlight=False)
    for task in tasks:
        result = _with_progress(evaluation, task, console)
        _write(evaluation.output, task.name, result)
        console.print(_line(task.name, result))
    for name in foreign:
        for each, figures in run_harness(name, evaluation.model, args.batch_size, args.limit).items():
            result = {**figures, "adapter": args.adapter, "settings": evaluation.settings()}
            _write(evaluation.output, PREFIX + each, result)
            console.print(_line(PREFIX + each, result))
    return 0


def _with_progress(evaluation: _Evaluation, task: Any, console: Any) -> dict[str, Any]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        row = bar.add_task(task.name, total=len(evaluation.questions[task.name]))
        return evaluation.run(task, lambda count: bar.advance(row, count))
