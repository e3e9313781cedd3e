"""Tables and picture of the accuracy study from its CSV files.

    python recipes/bench/accuracy_table.py

Per subject and arm: the gap to dense LoRA's held-out loss, the mean of paired differences over seeds with its 95 %
interval by Student's t, and the FLOPs of frozen linears as a share of the dense ones.
"""

import argparse
import csv
import dataclasses
import statistics
from collections import defaultdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
BASELINE = "dense"
FRONTIER = ("random", "svd", "oracle", "output", "output+r8", "output+r32")  # methods that the picture compares
PANELS = {
    ("babyllama361", 80): "75 % context",
    ("babyllama361-90", 80): "90 % context",
    ("babyllama361-97", 80): "97 % context",
}
# two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom; beyond the last it is the safe choice
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


@dataclasses.dataclass(frozen=True)
class Gap:
    """What an arm loses against dense LoRA.

    Attributes:
        mean: of held-out loss less dense LoRA's with the same seed.
        half_width: of the 95 % interval of the mean; None with a single seed.
        dense: dense LoRA's mean loss.
        match: difference of exact match in points, as a table has it; empty where the subject has no answers.
        flops: share of the dense linear FLOPs, the dense warm-up steps counted; None where not known.
        flops_sparse: the same for a sparse step.
        seeds: how many there are.
    """

    subject: str
    steps: int
    arm: str
    mean: float
    half_width: float | None
    dense: float
    match: str
    flops: float | None
    flops_sparse: float | None
    seeds: int

    @property
    def percent(self) -> float:
        """The mean as a share of dense LoRA's loss."""
        return 100 * self.mean / self.dense

    @property
    def interval(self) -> str:
        """Mean and half-width, as a table has them."""
        return f"{self.mean:+.4f}" + ("" if self.half_width is None else f" ± {self.half_width:.4f}")


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def half_width(values: list[float]) -> float | None:
    """Half the 95 % interval of the mean of independent values; None for a single one."""
    if len(values) < 2:
        return None
    quantile = _T95[min(len(values) - 1, len(_T95)) - 1]
    return quantile * statistics.stdev(values) / len(values) ** 0.5


def gaps(rows: list[dict[str, str]], baseline: str = BASELINE) -> list[Gap]:
    """Gaps of every arm that shares a seed with dense LoRA, or another arm, by subject, the smallest first."""
    runs: dict[tuple[str, int, str], dict[str, dict[str, str]]] = defaultdict(dict)
    for row in rows:
        runs[row["subject"], int(row["steps"]), row["arm"]][row["seed"]] = row
    found = []
    for (subject, steps, arm), own in runs.items():
        dense = runs.get((subject, steps, baseline), {})
        seeds = sorted(own.keys() & dense.keys())
        if arm != baseline and seeds:
            found.append(_gap(subject, steps, arm, [own[seed] for seed in seeds], [dense[seed] for seed in seeds]))
    return sorted(found, key=lambda gap: (gap.subject, gap.steps, gap.mean))


def _gap(subject: str, steps: int, arm: str, own: list[dict[str, str]], dense: list[dict[str, str]]) -> Gap:
    differences = _differences(own, dense, "heldout_loss")
    mean = statistics.mean(differences)
    return Gap(
        subject=subject,
        steps=steps,
        arm=arm,
        mean=mean,
        half_width=half_width(differences),
        dense=statistics.mean(float(row["heldout_loss"]) for row in dense),
        match=_points(_differences(own, dense, "exact_match")) if own[0]["exact_match"] else "",
        flops=_mean(own, "flops"),
        flops_sparse=_mean(own, "flops_sparse"),
        seeds=len(own),
    )


def _differences(own: list[dict[str, str]], dense: list[dict[str, str]], name: str) -> list[float]:
    return [float(a[name]) - float(b[name]) for a, b in zip(own, dense, strict=True)]


def _points(differences: list[float]) -> str:
    width = half_width(differences)
    return f"{statistics.mean(differences):+.1f}" + ("" if width is None else f" ± {width:.1f}")


def _mean(rows: list[dict[str, str]], name: str) -> float | None:
    return statistics.mean(float(row[name]) for row in rows) if rows[0][name] else None


