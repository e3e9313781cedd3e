import dataclasses
import re
import types

import numpy as np
import pytest
import yaml

from sparselora_hf.config import CONFIG_FILE, EXACT_SAVINGS, SparseLoraConfig
from sparselora_hf.presets import PRESETS, get_preset
from sparselora_hf.shapes import MODEL_SHAPES

FULL = SparseLoraConfig(
    mlp_sparsity={"0-2": 0.9, 5: 0.5},
    attention_sparsity={"1, 3": 0.25},
    start_step=7,
    end_step=0.9,
    rank=4,
    criterion="svd_mean",
    score_tokens=128,
    token_rule="label",
    exact=("padding", "logits"),
    seed=3,
    cache_dir="somewhere",
)


@pytest.mark.parametrize(
    "config", [SparseLoraConfig(), FULL, SparseLoraConfig(0.9, exact=False)], ids=["default", "full", "plain"]
)
@pytest.mark.parametrize("as_folder", [False, True], ids=["file", "folder"])
def test_yaml_round_trip(config, as_folder, tmp_path):
    written = config.to_yaml(tmp_path if as_folder else tmp_path / "my.yaml")
    assert written == (tmp_path / (CONFIG_FILE if as_folder else "my.yaml"))
    read = SparseLoraConfig.from_yaml(tmp_path if as_folder else written)
    assert read.to_dict() == config.to_dict()
    assert read.layer_sparsity(8) == config.layer_sparsity(8)
    assert yaml.safe_load(written.read_text()) == config.to_dict()


def test_values_that_yaml_does_not_know_become_what_it_writes(tmp_path):
    """What code computes: numpy's numbers, a path, another mapping. A checkpoint must be able to hold them."""
    rising = {str(layer): value for layer, value in enumerate(np.linspace(0.25, 0.75, 3))}
    config = SparseLoraConfig(
        types.MappingProxyType(rising), np.float64(0.5), start_step=np.float64(0.25), cache_dir=tmp_path
    )
    assert SparseLoraConfig.from_yaml(config.to_yaml(tmp_path)) == config
    assert config == SparseLoraConfig({"0": 0.25, "1": 0.5, "2": 0.75}, 0.5, start_step=0.25, cache_dir=str(tmp_path))
    numbered = SparseLoraConfig({3: 0.5, "4-5": 0.25})
    assert SparseLoraConfig.from_yaml(numbered.to_yaml(tmp_path)) == numbered
    rising["0"] = 0.9
    assert config.mlp_sparsity["0"] == 0.25


def test_yaml_of_the_paper(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "mlp_sparsity: {3-30: 0.99}\n"
        "attention_sparsity: {14-19: 0.75, 21-23: 0.75, 25-29: 0.75}\n"
        "start_step: 0.05\n"
        "rank: 8\n"
    )
    config = SparseLoraConfig.from_yaml(path)
    assert config.layer_sparsity(32) == SparseLoraConfig.from_preset("llama-3-8b-math").layer_sparsity(32)


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n"], ids=["empty", "comment"])
def test_empty_yaml_is_the_default(text, tmp_path):
    (tmp_path / CONFIG_FILE).write_text(text)
    assert SparseLoraConfig.from_yaml(tmp_path) == SparseLoraConfig()


@pytest.mark.parametrize(
    "text", [b"mlp_sparsity: [", b"\xff\xfe", b"mlp_sparsity: 5e-1", b"rnak: 4", b"preset: [a]"], ids=str
)
def test_yaml_that_is_damaged_is_named(text, tmp_path):
    (tmp_path / CONFIG_FILE).write_bytes(text)
    with pytest.raises(ValueError, match=CONFIG_FILE):
        SparseLoraConfig.from_yaml(tmp_path)


def test_yaml_that_is_no_mapping(tmp_path):
    (tmp_path / CONFIG_FILE).write_text("- 0.9\n")
    with pytest.raises(ValueError, match=r"name: value.*found list"):
        SparseLoraConfig.from_yaml(tmp_path)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SparseLoraConfig().rank = 4


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_preset_fits_its_model(name):
    depth = 40 if "13b" in name else 32
    mlp, attention = SparseLoraConfig.from_preset(name).layer_sparsity(depth)
    assert max(mlp) > 0
    assert mlp[0] == mlp[1] == attention[0] == attention[1] == 0
    family = re.match(r"llama-[\d.]+-\d+b", name)[0]
    assert MODEL_SHAPES[family]["num_hidden_layers"] == depth


