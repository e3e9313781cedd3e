"""Compile every kernel with every tile for every chip, without a GPU, and write down what each takes.

    python recipes/bench/compiled.py

Columns: registers and stack bytes of a thread (stack: spilled registers), shared memory of a block and the chip's
limit. `fits` is what the tests assert.
"""

import argparse
import csv
from pathlib import Path

import triton
from rich.progress import track

from sparselora_hf.kernels.compiled import compile_case, jobs
from sparselora_hf.kernels.tiles import CHIPS

RESULTS = Path(__file__).parent / "results" / "kernels-compiled.csv"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--csv", type=Path, default=RESULTS)
    parser.add_argument("--kernel", help="this case alone")
    args = parser.parse_args()
    rows = []
    for case, chip, dtype, tile in track([job for job in jobs() if args.kernel in (None, job[0].name)]):
        used = compile_case(case, chip, dtype, tile)
        rows.append(
            {
                "kernel": case.name,
                "chip": f"sm_{chip}",
                "dtype": dtype,
                "tile": f"{tile.m}x{tile.n}x{tile.k}",
                "warps": tile.warps,
                "stages": tile.stages,
                "registers": used.registers,
                "stack": used.stack,
                "shared": used.shared,
                "shared_limit": CHIPS[chip].shared,
                "fits": used.within(chip),
                "triton": triton.__version__,
            }
        )
    with args.csv.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return int(not all(row["fits"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
