"""What a run leaves on disk: adapters that plain PEFT reads, checkpoints that a run resumes from."""

import dataclasses
import json

import pytest
import torch
from helpers import ATTENTION, MLP, SPARSE, lora_model, run_python, tiny_model
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from training import make_trainer, metrics, trained
from transformers import AutoModelForCausalLM
from trl import SFTConfig

from sparselora_hf import SparseLoraCallback, SparseLoraConfig, attach, handle
from sparselora_hf.config import CONFIG_FILE

CRITERIA = {
    "svd": SPARSE,
    "random": SPARSE.replace(criterion="random"),
    "sampled": SPARSE.replace(criterion="sampled", score_tokens=8),
    "static": SPARSE.replace(criterion="static"),
    "output": SPARSE.replace(criterion="output", compensation="low_rank", compensation_rank=4),
    "svd_whitened": SPARSE.replace(criterion="svd_whitened"),
    "low rank": SPARSE.replace(compensation="low_rank", compensation_rank=4),
    "small sample": SPARSE.replace(criterion="static", compensation="mean", calibration_tokens=16),
}


@pytest.fixture(params=[ATTENTION, ATTENTION + MLP], ids=["qkvo", "all linears"])
def targets(request):
    return request.param


def test_saved_adapter_is_that_of_plain_peft(tmp_path, targets):
    trainer = trained(tmp_path, SPARSE, model=lora_model(targets=targets))
    trainer.save_model()
    plain = get_peft_model_state_dict(lora_model(targets=targets))
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved.keys() == plain.keys()
    assert all(saved[name].shape == plain[name].shape for name in plain)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA"
    assert "sparse" not in json.dumps({k: v for k, v in settings.items() if "path" not in k}).lower()


LOAD = """
import sys
sys.modules["sparselora_hf"] = None  # an import of it fails
import torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
base, adapter, out = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
with torch.no_grad():
    ids = torch.arange(3, 23)[None]
    logits = model(input_ids=ids).logits
    merged = model.merge_and_unload()(input_ids=ids).logits
torch.save((logits, merged), out)
import trl
from transformers import TrainerState
args = torch.load(f"{adapter}/training_args.bin", weights_only=False)
assert type(args) is trl.SFTConfig and args.max_steps == 6
assert TrainerState.load_from_json(f"{adapter}/trainer_state.json").global_step == 6
"""


def test_checkpoint_opens_where_the_package_is_unknown(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    settings = {"model": lora_model(targets=ATTENTION + MLP), "save_strategy": "steps", "save_steps": 6}
    trainer = trained(tmp_path / "run", SPARSE, **settings)
    checkpoint = tmp_path / "run" / "checkpoint-6"
    run_python(LOAD, str(tmp_path / "base"), str(checkpoint), str(tmp_path / "logits.pt"))
    logits, merged = torch.load(tmp_path / "logits.pt")
    with torch.no_grad():
        want = trainer.model.eval()(input_ids=torch.arange(3, 23)[None]).logits
    torch.testing.assert_close(logits, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("restored", [False, True], ids=["still sparse", "restored"])
def test_merging_gives_the_adapters_logits(tmp_path, targets, restored):
    trainer = trained(tmp_path, SPARSE, model=lora_model(targets=targets))
    if restored:
        trainer.sparse_handle.restore()
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        want = trainer.model.eval()(input_ids=ids).logits
        merged = trainer.model.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids).logits, want, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert set(again.state_dict()) == set(tiny_model().state_dict())
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, want, rtol=1e-4, atol=1e-4)


def test_saving_while_sparse_steps_run(tmp_path):
    trained(tmp_path, SPARSE, save_strategy="steps", save_steps=3)
    model = PeftModel.from_pretrained(tiny_model(), tmp_path / "checkpoint-3")
    assert set(get_peft_model_state_dict(model)) == set(get_peft_model_state_dict(lora_model()))


