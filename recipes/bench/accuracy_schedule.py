"""The best schedule over layers that a plain greedy search finds, by short trainings.

    python recipes/bench/accuracy_schedule.py --subject babyllama361 --criterion svd --target 0.5

From the dense model on, every round raises the sparsity of one MLP by a level: of the layer where it costs least
held-out loss for the FLOPs that it saves. Every trial is a row of the CSV, like those of the accuracy study, and is
not run again. Train what the search ends with as an arm of its own, with other seeds, before it is believed.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import accuracy
from accuracy_arms import Arm
from rich.console import Console
from step import RESULTS, append_csv

from sparselora_hf.criteria import CRITERIA

LEVELS = (0.0, 0.5, 0.75, 0.9, 0.97)
Schedule = tuple[float, ...]


def raised(schedule: Schedule, layer: int) -> Schedule:
    """The schedule with one layer a level higher; the same schedule where there is none."""
    level = LEVELS.index(schedule[layer])
    return (*schedule[:layer], LEVELS[min(level + 1, len(LEVELS) - 1)], *schedule[layer + 1 :])


def search(
    trial: Callable[[Schedule], tuple[float, float]], layers: int, target: float
) -> Iterator[tuple[Schedule, float, float]]:
    """Schedules on the way from dense to a share of FLOPs, each with its loss and its share.

    Args:
        trial: held-out loss and share of linear FLOPs of a schedule.
        layers: MLPs of the model; the last stays dense, since it has no context to be sparse on.
        target: share of FLOPs at which the search ends.
    """
    schedule = (0.0,) * layers
    loss, flops = trial(schedule)
    while flops > target:
        candidates = {raised(schedule, layer) for layer in range(layers - 1)} - {schedule}
        if not candidates:
            return
        found = {candidate: trial(candidate) for candidate in sorted(candidates)}
        cost = {c: (result[0] - loss) / max(flops - result[1], 1e-9) for c, result in found.items()}
        schedule = min(cost, key=cost.get)
        loss, flops = found[schedule]
        yield schedule, loss, flops


def trials(args: argparse.Namespace) -> Callable[[Schedule], tuple[float, float]]:
    """A trial that trains, or finds its row in the CSV."""
    done = accuracy.finished(args.csv)
    name = args.criterion + (f"+r{args.stand_in}" if args.stand_in else "")

    def trial(schedule: Schedule) -> tuple[float, float]:
        label = f"{name} {'/'.join(f'{sparsity:g}' for sparsity in schedule)}"
        key = (args.subject, label, str(args.seed), str(args.steps))
        if key not in done:
            arm = Arm("schedule", layers=schedule, stand_in=args.stand_in, settings={"criterion": args.criterion})
            done[key] = accuracy.run(args.subject, label, args.seed, args.steps, args.work_dir, arm)
            append_csv(args.csv, [done[key]])
        return float(done[key]["heldout_loss"]), float(done[key]["flops_sparse"])

    return trial


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--subject", default="babyllama361", choices=sorted(accuracy.SUBJECTS), metavar="SUBJECT")
    parser.add_argument("--criterion", default="svd", choices=sorted(CRITERIA))
    parser.add_argument("--stand-in", type=int, default=0, help="rank of the stand-in")
    parser.add_argument("--target", type=float, default=0.5, help="share of linear FLOPs in a sparse step")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, default=RESULTS / "accuracy-schedule.csv")
    parser.add_argument("--work-dir", type=Path, default=accuracy.WORK_DIR)
    args = parser.parse_args(argv)
    accuracy.quieten()
    subject = accuracy.SUBJECTS[args.subject]
    subject.ready(args.work_dir)
    layers = subject.model(args.work_dir).config.num_hidden_layers
    console = Console(highlight=False)
    for schedule, loss, flops in search(trials(args), layers, args.target):
        console.print(f"{' '.join(f'{sparsity:g}' for sparsity in schedule)}: loss {loss:.4f}, FLOPs {flops:.0%}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
