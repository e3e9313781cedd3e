"""Write README's tables from the files under `results/` and from the code. Run after every benchmark.

A table stands between `<!-- table:NAME -->` and `<!-- end -->`. `--check` writes nothing and fails where README is not
what files and code say. Rows of a CSV with the same settings are one line: the median, and the range in brackets.
"""

import argparse
import csv
import json
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from accuracy_table import estimator_rows, quality_rows

from sparselora_hf.families import families_table
from sparselora_hf.versions import SUPPORTED

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[2] / "README.md"
NOT_YET = "Not yet measured."
CLOCKS = {"wall": "", "processor": "_cpu"}
SETTING = ("model", "sequence", "output", "batch", "fill", "checkpointing")  # of a CSV's rows
VARIANTS = {"exact": "exact savings alone", "sparse": "SparseLoRA", "sparse_no_exact": "without exact savings"}
GRAPHS = {"exact_graphs": "exact savings replayed", "sparse_graphs": "SparseLoRA replayed"}
ON_GPU = {"exact": VARIANTS["exact"], "sparse": VARIANTS["sparse"], **GRAPHS}
BESIDE_LIGER = {
    "sft": "SFTTrainer without Liger",
    "sparse": VARIANTS["sparse"],
    "sparse_liger": "SparseLoRA with Liger",
    "sparse_graphs": GRAPHS["sparse_graphs"],
}
PROFILED = {"sft": "SFTTrainer", **ON_GPU}

_MAIN = ("output+r8@0.9", "static+r8@0.9", "svd_whitened+r8@0.9", "output@0.9", "oracle@0.9", "svd@0.9")
_EQUAL = ("output+r8@0.9, equal FLOPs", "svd@0.9, equal FLOPs")
_FAR = ("output+r32@0.97", "static+r32@0.97", "output+r8@0.9", "output+r8@0.9, attention 0.75")
_ATTENTION = tuple(
    f"{name} attention@{s}" for s in ("0.5", "0.75") for name in ("output+r32", "output+r8", "output", "svd")
)
WORLD = ("output+r8@0.9", "static+r8@0.9", "svd@0.9", "random@0.9")
_FINDINGS = (
    *(f"svd@0.9, {how}" for how in ("upper layers", "lower layers", "rising")),
    "svd@0.9",
    *(f"svd@0.9, {how}" for how in ("falling", "output tokens alone", "output tokens too", "token rule label")),
    *(f"svd@0.9, {how}" for how in ("64 tokens scored", "a set per sequence", "a set for 10 batches")),
    "output+r8@0.9, output tokens too",
)
STUDIES = {  # subject, steps and settings of a table of trainings
    "quality": ("babyllama361", 80, (*_MAIN, "svd_mean@0.9", "random@0.9", *_EQUAL)),
    "quality-97": ("babyllama361-97", 80, (*_FAR, "output+r32@0.97, attention 0.75", "svd@0.9")),
    "quality-long": ("babyllama361", 160, (*_MAIN, "svd_mean@0.9", "random@0.9")),
    "quality-97-long": ("babyllama361-97", 160, (*_FAR, "output+r32@0.97, attention 0.75", "svd@0.9")),
    "quality-findings": ("babyllama361", 80, _FINDINGS),
    "quality-attention": ("babyllama361", 80, _ATTENTION),
}
Rows = list[dict[str, str]]