def quality_rows(
    rows: list[dict[str, str]], subject: str, steps: int, arms: list[str] | None = None, baseline: str = BASELINE
) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the table of one subject; `arms` chooses and orders, left out all are given.

    Args:
        rows: of the CSV, as `read` gives them.
        subject: name in the column `subject`.
        steps: optimizer steps of the trainings; 0 for forward passes alone, whose rows are batches.
        arms: names in the column `arm`; those that have not been run are left out.
        baseline: the arm that all are compared with.
    """
    by_arm = {gap.arm: gap for gap in gaps(rows, baseline) if (gap.subject, gap.steps) == (subject, steps)}
    gap_to = "gap to dense LoRA" if baseline == BASELINE else f"gap to {baseline}"
    header = ["setting", gap_to, "in %", "exact match", "linear FLOPs", "of a sparse step"]
    header.append("seeds" if steps else "batches")
    body = [_line(by_arm[arm]) for arm in (arms or by_arm) if arm in by_arm]
    shown = [place for place in range(len(header)) if any(line[place] for line in body)]
    return [header[place] for place in shown], [[line[place] for place in shown] for line in body]


def _line(gap: Gap) -> list[str]:
    shares = ["" if share is None else f"{share:.0%}" for share in (gap.flops, gap.flops_sparse)]
    return [gap.arm, gap.interval, f"{gap.percent:+.2f}", gap.match, *shares, str(gap.seeds)]


def estimator_rows(
    rows: list[dict[str, str]], part: str = "mlp", sparsities: tuple[str, ...] = ("0.9", "0.97")
) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the estimators' table: energy kept, the mean over layers, and the lowest of a layer.

    Args:
        rows: of `accuracy-estimators.csv`.
        part: ``mlp``, ``qk`` or ``vo``.
        sparsities: as they stand in the file.
    """
    shares: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for row in rows:
        if row["part"] == part and row["sparsity"] in sparsities:
            shares[row["estimator"], row["checkpoint"], row["text"], row["sparsity"]].append(float(row["share"]))
    columns = sorted({key[1:] for key in shares}, key=lambda key: (key[0], -("stories" in key[1]), key[2]))
    body = []
    for name in dict.fromkeys(key[0] for key in shares):
        kept = [shares[(name, *column)] for column in columns]
        body.append([name, *(f"{statistics.mean(layers):.2f} ({min(layers):.2f})" for layers in kept)])
    return ["estimator", *(f"{checkpoint}, {text}, {sparsity}" for checkpoint, text, sparsity in columns)], body


def draw_frontier(rows: list[dict[str, str]], panels: dict[tuple[str, int], str], path: Path) -> None:
    """Write a picture: gap in percent with its interval against the share of linear FLOPs, a colour for each method.

    Args:
        rows: of the CSV.
        panels: title of each panel by subject and steps.
        path: PNG file.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    found = gaps(rows)
    figure, plots = pyplot.subplots(
        1, len(panels), figsize=(4.2 * len(panels), 4), squeeze=False, layout="constrained"
    )
    for plot, (key, title) in zip(plots[0], panels.items(), strict=True):
        for number, method in enumerate(FRONTIER):
            points = [g for g in found if (g.subject, g.steps) == key and g.arm.split("@")[0] == method and g.flops]
            points = sorted((g for g in points if "," not in g.arm), key=lambda gap: gap.flops)
            flops, percents = [100 * gap.flops for gap in points], [gap.percent for gap in points]
            spans = [100 * (gap.half_width or 0.0) / gap.dense for gap in points]
            plot.errorbar(flops, percents, spans, fmt="o-", capsize=3, label=method, color=f"C{number}")
        plot.axhline(0.0, color="0.6", linewidth=1)
        plot.set(
            title=title, xlabel="linear FLOPs of the run, % of dense", ylabel="held-out loss above dense LoRA's, %"
        )
    plots[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def rich_table(title: str, header: list[str], body: list[list[str]]) -> Table:
    table = Table(title=title)
    for place, column in enumerate(header):
        table.add_column(column, justify="right" if place else "left")
    for line in body:
        table.add_row(*line)
    return table


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--csv", type=Path, default=RESULTS / "accuracy-cpu.csv")
    parser.add_argument("--estimators", type=Path, default=RESULTS / "accuracy-estimators.csv")
    parser.add_argument("--output-dir", type=Path, default=RESULTS, help="where pictures go")
    parser.add_argument("--against", default=BASELINE, metavar="ARM", help="compare with another arm than dense LoRA")
    args = parser.parse_args(argv)
    console = Console()
    if args.csv.exists():
        rows = read(args.csv)
        for subject, steps in dict.fromkeys((gap.subject, gap.steps) for gap in gaps(rows, args.against)):
            table = quality_rows(rows, subject, steps, baseline=args.against)
            console.print(rich_table(f"{subject}, {steps} steps", *table))
        panels = {key: title for key, title in PANELS.items() if any(key == (g.subject, g.steps) for g in gaps(rows))}
        if panels:
            draw_frontier(rows, panels, args.output_dir / f"{args.csv.stem}-frontier.png")
    if args.estimators.exists():
        for part in ("mlp", "qk", "vo"):
            header, body = estimator_rows(read(args.estimators), part)
            title = f"energy kept, {part}: mean over layers (lowest layer)"
            console.print(rich_table(title, [name.replace(", ", "\n") for name in header], body))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