# figures.md and the appendix of the paper, by hand
@pytest.mark.parametrize(
    ("name", "layer", "mlp", "attention"),
    [
        ("llama-3-8b-math", 2, 0, 0),
        ("llama-3-8b-math", 3, 0.99, 0),
        ("llama-3-8b-math", 14, 0.99, 0.75),
        ("llama-3-8b-math", 20, 0.99, 0),
        ("llama-3-8b-math", 24, 0.99, 0),
        ("llama-3-8b-math", 30, 0.99, 0),
        ("llama-3-8b-math", 31, 0, 0),
        ("llama-2-13b-csr", 36, 0.97, 0.2),
        ("llama-2-13b-csr", 37, 0, 0),
        ("llama-3-8b-glue", 31, 0.5, 0),
    ],
)
def test_preset_layers(name, layer, mlp, attention):
    sparsity = SparseLoraConfig.from_preset(name).layer_sparsity(40 if "13b" in name else 32)
    assert (sparsity[0][layer], sparsity[1][layer]) == (mlp, attention)


def test_preset_overridden_by_keyword_and_in_a_mapping():
    by_keyword = SparseLoraConfig.from_preset("llama-3-8b-math", rank=4, start_step=10)
    in_mapping = SparseLoraConfig.from_dict({"preset": "llama-3-8b-math", "rank": 4, "start_step": 10})
    assert by_keyword == in_mapping
    assert (by_keyword.rank, by_keyword.start_step) == (4, 10)
    assert by_keyword.attention_sparsity == get_preset("llama-3-8b-math")["attention_sparsity"]


def test_presets_cannot_be_changed():
    get_preset("llama-3-8b-math")["rank"] = 1
    assert get_preset("llama-3-8b-math")["rank"] == 8
    with pytest.raises(TypeError):
        PRESETS["mine"] = {}


WRONG = {
    "sparsity 1": ({"mlp_sparsity": 1.0}, ValueError, "mlp_sparsity.*outside"),
    "sparsity 99": ({"mlp_sparsity": 99}, ValueError, "outside"),
    "negative sparsity": ({"attention_sparsity": -0.1}, ValueError, "attention_sparsity.*outside"),
    "NaN sparsity": ({"mlp_sparsity": float("nan")}, ValueError, "outside"),
    "sparsity in a range": ({"mlp_sparsity": {"1-2": 1.5}}, ValueError, r"mlp_sparsity\['1-2'\].*outside"),
    "sparsity as text": ({"mlp_sparsity": "0.9"}, TypeError, "number in"),
    "sparsity as bool": ({"mlp_sparsity": True}, TypeError, "number in"),
    "no sparsity": ({"mlp_sparsity": None}, TypeError, "number in"),
    "overlap": ({"mlp_sparsity": {"1-4": 0.5, "4": 0.9}}, ValueError, "layer 4 is named twice"),
    "overlap in one key": ({"mlp_sparsity": {"1-4, 3": 0.5}}, ValueError, "layer 3 is named twice"),
    "reversed": ({"mlp_sparsity": {"5-3": 0.5}}, ValueError, "runs backwards. Write 3-5"),
    "no range": ({"mlp_sparsity": {"all": 0.5}}, ValueError, "no layer range"),
    "negative layer": ({"mlp_sparsity": {"-1": 0.5}}, ValueError, "no layer range"),
    "start after end": ({"start_step": 0.9, "end_step": 0.5}, ValueError, "start_step 0.9 is after end_step 0.5"),
    "start after end in steps": ({"start_step": 9, "end_step": 5}, ValueError, "start_step 9 is after end_step 5"),
    "fraction above 1": ({"start_step": 5.0}, ValueError, "start_step.*above 1. Write steps as a whole number, 5"),
    "negative step": ({"start_step": -1}, ValueError, "start_step.*fraction in"),
    "NaN step": ({"start_step": float("nan")}, ValueError, "start_step"),
    "step as text": ({"end_step": "half"}, (TypeError, ValueError), "end_step"),
    "rank 0": ({"rank": 0}, ValueError, "rank: 0 must be a whole number"),
    "rank as bool": ({"rank": True}, ValueError, "rank: True must be a whole number"),
    "step as bool": ({"start_step": True}, ValueError, "start_step: True must be a fraction"),
    "rank as float": ({"rank": 8.0}, ValueError, "rank: 8.0"),
    "rank of the stand-ins 0": ({"compensation_rank": 0}, ValueError, "compensation_rank: 0"),
    "calibration_tokens 0": ({"calibration_tokens": 0}, ValueError, "calibration_tokens: 0"),
    "score_tokens 0": ({"score_tokens": 0}, ValueError, "score_tokens: 0"),
    "criterion": ({"criterion": "magic"}, ValueError, "criterion: 'magic' is not one of svd"),
    "token rule": ({"token_rule": "all"}, ValueError, "token_rule: 'all' is not one of"),
    "kernels": ({"kernels": "cuda"}, ValueError, "kernels: 'cuda' is not one of"),
    "branch": ({"lora_branch": "none"}, ValueError, "lora_branch"),
    "exact": ({"exact": ("padding", "speed")}, ValueError, "exact: 'speed' is not one of"),
    "exact is neither": ({"exact": None}, TypeError, "exact: None must be True, False or names"),
    "dense if slower": ({"dense_if_slower": "no"}, TypeError, "dense_if_slower: 'no' must be True or False"),
    "negative seed": ({"seed": -1}, ValueError, "seed: -1 is not between 0 and 4294967295"),
    "large seed": ({"seed": 1 << 32}, ValueError, "seed: 4294967296 is not between"),
    "seed as bool": ({"seed": True}, TypeError, "seed: True must be a whole number"),
    "seed": ({"seed": "x"}, TypeError, "seed: 'x' must be a whole number"),
    "cache": ({"cache_dir": 3}, TypeError, "cache_dir: 3 must be a path or None"),
    "endless": ({"end_step": float("inf")}, ValueError, "end_step: inf must be finite"),
    "key that is no text": ({1: 2}, ValueError, "Unknown SparseLoRA setting 1"),
    "unknown key": ({"mlp_sparsty": 0.9}, ValueError, "Unknown SparseLoRA setting mlp_sparsty.*Settings: preset, mlp"),
    "unknown preset": ({"preset": "llama-9"}, ValueError, "no preset 'llama-9'. Presets: llama-2-13b-csr"),
}