def read(name: str) -> Rows:
    """Rows of a CSV file; none where there is no file."""
    path = RESULTS / name
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def markdown(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def footnote(rows: Rows) -> str:
    """Where and with what a table was measured."""
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    kinds = {tuple(row[name] for name in ("device", "torch", "transformers", "peft", "trl")) for row in rows}
    stacks = (f"{kind[0]}; torch {kind[1]}, transformers {kind[2]}, peft {kind[3]}, trl {kind[4]}" for kind in kinds)
    return f"\n\n{' / '.join(sorted(stacks))}; commit {commits}."


def spread(values: list[float], unit: str = "x") -> str:
    """Median, and the range where there are several values."""
    middle = f"{statistics.median(values):.2f}{unit}"
    if len(values) == 1:
        return middle
    return f"{middle} ({min(values):.2f}-{max(values):.2f})"


def by_setting(rows: Rows, baseline: str = "sft") -> dict[tuple[str, ...], dict[str, Rows]]:
    """Rows by setting and variant; each gets the peak memory of the baseline that it was measured beside."""
    found: dict[tuple[str, ...], dict[str, Rows]] = defaultdict(lambda: defaultdict(list))
    base = ""
    for row in rows:
        base = row["peak_memory"] if row["variant"] == baseline else base
        setting = tuple(row[name] for name in SETTING)
        found[setting][row["variant"]].append({**row, "base_memory": base})
    return found


def memory_ratio(rows: Rows) -> str:
    known = [row for row in rows if row["peak_memory"] and row["base_memory"]]
    return spread([float(r["peak_memory"]) / float(r["base_memory"]) for r in known], "") if known else "n/a"


def speed(rows: Rows, clock: str) -> str:
    return spread([float(row[clock]) for row in rows]) if rows else ""


def step_table(name: str, baseline: str = "sft", columns: dict[str, str] = VARIANTS, on_gpu: bool = False) -> str:
    """Speed-ups of the variants over a baseline, `SFTTrainer` as it comes, a line for each setting.

    On a GPU, where both clocks are one, variants that no row has get no column, and what is replayed has a peak too.
    """
    rows = read(name)
    if not rows:
        return NOT_YET
    settings = by_setting(rows, baseline)
    several = len({setting[0] for setting in settings}) > 1
    ends = ["SparseLoRA, wall clock", "FLOP bound", "peak memory"]
    if on_gpu:
        measured = {row["variant"] for row in rows}
        columns = {key: label for key, label in columns.items() if key in measured}
        ends = ["FLOP bound", "peak memory", "peak memory, replayed"]
    labels = [*columns.values(), *ends]
    header = [*(["model"] if several else []), "batch", "context", "fill", "checkpointing", *labels]
    body = []
    for (model, sequence, _, batch, fill, checkpointing), variants in sorted(settings.items(), key=order):
        sparse = variants["sparse"] or variants["exact"]
        replayed = variants["sparse_graphs"] or variants["exact_graphs"]
        speeds = [speed(variants[name], "speedup") for name in columns]
        speeds += [] if on_gpu else [speed(sparse, "speedup_wall")]
        limit = f"{float(sparse[-1]['bound']):.2f}x"
        start = [f"{batch} x {sequence}", f"{float(sparse[0]['context_share']):.0%}", f"{float(fill):.0%}"]
        start += ["yes" if checkpointing == "True" else "no"]
        peaks = [memory_ratio(rows) if rows else "" for rows in ((sparse, replayed) if on_gpu else (sparse,))]
        body.append([*([model] if several else []), *start, *speeds, limit, *peaks])
    return markdown(header, body) + footnote(rows)


def order(item: tuple) -> tuple:
    """Models, then without checkpointing before with it, full batches before padded ones, few context tokens first."""
    (model, sequence, output, batch, fill, checkpointing), _ = item
    return model, checkpointing == "True", int(sequence), int(batch), -float(fill), -int(output)


def grid_table() -> str:
    """Speed-up over shapes, a line for each width; of a cell that was measured several times the median counts."""
    rows = [row for row in read("grid-cpu.csv") if row["variant"] == "sparse"]
    if not rows:
        return NOT_YET
    found: dict[tuple[int, ...], list[float]] = defaultdict(list)
    for row in rows:
        found[tuple(int(row[n]) for n in ("hidden", "sequence", "batch", "output"))].append(float(row["speedup"]))
    body = []
    for hidden in sorted({cell[0] for cell in found}):
        cells = sorted(statistics.median(measured) for cell, measured in found.items() if cell[0] == hidden)
        slowest = min(min(measured) for cell, measured in found.items() if cell[0] == hidden)
        figures = [f"{value:.2f}x" for value in (cells[0], statistics.median(cells), cells[-1], slowest)]
        body.append([str(hidden), str(len(cells)), *figures])
    header = ["hidden", "cells", "slowest cell", "median", "fastest cell", "slowest measure"]
    return markdown(header, body) + footnote(rows)


def quickstart_table() -> str:
    """The quickstart's reports, a line for each seed."""
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("quickstart-seed*.json"))]
    if not reports:
        return NOT_YET
    header = ["seed", "speed-up of a step", "of the whole run", "exact match, %", "training loss"]
    body = []
    for report in reports:
        whole = {kind: sum(curve["cpu"]) for kind, curve in report["curves"].items()}
        speeds = [f"{report['speedup_cpu']:.2f}x", f"{whole['dense'] / whole['sparse']:.2f}x"]
        match, loss = report["exact_match"], report["loss"]
        pairs = [f"{match['dense']:.1f} / {match['sparse']:.1f}", f"{loss['dense']:.4f} / {loss['sparse']:.4f}"]
        body.append([str(report["seed"]), *speeds, *pairs])
    versions = ", ".join(f"{name} {version}" for name, version in reports[0]["versions"].items())
    return markdown(header, body) + f"\n\nSFTTrainer / SparseLoraTrainer; {reports[0]['device']}; {versions}."


