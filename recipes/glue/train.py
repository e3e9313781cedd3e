"""GLUE with a plain `transformers.Trainer`, a classification head and `SparseLoraCallback`.

    python recipes/glue/train.py --config recipes/glue/llama-3-8b.yaml --task_name cola

The head reads the last token of a sequence: that token is dense, all others are context. Scores go to `results.json`.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparselora_hf import SparseLoraCallback
from sparselora_hf.cli.recipe import parse_groups
from sparselora_hf.cli.resume import run_to_end
from sparselora_hf.cli.settings import configured
from sparselora_hf.cli.smoke import make_model
from sparselora_hf.evaluation.interval import wilson


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    return float((predicted == labels).mean())


def f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """F1 of class 1."""
    hits = float(((predicted == 1) & (labels == 1)).sum())
    return 2 * hits / max(1.0, float((predicted == 1).sum() + (labels == 1).sum()))


def pearson(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Correlation; of two classes it is Matthews'. 0 where one side does not vary."""
    if predicted.std() == 0 or labels.std() == 0:
        return 0.0
    return float(np.corrcoef(predicted, labels)[0, 1])


def spearman(predicted: np.ndarray, labels: np.ndarray) -> float:
    return pearson(_ranks(predicted), _ranks(labels))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, ties sharing their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


Metrics = dict[str, Callable[[np.ndarray, np.ndarray], float]]
_BOTH: Metrics = {"accuracy": accuracy, "f1": f1}


@dataclasses.dataclass(frozen=True)
class Task:
    """Columns of a GLUE task, its number of classes (1: a score), its metrics and the epochs of the paper."""

    columns: tuple[str, ...]
    classes: int = 2
    metrics: Metrics = dataclasses.field(default_factory=lambda: {"accuracy": accuracy})
    epochs: int = 3
    validation: str = "validation"


TASKS = {
    "cola": Task(("sentence",), metrics={"matthews": pearson}),
    "mnli": Task(("premise", "hypothesis"), 3, validation="validation_matched"),
    "mrpc": Task(("sentence1", "sentence2"), metrics=_BOTH, epochs=5),
    "qnli": Task(("question", "sentence")),
    "qqp": Task(("question1", "question2"), metrics=_BOTH),
    "rte": Task(("sentence1", "sentence2")),
    "sst2": Task(("sentence",)),
    "stsb": Task(("sentence1", "sentence2"), 1, {"pearson": pearson, "spearman": spearman}),
    "wnli": Task(("sentence1", "sentence2"), epochs=5),
}


@dataclasses.dataclass
class GlueArguments:
    """Options beside those of the Trainer, LoRA and sparsity."""

    task_name: str = dataclasses.field(default="rte", metadata={"choices": sorted(TASKS)})
    data_folder: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "folder with TASK/train.jsonl and TASK/validation.jsonl (mnli: validation_matched.jsonl); "
            "left out, the hub"
        },
    )
    max_length: int = 128
    max_examples: int | None = None
    epochs: int | None = dataclasses.field(default=None, metadata={"help": "left out, the paper's for the task"})
    dense: bool = False
    smoke: bool = False
    smoke_shape: str | None = None

    def __post_init__(self) -> None:
        if self.max_examples is not None and self.max_examples < 1:
            raise ValueError(f"max_examples: {self.max_examples} is below 1.")


def read(args: GlueArguments, task: Task, split: str) -> Any:
    import datasets

    if args.smoke:
        rows = [{column: f"Line {number} of {column}." for column in task.columns} for number in range(16)]
        data = datasets.Dataset.from_list([{**row, "label": number % task.classes} for number, row in enumerate(rows)])
    elif args.data_folder:
        path = Path(args.data_folder) / args.task_name / f"{split}.jsonl"
        data = datasets.load_dataset("json", data_files=str(path), split="train")
    else:
        data = datasets.load_dataset("nyu-mll/glue", args.task_name, split=split)
    missing = [column for column in (*task.columns, "label") if column not in data.column_names]
    if missing:
        raise ValueError(
            f"{args.task_name} needs the column {missing[0]}. The data has: {', '.join(data.column_names)}."
        )
    return data if args.max_examples is None else data.take(min(args.max_examples, len(data)))


