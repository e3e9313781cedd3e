import csv
import importlib
import io
from pathlib import Path

import pytest
from datasets import Dataset
from rich.console import Console
from test_comparison import DENSE, SPARSE

ROOT = Path(__file__).parents[1]


@pytest.fixture
def compare(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    return importlib.import_module("compare")


def test_own_flags_are_taken_and_the_others_go_on(compare):
    own, others = compare.parse(["--methods", "lora", "dora", "--smoke", "--max_steps", "3"])
    assert own.methods == ["lora", "dora"]
    assert others == ["--config", str(compare.DEFAULT), "--smoke", "--max_steps", "3"]
    assert compare.DEFAULT.is_file()


def test_the_recipe_that_is_given_is_kept(compare):
    assert compare.parse(["--config", "mine.yaml"])[1] == ["--config", "mine.yaml"]


@pytest.mark.parametrize(
    ("method", "dense", "bits", "dora"),
    [
        ("lora", True, False, False),
        ("sparselora", False, False, False),
        ("qlora", True, True, False),
        ("sparseqlora", False, True, False),
        ("dora", True, False, True),
        ("sparsedora", False, False, True),
    ],
)
def test_methods_are_flags_of_one_recipe(compare, method, dense, bits, dora):
    from sparselora_hf.cli.recipe import parse

    recipe = parse(["--config", str(compare.DEFAULT), "--smoke", *compare.METHODS[method][1]])
    assert (recipe.data.dense, recipe.model.load_in_4bit, recipe.model.use_dora) == (dense, bits, dora)


@pytest.mark.parametrize(("rows", "asked", "held"), [(100, 10, 10), (100, 50, 20), (5, 200, 1)])
def test_last_rows_are_held_out(compare, rows, asked, held):
    train, test = compare.split(Dataset.from_dict({"x": list(range(rows))}), asked)
    assert [row["x"] for part in (train, test) for row in part] == list(range(rows))
    assert (len(train), len(test)) == (rows - held, held)


def test_too_few_rows_are_an_error(compare):
    with pytest.raises(ValueError, match="4 rows are too few"):
        compare.split(Dataset.from_dict({"x": [1, 2, 3, 4]}), 2)


def test_figures(compare):
    dense, sparse = compare.figures([DENSE, SPARSE], [{"gsm8k": 50.0}, {"gsm8k": 25.0}])
    assert (dense["step_seconds"], dense["step_speedup"]) == (
        2.0,
        1.0,
    )  # steps 2 to 4: the sparse run's first is dense
    assert (dense["run_seconds"], sparse["run_seconds"]) == (10.0, 11.0)
    assert sparse["run_speedup"] == pytest.approx(10 / 11)
    assert (dense["shared_loss"], dense["loss_seconds"], sparse["loss_seconds"]) == (1.2, 10.0, 5.0)
    assert sparse["loss_speedup"] == 2.0
    assert (dense["first_sparse_step"], sparse["first_sparse_step"]) == (None, 2)
    assert sparse["score_gsm8k"] == 25.0


def test_a_score_that_one_method_alone_has_loses_no_table(compare, monkeypatch, tmp_path):
    told = iter([(DENSE, {"gsm8k": 50.0, "svamp": 20.0}), (SPARSE, {"gsm8k": 25.0, "mawps": 30.0})])
    monkeypatch.setattr("sparselora_hf.comparison.in_fresh_process", lambda *arguments: next(told))
    assert compare.main(["--output-dir", str(tmp_path)]) == 0
    dense, sparse = csv.DictReader((tmp_path / "compare.csv").open())
    assert (dense["score_gsm8k"], sparse["score_gsm8k"]) == ("50.0", "25.0")
    assert (dense["score_svamp"], sparse["score_svamp"]) == ("20.0", "")
    assert (dense["score_mawps"], sparse["score_mawps"]) == ("", "30.0")


def test_table_has_a_column_for_each_method(compare):
    rows = compare.figures([DENSE, SPARSE], [{"gsm8k": 50.0}, {"gsm8k": 25.0}])
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(compare.table(rows))
    cells = [line.split("│")[1:4] for line in console.export_text().splitlines() if "│" in line]
    lines = {label.strip(): figures for label, *figures in cells}
    assert [cell.strip() for cell in lines["time to loss 1.2000, s"]] == ["10.0", "5.0"]
    assert [cell.strip() for cell in lines["gsm8k, %"]] == ["50.0", "25.0"]
    assert [cell.strip() for cell in lines["peak memory, MiB"]] == ["n/a", "n/a"]


def test_a_sparse_method_is_not_trained_dense(compare, tmp_path):
    own, others = compare.parse(["--smoke", "--dense", "--output-dir", str(tmp_path)])
    with pytest.raises(ValueError, match="dense: SparseLoRA would not be what is trained"):
        compare.run("sparselora", own, others)
