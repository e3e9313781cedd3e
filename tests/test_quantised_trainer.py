"""Trainings over a quantised base: the trainer quantises as `SFTTrainer` does, resumes, and takes over its adapter."""

import pytest
import torch
from helpers import ATTENTION, MLP, SPARSE, relative_error, tiny_model
from peft import LoraConfig, PeftModel
from quantised import bnb
from training import examples, tokenizer, trained
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from sparselora_hf import SparseLoraConfig
from sparselora_hf.cli.main import main
from sparselora_hf.cli.sft import make_trainer, prepare, trainer_keywords

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
CONFIGS = {
    "nf4": BitsAndBytesConfig(**NF4),
    "nf4-double": BitsAndBytesConfig(**NF4, bnb_4bit_use_double_quant=True),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=[*ATTENTION, *MLP], task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny Llama on disk."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model(layers=2).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def quantised(checkpoint, kind="nf4-double"):
    return AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=CONFIGS[kind], dtype=torch.float32)


def run(folder, config, model, resume=None, **settings):
    return trained(folder, config, resume, model=model, peft_config=LORA, **settings)


@pytest.mark.parametrize("kind", CONFIGS)
def test_exact_savings_train_as_dense_qlora(checkpoint, tmp_path, kind):
    dense = run(tmp_path, None, quantised(checkpoint, kind), max_steps=3)
    exact = run(tmp_path, SparseLoraConfig(), quantised(checkpoint, kind), max_steps=3)
    # adapters on a quantised base are kept in bf16
    assert dense.losses[0] == pytest.approx(exact.losses[0], rel=1e-5)
    assert dense.losses == pytest.approx(exact.losses, rel=1e-2)
    first, want = exact.recorder.gradients[0], dense.recorder.gradients[0]
    assert max(relative_error(first[name], want[name]) for name in want) < 0.05


@pytest.mark.parametrize("through", ["argument", "model_init_kwargs"])
def test_quantised_by_the_trainer(checkpoint, tmp_path, through):
    """The model is named and the trainer loads it; the losses are those of a model that was passed in."""
    want = run(tmp_path, SPARSE, quantised(checkpoint))
    extra = {"quantization_config": CONFIGS["nf4-double"]}
    if through == "model_init_kwargs":
        extra = {"model_init_kwargs": {**extra, "dtype": torch.float32}}
    got = trained(tmp_path, SPARSE, model=str(checkpoint), peft_config=LORA, **extra)
    assert got.losses == want.losses
    assert "1.mlp: sparse" in got.sparse_handle.report()
    linear = got.model.get_submodule("base_model.model.model.layers.1.mlp.up_proj.base_layer")
    assert isinstance(linear, bnb.nn.Linear4bit)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("kind", ["nf4-double", "int8"])
def test_resume(checkpoint, tmp_path, kind, checkpointing):
    config = SPARSE.replace(criterion="static", compensation="low_rank", compensation_rank=4)
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 5, "gradient_checkpointing": checkpointing}
    whole = run(tmp_path / "whole", config, quantised(checkpoint, kind), **settings)
    resumed = run(
        tmp_path / "again", config, quantised(checkpoint, kind), str(tmp_path / "whole" / "checkpoint-3"), **settings
    )
    assert resumed.losses == whole.losses[3:]


def test_evaluation_during_training_is_harmless(checkpoint, tmp_path):
    """On CPUs with bf16 instructions bitsandbytes repacks weights at an evaluation, after which nothing is learned."""
    settings = {"eval_dataset": examples(4, seed=1), "eval_strategy": "steps", "eval_steps": 2, "max_steps": 5}
    evaluated = run(tmp_path, SPARSE, quantised(checkpoint), **settings)
    assert evaluated.losses == run(tmp_path, SPARSE, quantised(checkpoint), max_steps=5).losses
    assert all(any(g.any() for g in step.values()) for step in evaluated.recorder.gradients)


def test_the_saved_adapter_is_a_plain_one(checkpoint, tmp_path):
    trainer = run(tmp_path, SPARSE, quantised(checkpoint))
    trainer.save_model(str(tmp_path / "adapter"))
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        want = trainer.model.train()(input_ids=ids).logits
        loaded = PeftModel.from_pretrained(quantised(checkpoint), tmp_path / "adapter").train()
        assert relative_error(loaded(input_ids=ids).logits, want) < 0.02  # adapters come back in float32


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
def test_command(checkpoint, tmp_path, capsys, bits, dense):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "w3 w4 w5 w6 w7", "completion": " w8 w9"}\n' * 8, encoding="utf-8")
    code = main([
        "sft", "--model_name_or_path", str(checkpoint), "--dataset_name", str(data), f"--load_in_{bits}",
        "--max_steps", "3", "--mlp_sparsity", "0.9", "--dense_if_slower", "false", "--start_step", "1",
        "--eval_strategy", "steps", "--eval_steps", "1", "--dataset_test_split", "train",
        "--output_dir", str(tmp_path / "out"), "--save_strategy", "no", "--report_to", "none",
        *(["--dense"] if dense else []),
    ])  # fmt: skip
    assert code == 0
    assert f"{'dense' if dense else 'sparse'}: 3 steps" in capsys.readouterr().out
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_weights_keep_the_layout_that_has_gradients_in_a_dense_run_too(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "w3 w4 w5", "completion": " w6"}\n', encoding="utf-8")
    flags = ["--model_name_or_path", str(checkpoint), "--dataset_name", str(data), "--load_in_4bit", "--dense"]
    recipe = prepare([*flags, "--output_dir", str(tmp_path / "out"), "--report_to", "none"])
    trainer = make_trainer(recipe, trainer_keywords(recipe))
    linears = [module for module in trainer.model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert linears and not any(linear.support_avx512bf16_for_cpu for linear in linears)
