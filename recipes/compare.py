"""Dense and sparse fine-tuning from one recipe, with the same seed and data, as the paper's table.

    python recipes/compare.py --config recipes/math10k/llama-3-8b.yaml
    python recipes/compare.py --config ... --methods lora sparselora qlora sparseqlora --max_steps 500
    python recipes/compare.py --smoke

Every method trains in a process of its own. Times are wall clock: *whole run* is attaching (SVD included) and all of
training, dense warm-up steps and fits included, evaluations not; *step* is the median of the sparse phase. The loss of
*time to loss* is the lowest evaluation loss that every method reached. Flags of `sparselora sft` may follow and win
over the recipe. Writes `compare.csv`, `compare.png` and one adapter per method.
"""

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparselora_hf.cli.main import guarded

METHODS = {
    "lora": ("LoRA", ["--dense"]),
    "sparselora": ("SparseLoRA", []),
    "qlora": ("QLoRA", ["--dense", "--load_in_4bit"]),
    "sparseqlora": ("SparseQLoRA", ["--load_in_4bit"]),
    "dora": ("DoRA", ["--dense", "--use_dora"]),
    "sparsedora": ("SparseDoRA", ["--use_dora"]),
}
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
    ("score", "held-out exact match, %", ".1f", 1),
    ("peak_memory", "peak memory, MiB", ",.0f", 2**-20),
)
SMOKE = """\
prompt_format: null
max_length: 512
lora_r: 16
lora_alpha: 32
lora_dropout: 0.0
lora_target_modules: [q_proj, k_proj, v_proj, o_proj]
attn_implementation: eager
per_device_train_batch_size: 8
max_steps: 10
learning_rate: 3.0e-3
gradient_checkpointing: false
report_to: none
save_strategy: "no"
sparselora: {mlp_sparsity: {0-1: 0.9}, criterion: static, compensation: low_rank, start_step: 2}
"""


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Own flags, and those for `sparselora sft`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=["lora", "sparselora"], help="first: baseline"
    )
    parser.add_argument("--held-out", type=int, default=200, help="rows that no method trains on, for the loss")
    parser.add_argument("--score-rows", type=int, default=0, help="of these, rows for exact match of greedy answers")
    parser.add_argument("--evaluations", type=int, default=10, help="evaluations during a run")
    parser.add_argument("--output-dir", "--output_dir", type=Path, default=Path("runs/compare"))
    parser.add_argument("--smoke", action="store_true", help="a tiny run on a CPU with the quickstart's model")
    own, others = parser.parse_known_args(argv)
    return (own, smoke_flags(own) + others) if own.smoke else (own, others)


def smoke_flags(own: argparse.Namespace) -> list[str]:
    """A recipe and data for the model that comes with the package."""
    from sparselora_hf.cli.quickstart import ASSETS
    from sparselora_hf.world import finetuning_examples

    own.output_dir.mkdir(parents=True, exist_ok=True)
    own.held_out, own.score_rows, own.evaluations = 16, 8, 3
    recipe, data = own.output_dir / "smoke.yaml", own.output_dir / "smoke.jsonl"
    recipe.write_text(SMOKE, encoding="utf-8")
    rows = finetuning_examples(0, 96, "train")
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return ["--config", str(recipe), "--model_name_or_path", str(ASSETS), "--dataset_name", str(data)]


def run(method: str, own: argparse.Namespace, others: list[str]) -> Any:
    """Train and measure one method; returns its `Outcome`."""
    from sparselora_hf.cli import sft
    from sparselora_hf.comparison import exact_match, measure

    name, flags = METHODS[method]
    measured = ["--logging_steps", "1", "--eval_strategy", "no", "--disable_tqdm", "true", "--save_strategy", "no"]
    recipe = sft.parse([*others, *flags, *measured, "--output_dir", str(own.output_dir / method)])
    keywords = sft.trainer_keywords(recipe)
    rows, held_out = split(keywords["train_dataset"], own.held_out)
    recipe.training.eval_strategy, recipe.training.eval_on_start = "steps", True
    recipe.training.eval_steps = 1 / own.evaluations
    keywords |= {"train_dataset": rows, "eval_dataset": held_out}

    def build(callbacks: list[Any]) -> Any:
        return sft.make_trainer(recipe, {**keywords, "callbacks": callbacks})

    def score(trainer: Any) -> float | None:
        scored = held_out.take(min(own.score_rows, len(held_out))).to_list()
        return exact_match(trainer.model, keywords["processing_class"], scored) if scored else None

    return measure(name, build, score)


def split(rows: Any, held_out: int) -> tuple[Any, Any]:
    """The last rows are held out.

    Raises:
        ValueError: more rows are held out than are left to train on.
    """
    kept = len(rows) - held_out
    if kept < held_out:
        raise ValueError(f"--held-out: {held_out} of {len(rows)} rows are too many. Hold out at most half.")
    return rows.select(range(kept)), rows.select(range(kept, len(rows)))


def figures(outcomes: Sequence[Any]) -> list[dict[str, Any]]:
    """One row per method; speed-ups are over the first."""
    from sparselora_hf.comparison import shared_loss

    loss = shared_loss(outcomes)
    first = max(outcome.first_sparse or 0 for outcome in outcomes)
    base, rows = outcomes[0], []
    for outcome in outcomes:
        step, reached = outcome.step(first).wall, outcome.seconds_to(loss)
        rows.append(
            {
                "method": outcome.name,
                "flops_sparse": sum(outcome.flops[first:]) / len(outcome.flops[first:]),
                "flops_run": sum(outcome.flops) / len(outcome.flops),
                "step_seconds": step,
                "step_speedup": base.step(first).wall / step,
                "step_speedup_cpu": base.step(first).cpu / outcome.step(first).cpu,
                "attach_seconds": outcome.attach_seconds,
                "run_seconds": outcome.total_seconds,
                "run_speedup": base.total_seconds / outcome.total_seconds,
                "shared_loss": loss,
                "loss_seconds": reached,
                "loss_speedup": base.seconds_to(loss) / reached if reached else None,
                "eval_loss": outcome.evaluations[-1].loss,
                "score": outcome.score,
                "peak_memory": outcome.memory,
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
    for key, label, form, factor in ROWS:
        cells = ("n/a" if row[key] is None else format(row[key] * factor, form) for row in rows)
        result.add_row(label.format(loss=f"{rows[0]['shared_loss']:.4f}"), *cells)
    return result


def main(argv: Sequence[str]) -> int:
    """Run the methods one after another, then write and print what was measured."""
    from rich.console import Console

    from sparselora_hf.comparison import draw, in_fresh_process

    own, others = parse(argv)
    console = Console()
    outcomes = []
    for method in own.methods:
        with console.status(METHODS[method][0]):
            outcomes.append(in_fresh_process(run, method, own, others))
    rows = figures(outcomes)
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