def attach_table(name: str) -> str:
    """Seconds to make a model sparse, a line for each setting and clock."""
    rows = read(name)
    if not rows:
        return NOT_YET
    settings: dict[tuple[str, ...], Rows] = defaultdict(list)
    for row in rows:
        settings[row["model"], f"{row['layers']} of {row['of']}", row["sparse_parts"], row["device"]].append(row)
    header = ["model", "layers measured", "sparse parts", "on", "clock", "without a cache, s", "from the cache, s"]
    body = []
    for setting, same in settings.items():
        for clock, suffix in CLOCKS.items():
            figures = [spread([float(row[kind + suffix]) for row in same], "") for kind in ("cold", "cached")]
            body.append([*setting, clock, *figures])
    return markdown(header, body) + footnote(rows)


def family_rows() -> str:
    """What can be sparse, and in which families."""
    groups: dict[str, list[str]] = defaultdict(list)
    for title, model_type, *_, sparse in families_table()[1]:
        groups[sparse].append(f"{title} ({model_type})")
    rows = sorted(groups.items(), key=lambda item: -len(item[1]))
    return markdown(["can be sparse", "families"], ([sparse, "; ".join(names)] for sparse, names in rows))


def quality_table(name: str, subject: str, steps: int, arms: Sequence[str] = ()) -> str:
    """Held-out loss above dense LoRA's of some settings of the accuracy study, or of all."""
    rows = [row for row in read(name) if (row["subject"], row["steps"]) == (subject, str(steps))]
    rows = [row for row in rows if row["arm"] in (*arms, "dense") or (not arms and row["arm"] != "untrained")]
    if not rows:
        return NOT_YET
    return markdown(*quality_rows(rows, subject, steps, list(arms) or None)) + footnote(rows)


def mapping_table() -> str:
    """The reference's channel mapping against this package's, a line for each sparsity of attention."""
    rows = [row for row in read("accuracy-cpu.csv") if row["subject"] == "babyllama361" and row["steps"] == "80"]
    body, used = [], []
    for sparsity in ("0.5", "0.75"):
        ours = f"svd attention@{sparsity}"
        theirs = f"{ours}, reference mapping"
        header, lines = quality_rows(rows, "babyllama361", 80, [theirs], baseline=ours)
        body += lines
        used += [row for row in rows if row["arm"] in (ours, theirs)]
    if not body:
        return NOT_YET
    header[1] = "gap to the right mapping"
    return markdown(header, body) + footnote(used)


def exact_match_table() -> str:
    """Exact match of the text world's questions, against dense LoRA's."""
    header, body = quality_rows(read("accuracy-cpu.csv"), "world", 70, list(WORLD))
    shown = [header.index(name) for name in ("setting", "exact match", "linear FLOPs", "of a sparse step", "seeds")]
    rows = [row for row in read("accuracy-cpu.csv") if row["subject"] == "world" and row["arm"] in (*WORLD, "dense")]
    return markdown([header[i] for i in shown], [[line[i] for i in shown] for line in body]) + footnote(rows)


def estimators_table() -> str:
    """Energy of the best channel set that each estimator's set keeps."""
    rows = [row for row in read("accuracy-estimators.csv") if row["checkpoint"] == "babyllama361"]
    return markdown(*estimator_rows(rows, "mlp", ("0.9",))) + footnote(rows) if rows else NOT_YET


def profile_table() -> str:
    """Where the kernels of a step spend their time, by variant; of several runs the last counts."""
    rows = read("profile-cuda.csv")
    if not rows:
        return NOT_YET
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    cells = {(row["group"], row["variant"]): row for row in rows}
    timed = list(dict.fromkeys(row["group"] for row in rows if row["ms"]))
    timed.sort(key=lambda name: -float(cells.get((name, variants[0]), {}).get("ms", 0)))
    counted = sorted({row["group"] for row in rows if not row["ms"]})

    def of(name: str, variant: str) -> str:
        row = cells.get((name, variant))
        return "" if row is None else row["count"] if not row["ms"] else f"{float(row['ms']):.1f} ({row['count']})"

    sums = dict.fromkeys(variants, 0.0)
    for (_, variant), row in cells.items():
        sums[variant] += float(row["ms"] or 0)
    body = [[name, *(of(name, variant) for variant in variants)] for name in timed]
    body += [["all kernels", *(f"{total:.1f}" for total in sums.values())]]
    body += [[name, *(of(name, variant) for variant in variants)] for name in counted]
    return markdown(["", *(PROFILED.get(variant, variant) for variant in variants)], body) + footnote(rows)


