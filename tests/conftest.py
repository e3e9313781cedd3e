import gc
import os
from pathlib import Path

import pytest
import torch
from helpers import ATTENTION, lora_model, make_batch
from hypothesis import Phase, settings
from rows import COLLECTED, ROWS
from transformers.utils import logging

from sparselora_hf.state import SparseState

ROOT = Path(__file__).parents[1]

settings.register_profile("default", max_examples=100, deadline=None)
settings.register_profile("thorough", max_examples=3000, deadline=None, phases=[Phase.generate])
settings.load_profile("default")


@pytest.fixture
def choose_again(monkeypatch):
    """Call it between two runs: the second has the scores of the first. In bf16 a near tie may fall either way."""
    seen, told, select = [], [], SparseState.select

    def choose(self, layer, kind, scores, keep, layout=None):
        if told:
            scores = told.pop(0)
        else:
            seen.append(scores)
        select(self, layer, kind, scores, keep, layout)

    def again():
        told[:] = seen
        seen.clear()

    monkeypatch.setattr(SparseState, "select", choose)
    return again


def _short(nodeid: str) -> str:
    return nodeid.rpartition("tests/")[2]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Remember what was collected before anything is left out."""
    config.stash[COLLECTED] = {_short(item.nodeid) for item in items}


def pytest_terminal_summary(terminalreporter, config):
    """After a run of the whole suite, the table of what a user may do and how its tests fared."""
    needed = {test for rows in ROWS.values() for tests in rows.values() for test in tests}
    fared = {
        _short(report.nodeid): outcome
        for outcome in ("passed", "skipped", "failed", "error")
        for report in terminalreporter.stats.get(outcome, [])
    }
    if not needed <= fared.keys():
        return
    terminalreporter.section("row, tests, outcome")
    for part, rows in ROWS.items():
        for row, tests in rows.items():
            outcomes = sorted({fared.get(test, "not run") for test in tests})
            terminalreporter.write_line(f"{part:<11} {row:<42} {len(tests):>2}  {', '.join(outcomes)}")


@pytest.fixture(scope="session", autouse=True)
def _libraries_are_no_garbage():
    """Every `train` collects garbage: what the imports made need not be looked through each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tiny tensors spend their time waiting for other threads."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """Every test has an SVD cache of its own."""
    monkeypatch.setenv("SPARSELORA_CACHE", str(tmp_path / "sparselora-cache"))


@pytest.fixture
def data_dir() -> Path:
    """The shared data folder, `SPARSELORA_DATA`."""
    folder = Path(os.environ.get("SPARSELORA_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"the shared data folder is not here: set SPARSELORA_DATA ({folder} does not exist)")
    return folder


@pytest.fixture
def batch():
    """Three padded sequences of different length."""
    return make_batch()


@pytest.fixture(params=["llama", "mistral", "qwen2"])
def any_model(request):
    """A tiny model of each family, with adapters on q, k, v and o."""
    return lora_model(request.param, ATTENTION)


@pytest.fixture
def poison(monkeypatch):
    """`torch.empty` and `new_empty` hand out NaN, so that an element never written shows."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def filled(tensor):
        if tensor.is_floating_point():
            tensor.detach().fill_(float("nan"))
        return tensor

    monkeypatch.setattr(torch, "empty", lambda *a, **k: filled(empty(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: filled(new_empty(*a, **k)))


@pytest.fixture
def offline(monkeypatch):
    """The hub is not asked: without a network its libraries would try for half a minute before they say so."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