@pytest.mark.parametrize(("values", "error", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_input(values, error, message):
    with pytest.raises(error, match=message):
        SparseLoraConfig.from_dict(values)


def test_replace_checks_anew():
    config = SparseLoraConfig(mlp_sparsity=0.5)
    assert config.replace(rank=4) == SparseLoraConfig(mlp_sparsity=0.5, rank=4)
    with pytest.raises(ValueError, match="outside"):
        config.replace(mlp_sparsity=2)
    with pytest.raises(ValueError, match="Unknown"):
        config.replace(rnak=4)
    with pytest.raises(ValueError, match=r"preset: 'llama-3-8b-math' is no field.*from_preset"):
        config.replace(preset="llama-3-8b-math")


@pytest.mark.parametrize(
    ("exact", "names"),
    [
        (True, EXACT_SAVINGS),
        (False, ()),
        ("padding", ("padding",)),
        (["padding", "logits", "padding"], ("logits", "padding")),
    ],
    ids=["all", "none", "one", "list"],
)
def test_exact_names(exact, names):
    assert SparseLoraConfig(exact=exact).exact == names


@pytest.mark.parametrize("depth", [1, 2, 3, 5, 12, 32, 40])
def test_default_fits_any_depth(depth):
    config = SparseLoraConfig.default(depth, 64)
    mlp, attention = config.layer_sparsity(depth)
    assert len(mlp) == depth
    assert mlp[0] == mlp[-1] == 0
    assert not any(attention)
    assert config.is_sparse == (depth >= 3)


@pytest.mark.parametrize(
    ("hidden", "rank", "tokens"), [(64, 8, 2048), (1024, 64, 2048), (4096, 256, 4096), (8192, 256, 8192)]
)
def test_default_rank_and_sample_grow_with_the_width(hidden, rank, tokens):
    config = SparseLoraConfig.default(32, hidden)
    assert (config.compensation_rank, config.calibration_tokens) == (rank, tokens)


@pytest.mark.parametrize(
    ("values", "sparse"),
    [
        ({}, False),
        ({"mlp_sparsity": 0.1}, True),
        ({"attention_sparsity": {"3": 0.5}}, True),
        ({"mlp_sparsity": {"1-2": 0.0}}, False),
        ({"mlp_sparsity": {"1-2": 0.0, "3": 0.5}}, True),
    ],
    ids=["default", "mlp", "attention", "zeros", "zeros and more"],
)
def test_is_sparse(values, sparse):
    assert SparseLoraConfig(**values).is_sparse is sparse


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"cache_dir": "elsewhere", "end_step": 0.5, "start_step": 3, "kernels": "torch"}, True),
        ({"exact": False, "lora_branch": "sliced", "score_tokens": 7, "dense_if_slower": False}, True),
        ({"mlp_sparsity": {"3": 0.9}}, True),
        ({"mlp_sparsity": {3: 0.8}}, False),
        ({"attention_sparsity": 0.5}, False),
        ({"rank": 4}, False),
        ({"criterion": "output"}, False),
        ({"compensation": "mean"}, False),
        ({"token_rule": "label"}, False),
        ({"seed": 1}, False),
        ({"calibration_tokens": 64}, False),
        ({"compensation_rank": 4}, False),
    ],
    ids=str,
)
def test_what_dense_steps_teach_depends_on(change, same):
    config = SparseLoraConfig(mlp_sparsity={3: 0.9}, criterion="static", compensation="low_rank")
    assert config.learns_as(config.replace(**change)) == same
