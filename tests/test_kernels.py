"""Triton kernels without a GPU: interpreted against their twins, and compiled for every chip."""

import csv
import dataclasses
import os
import subprocess
import sys

import pytest
from helpers import ROOT

pytest.importorskip("triton", reason="Triton is there on Linux only")

from sparselora_hf.kernels.compiled import CASES, compile_case, jobs
from sparselora_hf.kernels.estimator import MAX_RANK, gram_options
from sparselora_hf.kernels.tiles import CHIPS, TILES

RECORD = ROOT / "recipes" / "bench" / "results" / "kernels-compiled.csv"


def test_interpreted_kernels_equal_their_twins():
    """Triton decides on its import whether it interprets: a process of its own runs `tests/kernel_parity`."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernel_parity"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "100%" in done.stdout


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_compiled_for_every_chip(case, tmp_path, monkeypatch):
    """No tile spills a register, or takes more shared memory than the chip has."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    bad = {}
    for other, chip, dtype, tile in jobs():
        if other is case:
            used = compile_case(case, chip, dtype, tile)
            if not used.within(chip):
                bad[chip, dtype, tile] = used
    assert not bad


@pytest.mark.parametrize("chip", CHIPS)
def test_the_largest_rank_spills_nothing_either(chip, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    case = next(case for case in CASES if case.name == "gram_norms_fwd")
    for tile in TILES[case.op][CHIPS[chip].tiles]:
        options = gram_options(MAX_RANK, tile)
        assert (options["BLOCK_N"], options["num_stages"]) == (tile.n, tile.stages)
        widest = dataclasses.replace(case, rank=options["BLOCK_R"])
        used = compile_case(widest, chip, CHIPS[chip].types[0], dataclasses.replace(tile, warps=options["num_warps"]))
        assert used.within(chip), used


def test_every_operation_of_the_tile_table_is_compiled():
    assert {case.op for case in CASES} == TILES.keys()


def test_the_record_lists_every_job():
    with RECORD.open(newline="", encoding="utf-8") as file:
        recorded = [tuple(row[k] for k in ("kernel", "chip", "dtype", "tile")) for row in csv.DictReader(file)]
    want = [(case.name, f"sm_{chip}", dtype, f"{tile.m}x{tile.n}x{tile.k}") for case, chip, dtype, tile in jobs()]
    assert recorded == want, "run python recipes/bench/compiled.py"
