"""Plots of the step benchmark's CSV: speed-up against context share, sequence length and model size.

python recipes/bench/plot.py --csv recipes/bench/results/step-cpu.csv
"""

import argparse
import csv
import statistics
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot

RESULTS = Path(__file__).parent / "results"
AXES = {"context_share": "context share", "sequence": "sequence length", "hidden": "hidden width"}


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def series(rows: list[dict[str, str]], axis: str) -> dict[str, list[tuple[float, float]]]:
    """Median speed-up per variant and value of an axis; the baseline, 1 by definition, is left out."""
    found: dict[tuple[str, float], list[float]] = defaultdict(list)
    for row in rows:
        if row["variant"] != "sft":
            found[row["variant"], float(row[axis])].append(float(row["speedup"]))
    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for (variant, value), speedups in sorted(found.items()):
        lines[variant].append((value, statistics.median(speedups)))
    return lines


def draw(rows: list[dict[str, str]], axis: str, path: Path) -> None:
    figure, plot = pyplot.subplots(figsize=(5, 3.4))
    for variant, points in series(rows, axis).items():
        plot.plot(*zip(*points, strict=True), marker="o", label=variant)
    plot.axhline(1.0, color="0.6", linewidth=1)
    plot.set_xlabel(AXES[axis])
    plot.set_ylabel("speed-up over SFTTrainer")
    plot.set_title(rows[0]["device"], fontsize=8)
    plot.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--csv", type=Path, default=RESULTS / "step-cpu.csv")
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    rows = read(args.csv) if args.csv.is_file() else []
    if not rows or not {"variant", "speedup", *AXES} <= rows[0].keys():
        parser.error(f"--csv: {args.csv} is no file of rows that step.py has written.")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for axis in AXES:
        draw(rows, axis, args.output_dir / f"{args.csv.stem}-{axis}.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
