"""What the package may do: no pickles, no code from the hub, no file outside its output and cache folders."""

import ast
import os
import sys
from pathlib import Path

import pytest
import torch
from helpers import SPARSE, tiny_model
from test_floors import FILES
from training import tokenizer, trained

from sparselora_hf import SparseLoraConfig
from sparselora_hf.cli.main import main
from sparselora_hf.cli.sft import parse

REPOSITORY_FILES = [*FILES, *sorted((Path(__file__).parents[1] / "recipes").rglob("*.py"))]

# call -> what must hold of its keywords; None forbids it
CALLS = {
    "pickle.load": None,
    "pickle.loads": None,
    "torch.load": lambda keywords: keywords.get("weights_only") is True,
    "torch.save": None,
    "joblib.load": None,
    "yaml.load": None,
    "yaml.full_load": None,
    "yaml.unsafe_load": None,
    "eval": None,
    "exec": None,
    "os.system": None,
    "subprocess.run": lambda keywords: not keywords.get("shell"),
    "subprocess.Popen": lambda keywords: not keywords.get("shell"),
}


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def constant(node: ast.AST) -> object:
    return node.value if isinstance(node, ast.Constant) else node


def forbidden(source: str) -> list[str]:
    """Calls that load what could run code, and remote code trusted without being asked to."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name, keywords = dotted(node.func), {k.arg: constant(k.value) for k in node.keywords}
        allowed = CALLS.get(name, lambda keywords: True)
        if allowed is None or not allowed(keywords) or keywords.get("trust_remote_code") is True:
            found.append(f"line {node.lineno}: {name}")
    return found


@pytest.mark.parametrize("path", REPOSITORY_FILES, ids=lambda path: "/".join(path.parts[-2:]))
def test_no_unsafe_call(path):
    assert forbidden(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "pickle.load(f)",
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "yaml.load(t, Loader=L)",
        "eval(t)",
        "subprocess.run(c, shell=True)",
        "AutoModel.from_pretrained(n, trust_remote_code=True)",
    ],
)
def test_the_audit_can_fail(line):
    assert forbidden(line) != []


def test_settings_cannot_run_code(tmp_path):
    file = tmp_path / "evil.yaml"
    file.write_text(f"mlp_sparsity: !!python/object/apply:os.mkdir ['{tmp_path}/made']\n")
    with pytest.raises(Exception, match="could not determine a constructor"):
        SparseLoraConfig.from_yaml(file)
    assert not (tmp_path / "made").exists()


def test_code_of_a_model_is_trusted_when_asked_alone():
    argv = ["--model_name_or_path", "org/name", "--dataset_name", "rows", "--output_dir", "out"]
    assert parse(argv).training.trust_remote_code is False
    assert parse([*argv, "--trust_remote_code"]).training.trust_remote_code is True


# events of the interpreter that change the file system, and how many paths they name
CHANGES = {"os.mkdir": 1, "os.remove": 1, "os.rmdir": 1, "os.chmod": 1, "os.truncate": 1}
CHANGES |= {"os.rename": 2, "os.link": 2, "os.symlink": 2}


class Watch:
    """Files and folders that this process makes, moves or opens for writing while it is on."""

    def __init__(self):
        self.on, self.paths = False, set()
        sys.addaudithook(self)  # cannot be taken away again: it sleeps

    def __call__(self, event, args):
        if self.on and (event in CHANGES or (event == "open" and self.writes(*args))):
            paths = args[: CHANGES.get(event, 1)]
            self.paths |= {os.path.realpath(os.fsdecode(path)) for path in paths if not isinstance(path, int)}

    @staticmethod
    def writes(path, mode, flags) -> bool:
        if mode is not None:
            return any(letter in mode for letter in "wax+")
        return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))

    def outside(self, *allowed: Path) -> set[str]:
        inside = tuple(f"{os.path.realpath(folder)}{os.sep}" for folder in allowed)
        same = {os.path.realpath(folder) for folder in allowed} | {os.devnull}
        return {path for path in self.paths if not path.startswith(inside) and path not in same}


WATCH = Watch()


@pytest.fixture
def watch(tmp_path, monkeypatch):
    """Everything that is no output goes to a folder of its own: caches, temporary files, bytecode."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.chdir(tmp_path)
    WATCH.paths = set()
    WATCH.on = True
    yield WATCH
    WATCH.on = False


def test_a_run_writes_into_its_output_and_cache_folders_alone(tmp_path, watch):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trainer = trained(tmp_path / "out", SPARSE.replace(compensation="mean"), **settings)
    trainer.save_model()
    trained(tmp_path / "out", SPARSE.replace(compensation="mean"), resume=True, **settings)
    assert (tmp_path / "sparselora-cache" / "svd").is_dir()
    assert any(path.endswith("adapter_model.safetensors") or "checkpoint" in path for path in watch.paths)
    assert watch.outside(tmp_path / "out", tmp_path / "sparselora-cache") == set()


def test_a_command_writes_into_its_output_and_cache_folders_alone(tmp_path, watch, monkeypatch):
    """Names of models and data, with separators and dots, never become paths."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "cache"))
    name = tmp_path / "hub" / "org" / "..strange--name"
    tiny_model().save_pretrained(name)
    tokenizer().save_pretrained(name)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "w4 w5 w6 w7 ", "completion": "w8 w9"}\n' * 8)
    watch.paths.clear()
    argv = ["--model_name_or_path", name, "--dataset_name", tmp_path / "rows.jsonl", "--output_dir", tmp_path / "out"]
    argv += ["--max_steps", 2, "--per_device_train_batch_size", 2, "--report_to", "none", "--mlp_sparsity", 0.5]
    argv += ["--criterion", "svd", "--rank", 4, "--dense_if_slower", "false"]
    assert main(["sft", *map(str, argv)]) == 0
    import datasets

    caches = (tmp_path / "sparselora-cache", Path(datasets.config.HF_DATASETS_CACHE), tmp_path / "cache")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert watch.outside(tmp_path / "out", *caches) == set()


def test_saved_files_hold_no_code(tmp_path):
    """All that the package itself writes is safetensors, YAML or JSON."""
    trained(tmp_path, SPARSE.replace(compensation="mean"), max_steps=2, save_strategy="steps", save_steps=2)
    ours = {p.suffix for p in tmp_path.rglob("sparselora*") if p.is_file()}
    ours |= {p.suffix for p in (tmp_path / "sparselora-cache").rglob("*") if p.is_file()}
    assert ours == {".safetensors", ".yaml"}
    assert torch.load(tmp_path / "checkpoint-2" / "optimizer.pt", weights_only=True)  # the Trainer's own, no objects
