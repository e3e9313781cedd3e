"""`sparselora doctor`: what is installed, where it would run, and whether sparsity 0 equals the dense model here."""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..config import SparseLoraConfig
from ..versions import SUPPORTED, check_versions

__all__ = ["Parity", "main", "parity"]

_PACKAGES = (
    "sparselora-hf",
    "torch",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "accelerate",
    "triton",
    "bitsandbytes",
    "liger-kernel",
)
_TOLERANCE = 1e-5
_HALF = SparseLoraConfig(mlp_sparsity=0.5, attention_sparsity=0.5, criterion="random", dense_if_slower=False)


class Parity(NamedTuple):
    """Outcome of the self-test.

    `loss` and `gradient` are the largest relative differences between the dense model and sparsity 0 with the exact
    savings; `sparse_loss` is the same for half of the channels, where it must be there and finite.
    """

    loss: float
    gradient: float
    sparse_loss: float

    @property
    def passed(self) -> bool:
        """Whether sparsity 0 differs by rounding alone, and real sparsity does something."""
        exact = self.loss <= _TOLERANCE and self.gradient <= _TOLERANCE
        return exact and _TOLERANCE < self.sparse_loss < 1.0


def _tiny_model() -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    widths = {"hidden_size": 64, "intermediate_size": 176, "vocab_size": 128, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**widths, **heads))
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        lora = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
        return get_peft_model(model, lora).float().train()


def _batch() -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 128, (2, 24), generator=generator)
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[1, -6:] = 0
    labels[:, :12] = -100
    labels[mask == 0] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _step(model: Any, batch: dict[str, Any], config: SparseLoraConfig | None = None) -> tuple[Any, list[Any]]:
    """Loss and LoRA gradients of one batch, dense or under a configuration."""
    from ..attach import sparsify
    from ..plan import TokenPlan

    model.zero_grad()
    handle = None if config is None else sparsify(model, config)
    if handle is not None:
        handle.set_enabled(True)
        plan = TokenPlan.from_batch(batch["labels"].cpu(), batch["attention_mask"].cpu())
        handle.state.begin(plan, handle.device, loss_only=True)
        handle.state.pinned = True
    loss = model(**batch).loss
    loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]
    if handle is not None:
        handle.restore()
    return loss.detach(), gradients


def _difference(tensor: Any, reference: Any) -> float:
    return float((tensor - reference).norm() / reference.norm())


def parity(device: str = "cpu") -> Parity:
    """Train-step a tiny random Llama with LoRA: as it is, with the exact savings at sparsity 0, and sparse.

    Args:
        device: where to run, as torch names it.
    """
    model = _tiny_model().to(device)
    batch = {name: tensor.to(device) for name, tensor in _batch().items()}
    loss, gradients = _step(model, batch)
    exact_loss, exact_gradients = _step(model, batch, SparseLoraConfig(exact=True))
    sparse_loss, _ = _step(model, batch, _HALF)
    differences = [_difference(*pair) for pair in zip(exact_gradients, gradients, strict=True)]
    return Parity(_difference(exact_loss, loss), max(differences), _difference(sparse_loss, loss))


def _version(package: str) -> str:
    try:
        version = importlib.metadata.version(package)
        if package in SUPPORTED:
            check_versions(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
    except ImportError as error:
        return f"{version}, not supported. {error}"
    return version


def _devices() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return ["cpu"]
    devices = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return [_describe(item.name, item.total_memory, item.major, item.minor) for item in devices]


def _describe(name: str, memory: int, major: int, minor: int) -> str:
    half = "bfloat16" if major >= 8 else "no bfloat16: set fp16, and attn_implementation sdpa"
    return f"{name}, {memory / 2**30:.0f} GiB, sm_{major}{minor}, {half}"


def _nearest_existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.resolve().parents) if path.exists())


def _cache() -> str:
    from ..cache import default_cache_dir

    folder = default_cache_dir()
    there = _nearest_existing(folder)
    writable = there.is_dir() and os.access(there, os.W_OK)
    return f"{folder} ({'writable' if writable else 'not writable: factors are computed in every run'})"


def _kernels() -> str:
    import torch

    from ..kernels.runtime import blocker

    obstacle = blocker(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))
    return f"torch ({obstacle})" if obstacle else "triton"


def _report() -> dict[str, str]:
    facts = {"python": platform.python_version(), **{package: _version(package) for package in _PACKAGES}}
    for index, device in enumerate(_devices()):
        facts[f"device {index}"] = device
    facts["kernels"] = _kernels()
    return {**facts, "cache": _cache()}


def main(argv: Sequence[str]) -> int:
    """Print the report and run the self-test; 0 when it passes, 1 when it fails."""
    import torch
    from rich.console import Console

    argparse.ArgumentParser(prog="sparselora doctor", description=__doc__.partition(": ")[2]).parse_args(argv)
    warnings.simplefilter("ignore", FutureWarning)  # transformers on its own renamings: not the user's business here
    console = Console(soft_wrap=True, markup=False, highlight=False)
    for name, value in _report().items():
        console.print(f"{name:14} {value}")
    result = parity("cuda" if torch.cuda.is_available() else "cpu")
    verdict = "passed" if result.passed else f"FAILED, tolerance {_TOLERANCE:g}"
    console.print(
        f"{'self-test':14} {verdict}; relative difference from dense: at sparsity 0 loss {result.loss:.1e} and LoRA "
        f"gradients {result.gradient:.1e}, with half of the channels loss {result.sparse_loss:.1e}"
    )
    return 0 if result.passed else 1
