"""Notebooks are committed without outputs; CI executes them with nbmake."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
REPOSITORY = re.search(r'^Repository = "https://github.com/(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1]


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return json.loads(request.param.read_text(encoding="utf-8")), request.param.name


def source(cell):
    return "".join(cell["source"])


def test_all_four_are_there():
    assert {p.stem for p in NOTEBOOKS} == {"quickstart", "sparse_qlora", "where_time_goes", "your_own_model"}


def test_outputs_are_stripped(notebook):
    for cell in notebook[0]["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None), cell["id"]


def test_ids_are_names_and_unique(notebook):
    ids = [cell["id"] for cell in notebook[0]["cells"]]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", name) for name in ids)


def test_badge_opens_this_notebook(notebook):
    content, name = notebook
    badge = f"https://colab.research.google.com/github/{REPOSITORY}/blob/main/notebooks/{name}"
    assert badge in source(content["cells"][0])


def test_first_cell_installs_and_keeps_torch(notebook):
    first = next(source(cell) for cell in notebook[0]["cells"] if cell["cell_type"] == "code")
    assert ".write_text(f\"torch=={version('torch')}\\n\")" in first
    [install] = re.findall(r"%pip install (.+)", first)
    assert "-c torch.txt" in install
    assert f"git+https://github.com/{REPOSITORY}" in install


def test_settings_leave_no_layer_dense_for_its_speed(notebook):
    """By the figures of an H200 the batches that fit a T4 are too small: nothing would be sparse in what is shown."""
    code = "".join(source(cell) for cell in notebook[0]["cells"] if cell["cell_type"] == "code")
    assert re.search(r"dense_if_slower\W+False", code)
