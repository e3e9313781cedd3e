"""`sparselora quickstart`: the same small LoRA fine-tuning with `SFTTrainer` and with `SparseLoraTrainer`, compared.

Without options it runs offline on two CPU cores in under three minutes: a small Llama that comes with the package
answers questions about pages of a text world, in a form that it has not met before. With `--model` and `--dataset`
the same comparison runs on anything.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..formats import FORMATS
from .settings import configured, laid_over, positive

if TYPE_CHECKING:
    from ..comparison import Outcome

__all__ = ["ASSETS", "SPARSE", "Task", "main"]

FOLDERS = {"SFTTrainer": "dense", "SparseLoraTrainer": "sparse"}
ASSETS = Path(__file__).parents[1] / "assets" / "quickstart-llama"
# the embedded model has three layers; the last one's MLP needs no sparsity, its context rows are left out anyway
SPARSE = {
    "mlp_sparsity": {"0-1": 0.9},
    "criterion": "static",
    "compensation": "low_rank",
    "compensation_rank": 32,
}


@dataclasses.dataclass(frozen=True)
class Task:
    """What both trainers are given.

    Args:
        model: name or folder of the model.
        train: rows with `prompt` and `completion`.
        test: held-out rows for exact match.
        steps: optimizer steps.
        batch: rows of a step.
        learning_rate: peak of the cosine.
        max_length: tokens at which rows are cut.
        sparse: sparse configuration, or None for the default of the model.
        seed: seed of adapters and data order.
        folder: output folder.
    """

    model: str
    train: list[dict[str, str]]
    test: list[dict[str, str]]
    steps: int
    batch: int
    learning_rate: float
    max_length: int
    sparse: Any
    seed: int
    folder: Path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sparselora quickstart",
        description=__doc__.partition("\n\n")[0].partition(": ")[2],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output-dir", type=Path, default=Path("sparselora-quickstart"), help="where results go")
    parser.add_argument("--model", default=str(ASSETS), help="hub name or folder of a causal model")
    parser.add_argument("--dataset", help="hub name, folder or file with prompt and completion columns")
    formats = ", ".join([*sorted(FORMATS), "text_split"])
    parser.add_argument("--prompt-format", help=f"how rows become prompt and completion, if they are not: {formats}")
    parser.add_argument("--steps", type=positive, default=70, help="optimizer steps of each trainer")
    parser.add_argument("--batch", type=positive, default=16, help="rows of a step")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak of a cosine schedule")
    parser.add_argument("--max-length", type=positive, default=512, help="tokens at which rows are cut")
    parser.add_argument("--test-rows", type=int, default=200, help="held-out rows for exact match, 0 for none")
    parser.add_argument("--sparse-config", type=Path, help="YAML of settings; a schedule left out is a safe default's")
    parser.add_argument("--seed", type=int, default=0, help="of adapters, data and its order")
    return parser


def _task(args: argparse.Namespace) -> Task:
    if args.test_rows < 0:
        raise ValueError(f"test_rows: {args.test_rows} is below 0, which holds out none.")
    rows = args.steps * args.batch
    train, test = _embedded_rows(rows, args) if args.dataset is None else _given_rows(rows, args)
    return Task(
        model=args.model,
        train=train,
        test=test,
        steps=args.steps,
        batch=args.batch,
        learning_rate=args.learning_rate,
        max_length=args.max_length,
        sparse=_sparse(args),
        seed=args.seed,
        folder=args.output_dir,
    )


def _sparse(args: argparse.Namespace) -> Any:
    from ..config import SparseLoraConfig, read_settings

    default = SparseLoraConfig.from_dict(SPARSE) if args.model == str(ASSETS) else None
    if args.sparse_config is None:
        return default
    SparseLoraConfig.from_yaml(args.sparse_config)  # its errors name the file
    given = read_settings(args.sparse_config)
    if default is not None:
        return laid_over(given, default)
    from transformers import AutoConfig

    shape = AutoConfig.from_pretrained(args.model).get_text_config()
    return configured(given, shape.num_hidden_layers, shape.hidden_size)


def _model(name: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    # at the embedded model's size torch's fused attention has a backward several times slower than the plain one
    extra = {"attn_implementation": "eager"} if name == str(ASSETS) else {}
    # float32 where there is no accelerator: bfloat16 is about 80x slower in backward on CPUs without AVX-512 bf16
    dtype = "auto" if torch.accelerator.is_available() else torch.float32
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **extra)


def _embedded_rows(rows: int, args: argparse.Namespace) -> tuple[list, list]:
    from ..world import finetuning_examples

    return finetuning_examples(args.seed, rows, "train"), finetuning_examples(args.seed, args.test_rows, "test")


def _given_rows(rows: int, args: argparse.Namespace) -> tuple[list, list]:
    from ..prompts import load_examples

    wanted = rows + args.test_rows
    data = load_examples(args.dataset, split="train", prompt_format=args.prompt_format, max_examples=wanted)
    data = list(data)
    held_out = min(args.test_rows, len(data) // 5)
    return data[held_out:], data[:held_out]


def _arguments(task: Task, name: str) -> Any:
    import torch
    from trl import SFTConfig

    on_cpu = not torch.accelerator.is_available()
    return SFTConfig(
        str(task.folder / FOLDERS[name]),
        max_steps=task.steps,
        per_device_train_batch_size=task.batch,
        learning_rate=task.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, task.steps // 20),
        max_length=task.max_length,
        bf16=not on_cpu,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        gradient_checkpointing=not on_cpu,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=task.seed,
    )


def _train(task: Task, name: str) -> "Outcome":
    """Train with one of the two trainers, in this process."""
    from functools import partial

    from transformers import AutoTokenizer

    from ..comparison import exact_match, measure

    tokenizer = AutoTokenizer.from_pretrained(task.model, padding_side="left")

    def score(trainer: Any) -> float | None:
        return exact_match(trainer.model, tokenizer, task.test) if task.test else None

    return measure(name, partial(_build, task, name, tokenizer), score)


def _build(task: Task, name: str, tokenizer: Any, callbacks: list[Any]) -> Any:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTTrainer

    from ..trainer import SparseLoraTrainer

    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    keywords = {
        "args": _arguments(task, name),
        "train_dataset": Dataset.from_list(task.train),
        "processing_class": tokenizer,
        "peft_config": LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM"),
        "callbacks": callbacks,
    }
    if name == "SFTTrainer":
        return SFTTrainer(_model(task.model), **keywords)
    return SparseLoraTrainer(_model(task.model), **keywords, sparse_config=task.sparse)


def report(task: Task, dense: "Outcome", sparse: "Outcome", seconds: float) -> dict[str, Any]:
    """Everything that was measured, as it goes to `report.json`."""
    import torch

    from .. import __version__

    first = sparse.first_sparse or 0  # both medians are of the same steps: those after the sparse run's dense warm-up
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
    pair = {"dense": dense, "sparse": sparse}
    step = {name: outcome.step(first) for name, outcome in pair.items()}
    return {
        "speedup": round(step["dense"].wall / step["sparse"].wall, 3),
        "speedup_cpu": round(step["dense"].cpu / step["sparse"].cpu, 3),
        "speedup_run": round(dense.total_seconds / sparse.total_seconds, 3),
        "step_seconds": {name: round(value.wall, 4) for name, value in step.items()},
        "run_seconds": {name: round(outcome.total_seconds, 2) for name, outcome in pair.items()},
        "exact_match": {name: outcome.score for name, outcome in pair.items()},
        "loss": {name: round(outcome.loss, 4) for name, outcome in pair.items()},
        "peak_memory": {name: outcome.memory for name, outcome in pair.items()},
        "curves": {name: _curve(outcome) for name, outcome in pair.items()},
        "sparse_config": sparse.config,
        "channel_sparsity": sparse.sparsity,
        "first_sparse_step": first + 1,
        "steps": task.steps,
        "batch": task.batch,
        "seed": task.seed,
        "model": "quickstart-llama (ships with the package)" if task.model == str(ASSETS) else task.model,
        "device": device,
        "versions": {"sparselora_hf": __version__, "torch": torch.__version__},
        "seconds": round(seconds, 1),
    }


def _curve(outcome: "Outcome") -> dict[str, list[float]]:
    """Loss and process seconds of every step."""
    return {"loss": [round(x, 4) for x in outcome.losses], "cpu": [round(step.cpu, 4) for step in outcome.steps]}


def _table(figures: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title="SFTTrainer and SparseLoraTrainer on the same model, data and seed")
    for column in ("", "SFTTrainer", "SparseLoraTrainer", "ratio"):
        table.add_column(column, justify="left" if not column else "right")

    def row(label: str, values: dict[str, Any], form: str, ratio: str = "", scale: float = 1.0) -> None:
        cells = ["n/a" if values[k] is None else format(values[k] * scale, form) for k in ("dense", "sparse")]
        table.add_row(label, *cells, ratio)

    row("median step, ms", figures["step_seconds"], ".0f", f"{figures['speedup']:.2f}x faster", 1e3)
    row("whole run, s", figures["run_seconds"], ".1f", f"{figures['speedup_run']:.2f}x faster")
    row("training loss, last tenth", figures["loss"], ".4f")
    row("held-out exact match, %", figures["exact_match"], ".1f")
    row("peak memory, MiB", figures["peak_memory"], ".0f", scale=2**-20)
    table.add_row("channels dropped for context", "0 %", f"{figures['channel_sparsity']:.0%}", "")
    return table


def _outcome(console: Any, task: Task, name: str) -> "Outcome":
    from .. import comparison

    with console.status(f"{name}: {task.steps} steps, then {len(task.test)} held-out questions"):
        return comparison.in_fresh_process(_train, task, name)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; writes `report.json`, `report.png` and both adapters to the output folder."""
    args = _parser().parse_args(argv)
    from rich.console import Console

    from ..comparison import draw

    console = Console()
    start = time.perf_counter()
    task = _task(args)
    task.folder.mkdir(parents=True, exist_ok=True)
    dense, sparse = outcomes = [_outcome(console, task, name) for name in FOLDERS]
    figures = report(task, dense, sparse, time.perf_counter() - start)
    (task.folder / "report.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    draw(task.folder / "report.png", outcomes)
    console.print(_table(figures))
    console.print(f"{figures['seconds']:.0f} s in all. Report, picture and adapters: {task.folder.resolve()}")
    return 0
