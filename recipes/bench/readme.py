"""Write README's measured tables from the CSV files under `results/`. Run after every benchmark.

A table stands between `<!-- table:NAME -->` and `<!-- end -->`. `--check` writes nothing and fails where README is not
what the files say.
"""

import argparse
import csv
import json
import re
import sys
from pathlib import Path

from sparselora_hf.families import families_table

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[2] / "README.md"
QUICKSTART_PAIRS = {"exact_match": ".1f", "loss": ".4f"}
NAMES = {"exact": "exact savings alone", "sparse": "SparseLoRA", "sparse_no_exact": "SparseLoRA without exact savings"}


def read(name: str) -> list[dict[str, str]]:
    path = RESULTS / name
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def footnote(rows: list[dict[str, str]]) -> str:
    commits = sorted({row["commit"] for row in rows})
    first = rows[0]
    versions = ", ".join(f"{name} {first[name]}" for name in ("torch", "transformers", "peft", "trl"))
    return f"\n\n{first['device']}; {versions}; commit {', '.join(commits)}."


def step_table() -> str:
    rows = read("step-cpu.csv")
    if not rows:
        return "Not yet measured."
    header = ["context", "fill", "checkpointing", "variant", "speed-up", "by wall clock", "FLOP bound", "peak memory"]
    body = []
    memory = 0.0
    for row in rows:
        peak = float(row["peak_memory"] or 0)
        if row["variant"] == "sft":
            memory = peak
            continue
        ratio = f"{peak / memory:.2f}" if peak and memory else "n/a"
        start = [f"{float(row['context_share']):.0%}", f"{float(row['fill']):.0%}"]
        start += ["yes" if row["checkpointing"] == "True" else "no", NAMES[row["variant"]]]
        speeds = [f"{float(row[k]):.2f}x" for k in ("speedup", "speedup_wall", "bound")]
        body.append([*start, *speeds, ratio])
    return markdown(header, body) + footnote(rows)


def grid_table() -> str:
    rows = [row for row in read("grid-cpu.csv") if row["variant"] == "sparse"]
    if not rows:
        return "Not yet measured."
    header = ["hidden", "cells", "slowest cell", "median", "fastest cell"]
    body = []
    for hidden in sorted({int(row["hidden"]) for row in rows}):
        cells = sorted(float(row["speedup"]) for row in rows if int(row["hidden"]) == hidden)
        figures = [f"{value:.2f}x" for value in (cells[0], cells[len(cells) // 2], cells[-1])]
        body.append([str(hidden), str(len(cells)), *figures])
    return markdown(header, body) + footnote(rows)


def quickstart_table() -> str:
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("quickstart-seed*.json"))]
    if not reports:
        return "Not yet measured."
    header = ["seed", "speed-up of the median step", "by process time", "exact match", "training loss", "seconds"]
    body = []
    for report in reports:
        pairs = [f"{report[k]['dense']:{form}} / {report[k]['sparse']:{form}}" for k, form in QUICKSTART_PAIRS.items()]
        speeds = [f"{report[k]:.2f}x" for k in ("speedup", "speedup_cpu")]
        body.append([str(report["seed"]), *speeds, *pairs, f"{report['seconds']:.0f}"])
    versions = ", ".join(f"{name} {version}" for name, version in reports[0]["versions"].items())
    return markdown(header, body) + f"\n\nSFTTrainer / SparseLoraTrainer; {reports[0]['device']}; {versions}."


def family_rows() -> str:
    return markdown(*families_table())


TABLES = {"step": step_table, "grid": grid_table, "quickstart": quickstart_table, "families": family_rows}


def fill(text: str) -> str:
    for name, make in TABLES.items():
        pattern = rf"(<!-- table:{name} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda m, make=make: f"{m[1]}{make()}\n{m[2]}", text, flags=re.DOTALL)
    return text


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
