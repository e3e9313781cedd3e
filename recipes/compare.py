"""Dense and sparse fine-tuning from one recipe, with the same seed and data, as the paper's table.

    python recipes/compare.py --config recipes/math10k/llama-3-8b.yaml
    python recipes/compare.py --config ... --methods lora sparselora qlora sparseqlora --max_steps 500
    python recipes/compare.py --smoke

Every method trains in a process of its own. Times are wall clock: *whole run* is attaching (SVD included) and all of
training, dense warm-up steps and fits included, evaluations not; *step* is the median of the sparse phase. The loss of
*time to loss* is the lowest evaluation loss that every method reached. Scores are those of the recipe's `eval_tasks`.
Flags of `sparselora sft` may follow and win over the recipe. Writes `compare.csv`, `compare.png` and one adapter per
method.
"""

import argparse
import csv
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparselora_hf.cli.main import guarded
from sparselora_hf.cli.settings import positive

METHODS = {
    "lora": ("LoRA", ["--dense"]),
    "sparselora": ("SparseLoRA", []),
    "qlora": ("QLoRA", ["--dense", "--load_in_4bit"]),
    "sparseqlora": ("SparseQLoRA", ["--load_in_4bit"]),
    "dora": ("DoRA", ["--dense", "--use_dora"]),
    "sparsedora": ("SparseDoRA", ["--use_dora"]),
}
DEFAULT = Path(__file__).parent / "math10k" / "llama-3-8b.yaml"
ROWS = (  # key, label, format, factor
    ("flops_sparse", "FLOPs of the linears, sparse phase", ".0%", 1),
    ("flops_run", "FLOPs of the linears, whole run", ".0%", 1),
    ("step_seconds", "step, sparse phase, ms", ",.0f", 1e3),
    ("step_speedup", "  speed-up", ".2f", 1),
    ("attach_seconds", "attaching, s", ".1f", 1),
    ("run_seconds", "whole run with attaching, s", ".1f", 1),
    ("run_speedup", "  speed-up", ".2f", 1),
    ("loss_seconds", "time to loss {loss}, s", ".1f", 1),
    ("loss_speedup", "  speed-up", ".2f", 1),
    ("eval_loss", "final evaluation loss", ".4f", 1),
    ("peak_memory", "peak memory, MiB", ",.0f", 2**-20),
)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Own flags, and those for `sparselora sft`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=["lora", "sparselora"], help="first: baseline"
    )
    parser.add_argument("--held-out", type=positive, default=200, help="rows for the loss that no method trains on")
    parser.add_argument("--evaluations", type=positive, default=10, help="evaluations during a run")
    parser.add_argument("--output-dir", "--output_dir", type=Path, default=Path("runs/compare"))
    own, others = parser.parse_known_args(argv)
    if not any(flag.startswith("--config") for flag in others):
        others = ["--config", str(DEFAULT), *others]
    return own, others


def run(method: str, own: argparse.Namespace, others: list[str]) -> tuple[Any, dict[str, float]]:
    """Train, measure and evaluate one method.

    Returns:
        Its `Outcome`, and the score of each of the recipe's tasks in per cent.
    """
    from sparselora_hf.cli import sft
    from sparselora_hf.comparison import measure

    name, flags = METHODS[method]
    measured = ["--logging_steps", "1", "--save_strategy", "no", "--eval_strategy", "no", "--disable_tqdm", "true"]
    recipe = sft.prepare([*others, *flags, *measured, "--output_dir", str(own.output_dir / method)])
    if recipe.data.dense != ("--dense" in flags):
        raise ValueError(f"dense: {name} would not be what is trained. Leave it out, --methods says what is dense.")
    keywords = sft.trainer_keywords(recipe)
    rows, held_out = split(keywords["train_dataset"], own.held_out)
    training = recipe.training
    training.eval_strategy, training.eval_on_start, training.eval_steps = "steps", True, 1 / own.evaluations
    keywords |= {"train_dataset": rows, "eval_dataset": held_out}
    outcome = measure(name, lambda callbacks: sft.make_trainer(recipe, {**keywords, "callbacks": callbacks}))
    return outcome, sft.evaluate(recipe)


def split(rows: Any, held_out: int) -> tuple[Any, Any]:
    """Rows to train on, and the last ones, at most a fifth of all, to evaluate on.

    Raises:
        ValueError: there are too few rows.
    """
    kept = len(rows) - min(held_out, len(rows) // 5)
    if kept == len(rows):
        raise ValueError(f"{len(rows)} rows are too few to hold some out for evaluation. Give five or more.")
    return rows.select(range(kept)), rows.select(range(kept, len(rows)))


def figures(outcomes: Sequence[Any], scores: Sequence[dict[str, float]]) -> list[dict[str, Any]]:
    """One row per method; speed-ups are over the first."""
    from sparselora_hf.comparison import shared_loss

    loss = shared_loss(outcomes)
    first = max(outcome.first_sparse or 0 for outcome in outcomes)
    base, rows = outcomes[0], []
    tasks = dict.fromkeys(task for score in scores for task in score)  # a folder may hold some of an earlier run
    for outcome, score in zip(outcomes, scores, strict=True):
        step, reached = outcome.step(first), outcome.seconds_to(loss)
        rows.append(
            {
                "method": outcome.name,
                "flops_sparse": statistics.mean(outcome.flops[first:]),
                "flops_run": statistics.mean(outcome.flops),
                "step_seconds": step.wall,
                "step_speedup": base.step(first).wall / step.wall,
                "step_speedup_cpu": base.step(first).cpu / step.cpu,
                "attach_seconds": outcome.attach_seconds,
                "run_seconds": outcome.total_seconds,
                "run_speedup": base.total_seconds / outcome.total_seconds,
                "shared_loss": loss,
                "loss_seconds": reached,
                "loss_speedup": base.seconds_to(loss) / reached,
                "eval_loss": outcome.evaluations[-1].loss,
                "peak_memory": outcome.memory,
                **{f"score_{task}": score.get(task) for task in tasks},
                "first_sparse_step": None if outcome.first_sparse is None else outcome.first_sparse + 1,
                "steps": len(outcome.steps),
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> Any:
    """The figures with methods as columns."""
    from rich.table import Table

    result = Table(title=f"{rows[0]['steps']} steps, the same recipe, seed and data", title_justify="left")
    result.add_column("")
    for row in rows:
        result.add_column(row["method"], justify="right")
    scores = [(key, f"{key.removeprefix('score_')}, %", ".1f", 1) for key in rows[0] if key.startswith("score_")]
    for key, label, form, factor in (*ROWS, *scores):
        cells = ("n/a" if row[key] is None else format(row[key] * factor, form) for row in rows)
        result.add_row(label.format(loss=f"{rows[0]['shared_loss']:.4f}"), *cells)
    return result


def main(argv: Sequence[str]) -> int:
    """Run the methods one after another, then write and print what was measured."""
    from rich.console import Console

    from sparselora_hf.comparison import draw, in_fresh_process

    own, others = parse(argv)
    console = Console()
    measured = []
    for method in own.methods:
        with console.status(METHODS[method][0]):
            measured.append(in_fresh_process(run, method, own, others))
    outcomes, scores = zip(*measured, strict=True)
    rows = figures(outcomes, scores)
    with (own.output_dir / "compare.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw(own.output_dir / "compare.png", outcomes)
    console.print(table(rows))
    console.print(f"Table, picture and adapters: {own.output_dir.resolve()}")
    return 0


if __name__ == "__main__":
    raise SystemExit(guarded(main, sys.argv[1:]))