def kernels_table() -> str:
    """The fastest way of every operation, and how near it comes to what the device can do at all."""
    rows = read("kernels-cuda.csv")
    if not rows:
        return NOT_YET
    groups: dict[tuple[str, str, str], Rows] = defaultdict(list)
    for row in rows:
        groups[row["shape"], row["operation"], row["direction"]].append(row)
    body = []
    for key, ways in groups.items():
        best = min(ways, key=lambda row: float(row["ms"]))
        first, fastest = (f"{1e3 * float(row['ms']):.0f}" for row in (ways[0], best))
        body.append([*key, first, best["way"], fastest, f"{float(best['reached']):.0%}"])
    header = ["shape", "operation", "", "PyTorch, µs", "fastest way", "µs", "of the ceiling"]
    copy, product = float(rows[0]["copy_gb_per_s"]) / 1e3, rows[0]["matmul_tflop_per_s"]
    ceilings = f"Ceilings: a copy at {copy:.1f} TB/s, a product at {product} TFLOP/s."
    return markdown(header, body) + f"\n\n{ceilings} {footnote(rows).lstrip()}"


def version_rows() -> str:
    """Versions of the libraries that are supported."""
    rows = ([name, bounds.lowest, bounds.newest, bounds.refused] for name, bounds in SUPPORTED.items())
    return markdown(["", "from", "tested to", "refused from"], rows)


TABLES = {
    "attach": lambda: attach_table("attach-cpu.csv"),
    "attach-gpu": lambda: attach_table("attach-cuda.csv"),
    "estimators": estimators_table,
    "families": family_rows,
    "grid": grid_table,
    "quickstart": quickstart_table,
    "step": lambda: step_table("step-cpu.csv"),
    "step-default": lambda: step_table("step-default-cpu.csv"),
    "step-default-gpu": partial(step_table, "step-default-cuda.csv", columns=ON_GPU, on_gpu=True),
    "step-dora": lambda: step_table("step-dora-cpu.csv"),
    "step-gpu": partial(step_table, "step-cuda.csv", columns=ON_GPU, on_gpu=True),
    "step-gpu-liger": partial(step_table, "step-liger-cuda.csv", "sft_liger", BESIDE_LIGER, on_gpu=True),
    "step-gpu-stand-in": partial(step_table, "step-stand-in-cuda.csv", columns=ON_GPU, on_gpu=True),
    "step-gpu-whole": partial(step_table, "step-whole-cuda.csv", columns=ON_GPU, on_gpu=True),
    "profile-gpu": profile_table,
    "kernels-gpu": kernels_table,
    "step-qlora": lambda: step_table("step-qlora-cpu.csv"),
    "step-qlora-gpu": partial(step_table, "step-qlora-cuda.csv", columns=ON_GPU, on_gpu=True),
    "versions": version_rows,
    "mapping": mapping_table,
    "quality-qlora": partial(quality_table, "accuracy-qlora-cpu.csv", "babyllama361-stories-nf4", 200),
    "quality-world": exact_match_table,
    **{name: partial(quality_table, "accuracy-cpu.csv", *study) for name, study in STUDIES.items()},
}


def fill(text: str) -> str:
    """A text with its tables written anew.

    Raises:
        ValueError: a table of an unknown name.
    """

    def table(match: re.Match) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"There is no table {match[2]!r}. Tables: {', '.join(TABLES)}.")
        return f"{match[1]}{TABLES[match[2]]()}\n{match[3]}"

    return re.sub(r"(<!-- table:([\w-]+) -->\n).*?(<!-- end -->)", table, text, flags=re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="fail where README is out of date")
    args = parser.parse_args()
    before = README.read_text(encoding="utf-8")
    after = fill(before)
    if args.check:
        if before != after:
            sys.stderr.write("README.md is out of date: run python recipes/bench/readme.py\n")
        return int(before != after)
    README.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