def encode(batch: dict[str, list], tokenizer: Any, columns: tuple[str, ...], max_length: int) -> dict[str, list]:
    return tokenizer(*(batch[column] for column in columns), truncation=True, max_length=max_length)


def make_trainer(args: GlueArguments, training: Any, model_args: Any, settings: dict[str, Any]) -> tuple:
    """Trainer and the sparsity in force, None when dense."""
    from peft import get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, set_seed
    from trl import get_peft_config, get_quantization_config

    task, name = TASKS[args.task_name], model_args.model_name_or_path
    if args.smoke and name is None:
        name = str(make_model(Path(training.output_dir) / "base", args.smoke_shape, ["Line 1 of sentence."]))
    if name is None:
        raise ValueError("Name a model: --model_name_or_path, or model_name_or_path in the recipe.")
    if not model_args.use_peft:
        raise ValueError("use_peft: GLUE trains LoRA adapters, dense or sparse. Leave it out.")
    if training.num_train_epochs != type(training).num_train_epochs:
        raise ValueError("num_train_epochs: here the task decides. Say epochs instead.")
    training.num_train_epochs = args.epochs or task.epochs
    tokenizer = AutoTokenizer.from_pretrained(name, revision=model_args.model_revision)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    set_seed(training.seed)  # head and adapters are drawn here, before the Trainer sets it
    model = AutoModelForSequenceClassification.from_pretrained(
        name,
        revision=model_args.model_revision,
        num_labels=task.classes,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
        quantization_config=get_quantization_config(model_args),
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    model_args.lora_task_type = "SEQ_CLS"
    model = get_peft_model(model, get_peft_config(model_args))
    if training.bf16 or training.fp16:
        # PEFT widens the adapters alone: in bfloat16 most steps would not move the head
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    train, test = (
        read(args, task, split).map(
            encode,
            batched=True,
            fn_kwargs={"tokenizer": tokenizer, "columns": task.columns, "max_length": args.max_length},
        )
        for split in ("train", task.validation)
    )
    text = model.config.get_text_config()
    sparse = None if args.dense else configured(settings, text.num_hidden_layers, text.hidden_size)

    def metrics(told: Any) -> dict[str, float]:
        predicted = told.predictions.squeeze(1) if task.classes == 1 else told.predictions.argmax(1)
        return {key: metric(predicted, told.label_ids) for key, metric in task.metrics.items()}

    trainer = Trainer(
        model,
        training,
        train_dataset=train,
        eval_dataset=test,
        processing_class=tokenizer,
        compute_metrics=metrics,
        callbacks=[] if sparse is None else [SparseLoraCallback(sparse)],
    )
    return trainer, sparse


def results(args: GlueArguments, figures: dict[str, float], total: int) -> dict[str, Any]:
    """Score in per cent, the mean of the task's metrics, with an interval where that is a share of rows."""
    names = list(TASKS[args.task_name].metrics)
    values = {name: figures[f"eval_{name}"] for name in names}
    result = {
        "task": args.task_name,
        **values,
        "score": round(100 * sum(values.values()) / len(values), 2),
        "total": total,
    }
    if names == ["accuracy"]:
        result["interval"] = [round(100 * end, 2) for end in wilson(values["accuracy"], total)]
    return result


def main(argv: Sequence[str]) -> int:
    from rich.console import Console
    from transformers import TrainingArguments
    from trl import ModelConfig

    args, training, model_args, settings = parse_groups(argv, (GlueArguments, TrainingArguments, ModelConfig), "glue")
    trainer, sparse = make_trainer(args, training, model_args, settings)
    _, was_done = run_to_end(trainer, training.resume_from_checkpoint)
    trainer.save_model(training.output_dir)
    if sparse is not None and trainer.is_world_process_zero():
        sparse.to_yaml(training.output_dir)
    figures = trainer.evaluate()
    if trainer.is_world_process_zero():
        result = results(args, figures, len(trainer.eval_dataset))
        path = Path(training.output_dir) / "results.json"
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        told = ", the run was done before" if was_done else ""
        Console(markup=False, highlight=False).print(
            f"{args.task_name}: {result['score']} %{told}, saved to {path.parent}"
        )
    return 0


if __name__ == "__main__":
    from sparselora_hf.cli.main import guarded

    raise SystemExit(guarded(main, sys.argv[1:]))
