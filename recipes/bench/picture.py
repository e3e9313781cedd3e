"""README's picture, from the committed results: step time over context share, and the quickstart's loss over time.

python recipes/bench/picture.py
"""

import argparse
import json
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot
from readme import RESULTS, VARIANTS, by_setting, order, read

DENSE, SHADES = "#8a8f98", {"exact": "#9fd3b6", "sparse": "#1b7f4d"}
WINDOW = 8  # steps that a loss is averaged over


def speedups() -> list[tuple[float, dict[str, list[float]]]]:
    """Context share and speed-ups by variant, of full batches without checkpointing."""
    found = []
    for (_, _, _, _, fill, checkpointing), variants in sorted(by_setting(read("step-cpu.csv")).items(), key=order):
        if float(fill) == 1.0 and checkpointing == "False":
            share = float(variants["sparse"][0]["context_share"])
            found.append((share, {name: [float(r["speedup"]) for r in variants[name]] for name in SHADES}))
    return found


def draw_steps(axis) -> None:
    bars = speedups()
    axis.axhline(1.0, color=DENSE, linewidth=1.5)
    axis.text(-0.72, 1.04, "SFTTrainer", color=DENSE, fontsize=9)
    for offset, name in zip((-0.2, 0.2), SHADES, strict=True):
        places = [place + offset for place in range(len(bars))]
        heights = [statistics.median(by_name[name]) for _, by_name in bars]
        drawn = axis.bar(places, heights, 0.38, color=SHADES[name], label=VARIANTS[name])
        axis.bar_label(drawn, [f"{height:.2f}x" for height in heights], padding=3, fontsize=9)
    axis.set_xticks(range(len(bars)), [f"{share:.0%}" for share, _ in bars])
    axis.set(xlabel="context tokens", ylabel="speed-up of a step", xlim=(-0.75, len(bars) - 0.4))
    axis.set_ylim(0, 1.25 * axis.dataLim.y1)
    axis.set_title("A training step of a 229 M Llama on a CPU", fontsize=11)
    axis.legend(frameon=False, fontsize=9, ncols=2, loc="upper left")


def smooth(values: list[float]) -> list[float]:
    return [statistics.mean(values[max(0, i - WINDOW + 1) : i + 1]) for i in range(len(values))]


def draw_losses(axis) -> None:
    kinds = {"dense": (DENSE, "SFTTrainer"), "sparse": (SHADES["sparse"], "SparseLoraTrainer")}
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("quickstart-seed*.json"))]
    for number, report in enumerate(reports):
        for kind, (color, label) in kinds.items():
            curve = report["curves"][kind]
            seconds = [sum(curve["cpu"][: i + 1]) for i in range(len(curve["cpu"]))]
            axis.plot(seconds, smooth(curve["loss"]), color=color, linewidth=1.6, label=None if number else label)
            axis.plot(seconds[-1], smooth(curve["loss"])[-1], "o", color=color, markersize=5)
    axis.set_yscale("log")
    axis.set(xlabel="seconds of one core", ylabel="training loss", xlim=(0, None))
    axis.set_title(f"The quickstart, {len(reports)} seeds, dense first steps included", fontsize=11)
    axis.legend(frameon=False, fontsize=9)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.parse_args(argv)
    if not speedups():
        parser.error(f"{RESULTS / 'step-cpu.csv'} holds no rows. Run step.py first.")
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.7))
    draw_steps(axes[0])
    draw_losses(axes[1])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout(w_pad=3)
    figure.savefig(Path(RESULTS) / "overview.png", dpi=150)
    pyplot.close(figure)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
