"""What a run says: figures in the log, the model card, warnings."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from helpers import SPARSE
from training import examples, make_trainer, metrics, trained
from transformers import TrainerCallback

from sparselora_hf import SparseLoraConfig, meter
from sparselora_hf.cost import BatchShape, LoraShape, step_cost


def test_log_carries_the_figures(tmp_path):
    trainer = trained(tmp_path, SPARSE)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["sparselora/channel_sparsity"] > 0 for log in logs] == [False, False, True, True, True, True]
    for log in logs:
        assert 0.3 < log["sparselora/context_share"] < 0.9
        assert log["sparselora/tokens_per_second"] > 0
    saved = [log["sparselora/linear_flops_saved"] for log in logs]
    assert min(saved[2:]) > max(saved[:2]) >= 0


def test_stand_ins_are_taken_off_the_saving(tmp_path):
    configs = [SPARSE.replace(criterion="static", compensation=name) for name in ("low_rank", "mean")]
    last = [trained(tmp_path, config, max_steps=3).state.log_history[-2] for config in configs]
    saved = [log["sparselora/linear_flops_saved"] for log in last]
    assert 0 < saved[0] < saved[1] - 0.1


def test_context_share_is_exact(tmp_path):
    rows = examples(4)
    trainer = trained(tmp_path, SPARSE.replace(start_step=0), data=rows, max_steps=1)
    labelled = [sum(label != -100 for label in row) for row in rows["labels"]]
    total = sum(len(row) for row in rows["labels"])
    want = 1 - sum(n + 1 for n in labelled) / total
    (log,) = [log for log in trainer.state.log_history if "loss" in log]
    assert log["sparselora/context_share"] == pytest.approx(want, abs=1e-4)


class _Clock(TrainerCallback):
    """A second for each step, a thousand for starting, evaluating and saving."""

    def __init__(self):
        self.now = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.now += 1

    def on_train_begin(self, args, state, control, **kwargs):
        self.now += 1000

    on_evaluate = on_save = on_train_begin


def test_speed_is_that_of_training_alone(tmp_path, monkeypatch):
    clock, data = _Clock(), examples(4)
    monkeypatch.setattr(meter, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    often = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 3}
    run = trained(tmp_path, SPARSE, data=data, eval_dataset=data, callbacks=[clock], logging_steps=2, **often)
    run.train()  # what came between two runs is none of either
    assert metrics(run, "sparselora/tokens_per_second") == [sum(map(len, data["input_ids"]))] * 3


def test_figures_are_logged_once_and_nothing_else_changes(tmp_path):
    dense, exact = trained(tmp_path), trained(tmp_path, SparseLoraConfig())
    keys = [{key for log in run.state.log_history for key in log} for run in (dense, exact)]
    assert keys[1] - keys[0] == {
        "sparselora/channel_sparsity",
        "sparselora/context_share",
        "sparselora/linear_flops_saved",
        "sparselora/tokens_per_second",
    }
    assert keys[0] <= keys[1]


@pytest.mark.parametrize(("saving", "rows"), [("padding", {"prompt": (18, 20)}), ("last_layer", {"prompt": (1, 1)})])
def test_rows_too_few_to_be_left_out_are_not_said_to_be_saved(tmp_path, saving, rows):
    data = examples(4, **{"prompt": (4, 4), "answer": (20, 20)} | rows)
    trainer = trained(tmp_path, SparseLoraConfig(exact=(saving,)), data=data, max_steps=1)
    (log,) = [log for log in trainer.state.log_history if "loss" in log]
    assert log["sparselora/linear_flops_saved"] == 0


def test_sparse_parts_leave_out_padding_however_little(tmp_path):
    """The one row of padding is computed by dense parts alone."""
    labels = [[-100] * 18 + [3, 3], [-100] * 17 + [3, 3]]
    data = Dataset.from_dict({"input_ids": [[3] * 20, [3] * 19], "labels": labels})
    seen = []
    trainer = make_trainer(tmp_path, SPARSE.replace(start_step=0, exact=("padding",)), data=data, max_steps=1)
    begin = trainer.sparse_handle.state.begin

    def watched(*args, **kwargs):
        batch = begin(*args, **kwargs)
        seen.extend(len(batch.rows(torch.device("cpu"), sparse=s, loss_only=False).dense) for s in (True, False))
        return batch

    trainer.sparse_handle.state.begin = watched
    trainer.train()
    assert seen == [6, 0]  # the latter runs as if unpatched
    saved = metrics(trainer, "sparselora/linear_flops_saved")[0]
    shape, batch = trainer.sparse_handle.state.meter.model, BatchShape(33, 6, 1, 4, 2, 20)
    keep = {"mlp_keep": [10, 10, None], "attention_keep": [None, 8, None]}
    most, least = (step_cost(shape, batch, LoraShape(0), exact=exact, **keep).linear for exact in ((), ("padding",)))
    dense = step_cost(shape, batch, LoraShape(0)).linear
    assert 1 - most / dense < saved < 1 - least / dense


def test_model_card_names_method_and_paper(tmp_path):
    trainer = make_trainer(tmp_path, SPARSE)
    trainer.create_model_card(model_name="mine")
    card = (tmp_path / "README.md").read_text()
    assert "- sparselora" in card
    assert "2506.16500" in card
    assert "SparseLoRA: Accelerating LLM Fine-Tuning" in card
    assert "sparselora" in trainer.model.model_tags


def test_no_context_is_said_once(tmp_path, caplog):
    rows = examples(16)
    everything = Dataset.from_dict({"input_ids": rows["input_ids"], "labels": rows["input_ids"]})
    trained(tmp_path, SPARSE, data=everything)
    said = [record.getMessage() for record in caplog.records if "no context tokens" in record.getMessage()]
    assert len(said) == 1
    assert "prompt/completion" in said[0]
    assert "assistant_only_loss" in said[0]


@pytest.mark.parametrize(
    ("pays", "said"),
    [
        ("never", "no layer drops channels, though the settings ask for it: would not be faster sparse."),
        ("in larger batches", "this batch is too small for sparsity to pay"),
        ("always", None),
    ],
)
def test_sparsity_that_does_not_pay_is_told_of_once(tmp_path, caplog, monkeypatch, pays, said):
    fixed, per_row = {"never": (0.0, 1e9), "in larger batches": (1e12, 0.0), "always": (0.0, 0.0)}[pays]
    monkeypatch.setattr("sparselora_hf.worth._FIXED", {"cpu": {"mlp": fixed, "attention": fixed}})
    monkeypatch.setattr("sparselora_hf.worth._PER_ELEMENT", {"cpu": {"mlp": per_row, "attention": per_row}})
    trainer = trained(tmp_path, SPARSE.replace(dense_if_slower=True))
    warnings = [r.getMessage() for r in caplog.records if r.name.startswith("sparselora") and r.levelname == "WARNING"]
    assert len(warnings) == (said is not None)
    assert not said or said in warnings[0]
    assert any(metrics(trainer, "sparselora/channel_sparsity")) is (said is None)


@pytest.mark.parametrize("config", [SPARSE, SparseLoraConfig()], ids=["sparse", "exact alone"])
def test_no_warning_where_there_is_no_reason(tmp_path, caplog, config):
    trained(tmp_path, config, max_steps=3)
    warnings = [r for r in caplog.records if r.name.startswith("sparselora") and r.levelname == "WARNING"]
    assert [r.getMessage() for r in warnings] == []
