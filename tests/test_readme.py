"""Everything that README shows is true of the code: tables, links, Python, commands."""

import ast
import importlib
import importlib.metadata
import re
import shlex
import sys
from pathlib import Path

import pytest

import sparselora_hf

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [
    part.split("  #")[0].strip()
    for language, code in BLOCKS
    if language == "bash"
    for line in code.splitlines()
    for part in line.split("&&")
]
LINKS = re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT)


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes" / "bench"))
    yield importlib.import_module("readme")
    sys.modules.pop("readme")


def test_tables_are_what_files_and_code_say(bench):
    assert bench.fill(TEXT) == TEXT, "run python recipes/bench/readme.py"


def test_repeats_are_one_line_with_their_range(bench, monkeypatch):
    base = dict.fromkeys(("device", "torch", "transformers", "peft", "trl", "commit"), "x")
    base |= {"model": "m", "sequence": "8", "output": "2", "batch": "1", "fill": "1.0", "checkpointing": "False"}
    base |= {"context_share": "0.75", "bound": "3", "speedup_wall": "2"}
    rows = []
    for speedup in ("2.0", "4.0"):
        rows.append({**base, "variant": "sft", "speedup": "1.0", "peak_memory": "100"})
        rows.append({**base, "variant": "sparse", "speedup": speedup, "peak_memory": "50"})
    monkeypatch.setattr(bench, "read", lambda name: rows)
    lines = bench.step_table("any.csv").splitlines()
    assert len([line for line in lines if line.startswith("| 1 x 8")]) == 1
    assert "3.00x (2.00-4.00)" in lines[2]
    assert "0.50 (0.50-0.50)" in lines[2]


STACK = dict.fromkeys(("device", "torch", "transformers", "peft", "trl", "commit"), "x")


def test_profile_by_variant(bench, monkeypatch):
    cells = [("sft", "product", "9.0", "4"), ("sft", "waits", "", "3"), ("sparse", "estimator", "0.5", "2")]
    cells += [("sparse", "product", "3.0", "5"), ("sparse", "waits", "", "3")]
    cells = [("sft", "product", "8.0", "4"), *cells]  # of an earlier run
    rows = [dict(zip(("variant", "group", "ms", "count"), cell, strict=True), **STACK) for cell in cells]
    monkeypatch.setattr(bench, "read", lambda name: rows)
    lines = bench.profile_table().splitlines()
    assert lines[0] == "|  | SFTTrainer | SparseLoRA |"
    assert lines[2:6] == [
        "| product | 9.0 (4) | 3.0 (5) |",
        "| estimator |  | 0.5 (2) |",
        "| all kernels | 9.0 | 3.5 |",
        "| waits | 3 | 3 |",
    ]


def test_fastest_way_of_an_operation(bench, monkeypatch):
    common = {"shape": "math", "operation": "mlp", "direction": "forward", "copy_gb_per_s": "4200"}
    common |= {"matmul_tflop_per_s": "700", **STACK}
    times = (("torch", "0.2", "0.1"), ("triton", "0.05", "0.4"), ("triton", "0.08", "0.25"))
    rows = [{**common, "way": way, "ms": ms, "reached": reached} for way, ms, reached in times]
    monkeypatch.setattr(bench, "read", lambda name: rows)
    text = bench.kernels_table()
    assert "| math | mlp | forward | 200 | triton | 50 | 40% |" in text.splitlines()
    assert "a copy at 4.2 TB/s, a product at 700 TFLOP/s" in text


def test_unknown_table_is_an_error(bench):
    with pytest.raises(ValueError, match="no table 'stpe'"):
        bench.fill("<!-- table:stpe -->\n<!-- end -->")


def test_table_of_families_names_every_family():
    table = re.search(r"<!-- table:families -->(.*?)<!-- end -->", TEXT, re.DOTALL)[1]
    assert set(re.findall(r"\(`(\w+)`\)", table)) == set(sparselora_hf.FAMILIES)


@pytest.mark.parametrize("link", LINKS)
def test_links_lead_to_files(link):
    assert (ROOT / link).is_file()


@pytest.mark.parametrize("code", PYTHON, ids=lambda code: code.splitlines()[0])
def test_python_compiles_and_its_imports_exist(code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert all(getattr(module, alias.name) for alias in node.names)


def test_configurations_are_valid():
    [code] = [code for code in PYTHON if "from_preset" in code]
    exec(compile(code, "README", "exec"), {})


def parse_sft(argv):
    from sparselora_hf.cli.recipe import parse

    parse(argv)


def parse_compare(argv):
    from sparselora_hf.cli.recipe import parse

    compare = importlib.import_module("compare")
    own, others = compare.parse(argv)
    for method in own.methods:
        parse([*others, *compare.METHODS[method][1]])


def parser_of(command):
    return lambda argv: importlib.import_module(f"sparselora_hf.cli.{command}")._parser().parse_args(argv)


PARSERS = {
    "sft": parse_sft,
    "eval": parser_of("eval"),
    "estimate": parser_of("estimate"),
    "quickstart": parser_of("quickstart"),
    "doctor": lambda argv: argv == [] or pytest.fail("doctor takes no arguments"),
    "recipes/compare.py": parse_compare,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    program, *argv = shlex.split(command)
    if program == "pytest":
        assert argv == []
    elif program == "pip":
        extras = importlib.metadata.metadata("sparselora-hf").get_all("Provides-Extra")
        assert set(re.search(r"\[(.+)\]", command)[1].split(",")) <= set(extras)
        assert (ROOT / argv[argv.index("-c") + 1]).is_file()
    else:
        assert program in ("sparselora", "python")
        PARSERS[argv[0]](argv[1:])