@pytest.mark.parametrize("config", CRITERIA.values(), ids=CRITERIA.keys())
@pytest.mark.parametrize("step", [1, 4], ids=["before sparsity", "after"])
def test_resumed_run_gives_the_losses_of_the_uninterrupted_one(tmp_path, config, step):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 6}
    whole = trained(tmp_path, config, **settings)
    resumed = trained(tmp_path, config, resume=str(tmp_path / f"checkpoint-{step}"), **settings)
    assert resumed.losses == pytest.approx(whole.losses[step:], rel=1e-6)


@pytest.mark.parametrize("step", [1, 4], ids=["before sparsity", "after"])
def test_resumed_run_whose_fit_holds_nothing(tmp_path, step):
    """Means make up for channels of MLPs alone."""
    config = SPARSE.replace(mlp_sparsity=0.0, compensation="mean")
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 6}
    whole = trained(tmp_path, config, **settings)
    resumed = trained(tmp_path, config, resume=str(tmp_path / f"checkpoint-{step}"), **settings)
    assert resumed.losses == pytest.approx(whole.losses[step:], rel=1e-6)


@pytest.mark.parametrize("step", range(1, 6))
def test_any_step_can_be_resumed_from(tmp_path, step):
    """Also the one before sparsity starts, whose checkpoint holds a sample that nothing was fitted to yet."""
    config = SPARSE.replace(criterion="static", compensation="low_rank", compensation_rank=4, end_step=5)
    settings = {"save_strategy": "steps", "save_steps": 1}
    whole = trained(tmp_path, config, **settings)
    resumed = trained(tmp_path, config, resume=str(tmp_path / f"checkpoint-{step}"))
    assert resumed.losses == pytest.approx(whole.losses[step:], rel=1e-6)


@pytest.mark.parametrize("step", [1, 4], ids=["before sparsity", "after"])
def test_resumed_run_with_dropout_and_accumulation(tmp_path, step):
    settings = {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2}
    config = SPARSE.replace(criterion="random")
    whole = trained(tmp_path, config, model=lora_model(lora={"dropout": 0.2}), **settings)
    folder = str(tmp_path / f"checkpoint-{step}")
    resumed = trained(tmp_path, config, resume=folder, model=lora_model(lora={"dropout": 0.2}), **settings)
    assert resumed.losses == pytest.approx(whole.losses[2 * step :], rel=1e-6)


@pytest.mark.parametrize("step", [1, 4], ids=["before sparsity", "after"])
def test_configuration_comes_back_with_the_checkpoint(tmp_path, step):
    settings = {"save_strategy": "steps", "save_steps": 1}
    whole = trained(tmp_path, SPARSE, **settings)
    assert SparseLoraConfig.from_yaml(tmp_path / f"checkpoint-{step}") == SPARSE
    resumed = trained(tmp_path, resume=str(tmp_path / f"checkpoint-{step}"), given=False, **settings)
    assert resumed.sparse_config == SPARSE
    assert sum(isinstance(each, SparseLoraCallback) for each in resumed.callback_handler.callbacks) == 1
    assert resumed.losses == pytest.approx(whole.losses[step:], rel=1e-6)


