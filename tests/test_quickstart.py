import json
import sys

import pytest
from helpers import tiny_model
from peft import PeftModel
from transformers import AutoModelForCausalLM

from sparselora_hf import SparseLoraConfig, comparison
from sparselora_hf.cli import quickstart
from sparselora_hf.cli.main import main
from sparselora_hf.world import build_tokenizer, finetuning_examples

KEYS = {"speedup", "speedup_cpu", "speedup_run", "exact_match", "loss", "peak_memory", "seconds"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A tiny model that speaks the world's language; training stays in this process."""
    monkeypatch.setattr(comparison, "in_fresh_process", lambda function, *arguments: function(*arguments))
    tokenizer = build_tokenizer()
    tiny_model(vocab_size=len(tokenizer), layers=4, max_position_embeddings=512).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path


def run(folder, *more):
    argv = ["--model", str(folder / "model"), "--output-dir", str(folder / "out"), "--steps", "4", "--batch", "2"]
    return main(["quickstart", *argv, "--test-rows", "3", *more])


def test_report_picture_and_adapters(folder, capsys):
    settings = folder / "sparse.yaml"
    settings.write_text("mlp_sparsity: {1-2: 0.5}\ncriterion: static\nstart_step: 2\ndense_if_slower: false\n")
    assert run(folder, "--sparse-config", str(settings)) == 0
    report = json.loads((folder / "out/report.json").read_text())
    assert report.keys() >= KEYS
    assert report["loss"].keys() == report["exact_match"].keys() == report["peak_memory"].keys() == {"dense", "sparse"}
    assert report["first_sparse_step"] == 3
    assert [len(report["curves"][name][kind]) for name in ("dense", "sparse") for kind in ("loss", "cpu")] == [4] * 4
    assert report["channel_sparsity"] == pytest.approx(0.5, abs=0.02)
    assert (folder / "out/report.png").read_bytes().startswith(b"\x89PNG")
    assert "SparseLoraTrainer" in capsys.readouterr().out
    for name in ("dense", "sparse"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "model"), folder / "out" / name)


@pytest.mark.parametrize("own", [True, False], ids=["own model", "another model"])
def test_settings_without_a_schedule_change_the_default(folder, own):
    settings = folder / "sparse.yaml"
    settings.write_text("start_step: 2\n")
    argv = ["--sparse-config", str(settings), *([] if own else ["--model", str(folder / "model")])]
    default = SparseLoraConfig.from_dict(quickstart.SPARSE) if own else SparseLoraConfig.default(4, 64)
    assert quickstart._sparse(quickstart._parser().parse_args(argv)) == default.replace(start_step=2)


def test_dataset_of_the_users_own(folder):
    rows = finetuning_examples(1, 20, "train")
    data = folder / "mine.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": r["prompt"], "completion": r["completion"]}) for r in rows))
    assert run(folder, "--dataset", str(data)) == 0
    assert (folder / "out/report.json").exists()


def test_without_matplotlib_there_is_all_but_the_picture(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(folder) == 0
    assert "median step" in capsys.readouterr().out
    assert not (folder / "out/report.png").exists()


def test_missing_model_is_one_line(folder, capsys):
    assert main(["quickstart", "--model", str(folder / "nowhere"), "--output-dir", str(folder / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sparselora: error:")
    assert "nowhere" in error
    assert error.count("\n") == 1


def test_held_out_rows_are_no_negative_number(folder, capsys):
    assert main(["quickstart", "--test-rows", "-3", "--output-dir", str(folder)]) == 2
    assert "test_rows: -3 is below 0" in capsys.readouterr().err


def test_exact_match_counts_whole_answers():
    class Echo:
        device = "cpu"

        def eval(self):
            pass

        def generate(self, input_ids, **settings):
            import torch

            answers = [tokenizer(row["completion"])["input_ids"] for row in rows[:2]] + [[0], [0]]
            width = max(map(len, answers))
            padded = [a + [tokenizer.pad_token_id] * (width - len(a)) for a in answers]
            return torch.cat([input_ids, torch.tensor(padded)], 1)

    tokenizer = build_tokenizer()
    rows = finetuning_examples(2, 4, "test")
    assert comparison.exact_match(Echo(), tokenizer, rows) == 50.0
