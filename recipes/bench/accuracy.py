"""The accuracy study: held-out loss of LoRA after training with `SFTTrainer`, and with every setting of sparsity.

    python recipes/bench/accuracy.py --subjects babyllama361 --arms main --seeds 0 1 2 3 4
    python recipes/bench/accuracy.py --device cuda --subjects world-50m
    python recipes/bench/accuracy.py --list
    python recipes/bench/accuracy_table.py

Every training is one row of the CSV, written at once; those that are there are not run again, so a study goes on where
it was stopped. All arms of a seed see the same adapters at the start and the same rows in the same order. Seeds come
before arms: after each seed every arm has as many trainings as the others.
"""

import argparse
import csv
import itertools
import tempfile
import time
from pathlib import Path

import datasets
import torch
import transformers
from accuracy_ablations import StudyTrainer
from accuracy_arms import ARMS, Arm, config_of, select
from accuracy_subjects import SUBJECTS, TARGETS, WORK_DIR
from peft import LoraConfig
from rich.console import Console
from step import RESULTS, append_csv, environment
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from sparselora_hf.collator import PLAN_KEY
from sparselora_hf.comparison import exact_match
from sparselora_hf.cost import BatchShape, LoraShape, ModelShape, StepCost, keep_lists, step_cost
from sparselora_hf.schedule import Schedule

KEY = ("subject", "arm", "seed", "steps")
_SCORED_BY_FACTORS = ("svd", "svd_whitened")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--subjects", nargs="+", default=["babyllama361"], choices=sorted(SUBJECTS), metavar="SUBJECT")
    parser.add_argument("--arms", nargs="+", default=["main"], help="arms or groups of arms")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)))
    parser.add_argument("--steps", type=int, help="optimizer steps in place of the subject's own")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--csv", type=Path, help="left out, accuracy-DEVICE.csv among the results")
    parser.add_argument("--work-dir", type=Path, default=WORK_DIR)
    parser.add_argument("--list", action="store_true", help="print subjects and arms, and train nothing")
    args = parser.parse_args(argv)
    args.csv = args.csv or RESULTS / f"accuracy-{args.device}.csv"
    return args


def arguments(subject, arm: Arm, seed: int, steps: int, folder: str, device: str = "cpu") -> SFTConfig:
    rows = arm.micro_batch or subject.batch
    return SFTConfig(
        folder,
        max_steps=steps,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=subject.batch // rows,
        per_device_eval_batch_size=16,
        learning_rate=subject.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 20),
        logging_steps=steps,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=device == "cpu",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
    )


def build(subject, arm: Arm, seed: int, steps: int, work_dir: Path, folder: str, device: str = "cpu"):
    """Trainer of an arm, and the subject's task; everything random follows from the seed."""
    set_seed(seed)
    task = subject.task(seed, steps * subject.batch)
    keywords = {
        "args": arguments(subject, arm, seed, steps, folder, device),
        "train_dataset": task.train,
        "eval_dataset": task.test,
        "processing_class": subject.tokenizer(work_dir),
        "peft_config": LoraConfig(r=16, lora_alpha=32, target_modules=list(TARGETS), task_type="CAUSAL_LM"),
    }
    model = subject.model(work_dir)
    if arm.trainer != "sparse":
        trainer = SFTTrainer(model, **keywords)
    else:
        config = config_of(arm, model.config.num_hidden_layers)
        trainer = StudyTrainer(model, **keywords, sparse_config=config)
        trainer.change(arm.study)
    trainer.remove_callback(PrinterCallback)
    return trainer, task


def linear_share(trainer: StudyTrainer, steps: int) -> dict[str, float | None]:
    """FLOPs of frozen linears, channel scores and stand-ins, as a share of the dense ones, by the cost model.

    Of a sparse step (`flops_sparse`), and of the whole run with its dense steps against `steps` dense ones (`flops`).
    The scores of ``oracle`` are not counted: it shows what a score could reach. Empty where the ablation keeps sets
    that the cost model does not know.
    """
    if trainer.study.sets is not None:
        return {"flops": None, "flops_sparse": None}
    config, model = trainer.sparse_config, trainer.sparse_handle.state.meter.model
    batch = _tokens(trainer)
    dense = step_cost(model, batch, LoraShape(0)).linear
    warm_up = step_cost(model, batch, LoraShape(0), exact=config.exact).linear / dense
    mlp_keep, attention_keep = keep_lists(config, model)
    cost = step_cost(
        model,
        batch,
        LoraShape(0),
        mlp_keep=mlp_keep,
        attention_keep=attention_keep,
        exact=config.exact,
        rank=config.rank if config.criterion in _SCORED_BY_FACTORS else 0,
        compensation_rank=config.compensation_rank if config.compensation == "low_rank" else 0,
    )
    sparse = (cost.linear + _scores(trainer, cost, mlp_keep)) / dense
    taken = trainer.args.max_steps
    schedule = Schedule.of(config, taken)
    count = schedule.end - schedule.start if config.is_sparse else 0
    return {
        "flops": round((count * sparse + (taken - count) * warm_up) / steps, 4),
        "flops_sparse": round(sparse, 4),
    }


