"""What several test files need: tiny models with live LoRA adapters, batches, gradients, comparisons."""

import multiprocessing
import subprocess
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from sparselora_hf import SparseLoraConfig, sparsify

ROOT = Path(__file__).parents[1]
VOCAB = 61
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")

# tiny layers gain nothing: they are to be sparse all the same
SPARSE = SparseLoraConfig(
    mlp_sparsity={"0-1": 0.9}, attention_sparsity={"1": 0.75}, rank=4, dense_if_slower=False, start_step=2
)

_FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
}


def assert_ends(function, *args) -> None:
    """A call ends well and within 30 seconds, which one that waits for somebody to write into a pipe does not."""
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    process.join(30)
    process.kill()
    process.join()
    assert process.exitcode == 0


def run_python(code: str, *argv: str) -> str:
    """Run code in a fresh interpreter that can import the package; returns what it prints."""
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def tiny_model(family: str = "llama", heads=(8, 4), layers: int = 3, dtype=torch.float32, seed: int = 0, **options):
    """A random decoder of hidden size 64; every weight is large enough to matter, biases are not zero."""
    config_class, model_class, extra = _FAMILIES[family]
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": 8 if heads[0] <= 8 else 4,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if "head_dim" not in config_class.__annotations__:
        del settings["head_dim"]
    torch.manual_seed(seed)
    return randomise(model_class(config_class(**(settings | extra | options))).to(dtype))


def randomise(model: nn.Module) -> nn.Module:
    """Weights that matter: matrices larger than at the start of a pretraining, biases and norms apart from 0 and 1."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.15)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
        else:
            nn.init.normal_(parameter, mean=1.0, std=0.1)
    return model


def add_lora(model: nn.Module, targets=ATTENTION, dropout: float = 0.0, seed: int = 1, **options) -> nn.Module:
    """Wrap a model with PEFT; B is not zero, so that every adapter takes part and A has a gradient."""
    model = get_peft_model(
        model,
        LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM", **options),
    )
    fill_adapters(model, seed)
    return model


def fill_adapters(model: nn.Module, seed: int = 1) -> None:
    """Random adapters, none of them zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def lora_model(family: str = "llama", targets=ATTENTION, train: bool = True, lora=None, **options) -> nn.Module:
    """A tiny model with adapters, in training mode."""
    return add_lora(tiny_model(family, **options), targets, **(lora or {})).train(train)


def make_batch(prompts=(9, 5, 12), answers=(3, 4, 2), side: str = "right", seed: int = 0) -> dict[str, torch.Tensor]:
    """A padded batch of prompts and answers; labels on answers alone."""
    generator = torch.Generator().manual_seed(seed)
    length = max(p + a for p, a in zip(prompts, answers, strict=True))
    ids = torch.zeros(len(prompts), length, dtype=torch.long)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, (p, a) in enumerate(zip(prompts, answers, strict=True)):
        first = 0 if side == "right" else length - p - a
        ids[row, first : first + p + a] = torch.randint(3, VOCAB, (p + a,), generator=generator)
        mask[row, first : first + p + a] = 1
        labels[row, first + p : first + p + a] = ids[row, first + p : first + p + a]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def flatten_batch(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same sequences in one row without padding, as padding-free training has them."""
    rows = [
        (ids[mask == 1], labels[mask == 1])
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True)
    ]
    labels = [torch.cat([torch.tensor([-100]), row[1:]]) for _, row in rows]
    return {
        "input_ids": torch.cat([ids for ids, _ in rows])[None],
        "labels": torch.cat(labels)[None],
        "position_ids": torch.cat([torch.arange(len(ids)) for ids, _ in rows])[None],
        "use_cache": False,  # with a cache transformers does not look for packed sequences
    }


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gradient of every trainable parameter; zeros where there is none."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def loss_and_gradients(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict]:
    """One forward and backward from clean gradients."""
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    result = loss.detach(), gradients(model)
    model.zero_grad(set_to_none=True)
    return result


def sparse_result(model: nn.Module, batch: dict[str, torch.Tensor], config: SparseLoraConfig) -> tuple:
    """Loss and gradients of one sparse step; the model is plain again afterwards."""
    with sparsify(model, config) as handle:
        handle.set_enabled(True)
        return loss_and_gradients(model, batch)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((got - want).abs().max() / want.abs().max().clamp(min=1e-30))


def assert_same(got: tuple[torch.Tensor, dict], want: tuple[torch.Tensor, dict], tol: float = 1e-5) -> None:
    """Loss and every gradient agree, each relative to its own size."""
    assert relative_error(got[0], want[0]) < tol
    assert got[1].keys() == want[1].keys()
    worst = {name: relative_error(got[1][name], want[1][name]) for name in want[1]}
    assert max(worst.values()) < tol, max(worst.items(), key=lambda item: item[1])


def differs(got: tuple[torch.Tensor, dict], want: tuple[torch.Tensor, dict], by: float = 1e-3) -> bool:
    """Whether the loss or some gradient is clearly another."""
    return relative_error(got[0], want[0]) > by or any(relative_error(got[1][n], want[1][n]) > by for n in want[1])


def kept_for_backward(run) -> list[torch.Tensor]:
    """Every tensor that a graph holds: those saved by autograd, and those on the contexts of its functions."""
    held: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        nodes = [run().grad_fn]
    for node in nodes:
        nodes += [parent for parent, _ in node.next_functions if parent is not None and parent not in nodes]
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            held += _tensors(list(vars(node).values()))
    return held


def _tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for item in value for t in _tensors(item)] if isinstance(value, (list, tuple)) else []


def snapshot(model: nn.Module) -> dict:
    """Everything that a patch could leave behind: classes, attributes, hooks, weights bit for bit, keys."""
    modules = {
        name: (type(m), {k: _frozen(v) for k, v in vars(m).items()}, tuple(m._modules))
        for name, m in model.named_modules()
    }
    return {"modules": modules, "weights": {k: v.clone() for k, v in model.state_dict().items()}}


def _frozen(value: object) -> object:
    # containers are compared by what they hold, other objects by identity
    return (type(value), tuple(value)) if isinstance(value, (dict, set, list)) else id(value)


def assert_untouched(model: nn.Module, before: dict) -> None:
    """The model is what it was at the `snapshot`."""
    after = snapshot(model)
    assert list(after["weights"]) == list(before["weights"])
    assert all(torch.equal(after["weights"][k], v) for k, v in before["weights"].items())
    assert after["modules"].keys() == before["modules"].keys()
    for name, state in before["modules"].items():
        assert after["modules"][name] == state, f"module {name!r} was changed"
