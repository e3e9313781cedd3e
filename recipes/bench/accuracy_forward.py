"""What sparsity does to the loss before any training: the sparse forward of each arm on held-out batches.

    python recipes/bench/accuracy_forward.py

Minutes where the trainings of `accuracy.py` take hours, so every arm of a group can be tried; what counts are the
trainings. Rows have the form of the study's, with 0 steps and the number of the batch in place of a seed: the tables
give the gap to the dense loss of the same batch, with its interval over batches.
"""

import argparse
from pathlib import Path

import torch
from accuracy import finished, quieten
from accuracy_ablations import STUDY, apply
from accuracy_arms import ARMS, Arm, config_of, select
from accuracy_subjects import SUBJECTS, TARGETS, WORK_DIR
from peft import LoraConfig, get_peft_model
from rich.console import Console
from step import RESULTS, append_csv, environment

from sparselora_hf import sparsify

DENSE_BATCHES = 4  # for the criteria and stand-ins that learn from dense steps
GROUPS = ("main", "criteria", "mapping", "curve", "rank", "far", "depth", "attention", "tokens")


def has_a_forward(arm: Arm) -> bool:
    """Whether an arm differs in its forward pass, without a plan of its own."""
    return arm.trainer != "none" and arm.longer == 1 and (arm.study is None or STUDY[arm.study].plan is None)


def batches_of(rows, batch: int, count: int) -> list[torch.Tensor]:
    """Input ids and labels, ``[2, B, S]``, of the first batches of a dataset with rows of equal length."""
    found = rows.select(range(batch * count)).with_format("torch")
    both = torch.stack([found["input_ids"][:], found["labels"][:]])
    return list(both.split(batch, dim=1))


def losses(subject, arm: Arm, batches: int, work_dir: Path) -> list[float]:
    """Loss of the arm's forward on each held-out batch, the adapters being those of an untrained LoRA."""
    torch.manual_seed(0)
    model = get_peft_model(subject.model(work_dir), LoraConfig(r=16, target_modules=list(TARGETS))).train()
    task = subject.task(0, DENSE_BATCHES * subject.batch)
    if arm.trainer == "sparse":
        handle = sparsify(model, config_of(arm, model.config.num_hidden_layers))
        apply(handle, arm.study)
        if handle.config.needs_statistics:
            for ids, labels in batches_of(task.train, subject.batch, DENSE_BATCHES):
                model(input_ids=ids, labels=labels)
        handle.set_enabled(handle.config.is_sparse)
    found = []
    for held_out in batches_of(task.test, subject.batch, batches):
        parts = held_out.split(arm.micro_batch or subject.batch, dim=1)
        means = [model(input_ids=ids, labels=labels).loss.detach() for ids, labels in parts]
        found.append(float(torch.stack(means).mean()))
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--subjects", nargs="+", default=["babyllama361"], choices=sorted(SUBJECTS), metavar="SUBJECT")
    parser.add_argument("--arms", nargs="+", default=list(GROUPS), help="arms or groups of arms")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--csv", type=Path, default=RESULTS / "accuracy-forward.csv")
    parser.add_argument("--work-dir", type=Path, default=WORK_DIR)
    args = parser.parse_args(argv)
    quieten()
    console, done, where = Console(highlight=False), finished(args.csv), environment("cpu")
    for name in args.subjects:
        subject = SUBJECTS[name]
        subject.ready(args.work_dir)
        for arm in (arm for arm in select(args.arms) if has_a_forward(ARMS[arm])):
            if (name, arm, "0", "0") in done:
                continue
            found = losses(subject, ARMS[arm], args.batches, args.work_dir)
            empty = {"exact_match": None, "flops": None, "flops_sparse": None}
            row = {"subject": name, "arm": arm, "steps": 0, **empty, **where}
            append_csv(args.csv, [{**row, "seed": i, "heldout_loss": round(x, 5)} for i, x in enumerate(found)])
            console.print(f"{name}, {arm}: {sum(found) / len(found):.4f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