def _scores(trainer: StudyTrainer, cost: StepCost, mlp_keep: list[int | None]) -> float:
    """FLOPs of scoring channels: products with the factors, or with gate and up for a few sampled tokens."""
    if trainer.sparse_config.criterion != "sampled":
        return cost.estimator.total
    model, tokens = trainer.sparse_handle.state.meter.model, trainer.sparse_handle.state.criterion.score_tokens
    micro_batches = trainer.state.max_steps * trainer.args.gradient_accumulation_steps
    sparse_layers = sum(keep is not None for keep in mlp_keep)
    return 2.0 * 2.0 * tokens * micro_batches * sparse_layers * model.hidden * model.intermediate


def _tokens(trainer: StudyTrainer) -> BatchShape:
    """Tokens of the whole run by kind."""
    counts = {"context": 0, "output": 0, "padding": 0, "loss": 0}
    for batch in trainer.get_train_dataloader():
        plan = trainer.planned(batch[PLAN_KEY])
        counts["context"] += len(plan.context)
        counts["output"] += len(plan.output)
        counts["padding"] += plan.shape[0] * plan.shape[1] - plan.tokens
        counts["loss"] += len(plan.loss)
    return BatchShape(**counts, batch=1, sequence=1)


def run(
    subject_name: str,
    arm_name: str,
    seed: int,
    steps: int | None,
    work_dir: Path,
    arm: Arm | None = None,
    device: str = "cpu",
) -> dict:
    """Train one arm with one seed; returns its row. An arm that is in no table is given."""
    subject, arm = SUBJECTS[subject_name], arm or ARMS[arm_name]
    steps = steps or subject.steps
    return {
        "subject": subject_name,
        "arm": arm_name,
        "seed": seed,
        "steps": steps,
        **outcome(subject, arm, seed, steps, work_dir, device),
        **environment(device),
    }


def outcome(subject, arm: Arm, seed: int, steps: int, work_dir: Path, device: str = "cpu") -> dict:
    """Train, and measure what came of it."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, task = build(subject, arm, seed, round(steps * arm.longer), work_dir, folder, device)
        clocks = time.perf_counter(), time.process_time()
        if arm.trainer != "none":
            trainer.train()
        seconds, cpu_seconds = time.perf_counter() - clocks[0], time.process_time() - clocks[1]
        loss = trainer.evaluate()["eval_loss"]
    tokenizer = subject.tokenizer(work_dir)
    match = exact_match(trainer.model, tokenizer, task.questions) if task.questions else None
    shares = linear_share(trainer, steps) if arm.trainer == "sparse" else {"flops": 1.0, "flops_sparse": 1.0}
    return {
        "heldout_loss": round(loss, 5),
        "exact_match": match,
        **shares,
        "context": subject.context,
        "batch": subject.batch,
        "learning_rate": subject.learning_rate,
        "parameters": ModelShape.from_config(trainer.model.config).parameters,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
    }


def finished(path: Path) -> dict[tuple[str, ...], dict[str, str]]:
    """The rows that are there, by key."""
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {tuple(row[name] for name in KEY): row for row in csv.DictReader(file)}


def listing() -> str:
    changes = {name: (arm.study and f", {arm.study}") or "" for name, arm in ARMS.items()}
    arms = [f"  {arm.group:10s} {name}{changes[name]}" for name, arm in ARMS.items()]
    return "\n".join(["subjects:", *(f"  {name}" for name in SUBJECTS), "arms:", *sorted(arms)])


def quieten() -> None:
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    console = Console(highlight=False)
    if args.list:
        console.print(listing())
        return 0
    quieten()
    done = finished(args.csv)
    for subject in args.subjects:
        SUBJECTS[subject].ready(args.work_dir, args.device)
    for seed, subject, arm in itertools.product(args.seeds, args.subjects, select(args.arms)):
        key = (subject, arm, str(seed), str(args.steps or SUBJECTS[subject].steps))
        if key not in done:
            row = run(subject, arm, seed, args.steps, args.work_dir, device=args.device)
            append_csv(args.csv, [row])
            console.print(f"{subject}, {arm}, seed {seed}: {row['heldout_loss']:.4f} in {row['seconds']:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