def test_a_restored_trainer_resumes_dense_whatever_the_checkpoint_says(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    trained(tmp_path, SPARSE, max_steps=2, **settings)
    trainer = make_trainer(tmp_path, given=False, max_steps=3)
    trainer.sparse_handle.restore()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert not trainer.sparse_handle.is_attached


def test_latest_checkpoint_is_found(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    whole = trained(tmp_path, SPARSE, max_steps=4, **settings)
    resumed = trained(tmp_path, resume=True, given=False, max_steps=6, **settings)
    assert resumed.sparse_config == SPARSE
    assert len(resumed.losses) == 2
    assert len(whole.losses) == 4


@pytest.mark.parametrize("sparsity", [SPARSE.mlp_sparsity, 0.5], ids=["equal", "other"])
def test_configuration_given_wins_over_the_checkpoints(tmp_path, sparsity, caplog):
    settings = {"save_strategy": "steps", "save_steps": 2}
    trained(tmp_path, SPARSE, max_steps=2, **settings)
    mine = SPARSE.replace(mlp_sparsity=sparsity)
    resumed = trained(tmp_path, mine, resume=str(tmp_path / "checkpoint-2"), max_steps=4, **settings)
    assert resumed.sparse_config == mine
    assert ("other SparseLoRA settings; yours are used" in caplog.text) == (mine != SPARSE)


@pytest.mark.parametrize("step", [1, 4], ids=["before sparsity", "after"])
def test_statistics_serve_other_settings_that_do_not_touch_them(tmp_path, step):
    """A run that goes on where the cache lies elsewhere, or with exact savings that its first part did not know."""
    config, settings = CRITERIA["output"], {"save_strategy": "steps", "save_steps": 1}
    whole = trained(tmp_path, config, **settings)
    other = config.replace(cache_dir=str(tmp_path / "cache"), end_step=100, exact=("logits", "padding"))
    resumed = trained(tmp_path, other, resume=str(tmp_path / f"checkpoint-{step}"))
    assert resumed.losses == pytest.approx(whole.losses[step:], rel=1e-4)


@pytest.mark.parametrize("config", ["static", "output", "svd_whitened", "low rank"])
@pytest.mark.parametrize("step", [1, 4], ids=["before sparsity", "after"])
def test_checkpoint_of_a_run_with_fewer_sparse_parts(tmp_path, config, step, monkeypatch, caplog):
    """As where another device, or a check at attach, had left one dense: a new sample serves all of them."""
    decide, settings = attach.decide, {"save_strategy": "steps", "save_steps": 1}
    with monkeypatch.context() as patch:
        patch.setattr(attach, "decide", lambda part, c: dense_mlp_of_layer_0(decide(part, c)))
        trained(tmp_path, CRITERIA[config], **settings)
    resumed = trained(tmp_path, CRITERIA[config], resume=str(tmp_path / f"checkpoint-{step}"))
    assert "1 of the projections and MLPs that are sparse here were dense" in caplog.text
    sparse = [value > 0 for value in metrics(resumed, "sparselora/channel_sparsity")][step:]
    assert sparse == [False] + [True] * (5 - step)


@pytest.mark.parametrize("each", [True, False])
def test_statistics_lie_on_each_node_where_checkpoints_do(tmp_path, each, monkeypatch):
    """The first process of a second node, whose folders the first does not see: `save_on_each_node`."""
    monkeypatch.setattr(handle, "rank_and_world", lambda: (1, 2))
    monkeypatch.setattr(SFTConfig, "process_index", 1)
    trainer = make_trainer(tmp_path, CRITERIA["static"], save_on_each_node=each)
    trainer.save_model(str(tmp_path / "checkpoint-1"), _internal_call=True)
    assert (tmp_path / "checkpoint-1" / CONFIG_FILE).is_file() == each


def dense_mlp_of_layer_0(decision):
    if not decision.name.endswith("layers.0.mlp"):
        return decision
    return dataclasses.replace(decision, outcome="exact", keep=decision.width)


def test_checkpoint_of_sft_can_be_resumed_sparse(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    trained(tmp_path, max_steps=2, **settings)
    assert not (tmp_path / "checkpoint-2" / CONFIG_FILE).exists()
    resumed = trained(tmp_path, SPARSE, resume=str(tmp_path / "checkpoint-2"), max_steps=4, **settings)
    assert len(resumed.losses) == 2


def test_sparse_checkpoint_can_be_resumed_by_sft(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    trained(tmp_path, SPARSE, max_steps=4, **settings)
    resumed = trained(tmp_path, resume=str(tmp_path / "checkpoint-2"), max_steps=4, **settings)
    assert len(resumed.losses) == 2


def test_configuration_is_beside_the_final_model_too(tmp_path):
    config = SPARSE.replace(criterion="static")
    trainer = make_trainer(tmp_path, config)
    trainer.save_model(str(tmp_path))
    assert SparseLoraConfig.from_yaml(tmp_path) == config
    assert not (tmp_path / handle.CALIBRATION_FILE).exists()  # fitted parts are the run's
