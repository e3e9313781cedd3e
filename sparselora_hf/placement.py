"""Where the weights of a model are, and which engines are refused, each by name and with what to use in its place.

Sparse layers read the weights of their projections themselves, a few rows or columns at a time, so each process must
hold them whole while a layer runs. DDP and ZeRO-2 always do, FSDP2 gathers a whole decoder layer before it runs; the
others do not, or do so behind a forward that a sparse layer does not call.
"""

import torch
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from .decoder import Layer, projections
from .families import ModelFamily
from .ops.quant import is_repacked, is_stored_packed, why_unreadable
from .views import base_linear

__all__ = ["check_engine", "check_units", "check_weights"]

_INSTEAD = "DDP, FSDP2 and ZeRO-2 are the ways to use several devices."


def check_weights(layers: list[Layer], family: ModelFamily) -> None:
    """Refuse a model some of whose weights are not whole in this process, or hold NaN.

    Raises:
        ValueError: names the weight, why it is not usable and the remedy.
    """
    if is_deepspeed_zero3_enabled():
        raise ValueError(f"DeepSpeed ZeRO-3 splits frozen weights, which sparse layers need whole. {_INSTEAD}")
    for layer in layers:
        for role, module in projections(layer, family).items():
            linear = base_linear(module)
            obstacle = "" if why_unreadable(linear) else _obstacle(linear)  # what is unreadable stays dense
            if obstacle:
                raise ValueError(f"{layer.name}: the weight of {role} {obstacle}")


def _obstacle(linear: nn.Module) -> str:
    """What is wrong with a weight and what to do; empty where nothing is."""
    from torch.distributed.tensor import DTensor

    weight = linear.weight
    if isinstance(weight, DTensor):
        return (
            "is split over devices already. By FSDP2: call sparsify before accelerator.prepare, and give a Trainer "
            f"its callback when it is made. By tensor parallelism (tp_plan, tp_size): leave it out. {_INSTEAD}"
        )
    if weight.is_meta:
        return (
            "is not in memory: it is on the meta device. Offloaded by device_map: choose a device_map without cpu and "
            "disk. Held back on this rank by FSDP: set fsdp_cpu_ram_efficient_loading: false."
        )
    if is_repacked(linear):
        return (
            "has no gradients: bitsandbytes has repacked it for inference on this CPU. Load the model again, and make "
            "the trainer, or call sparsify, before anything runs the model: evaluating, generating, PEFT's "
            "initialize_lora_eva_weights. What is sparse is not repacked."
        )
    if weight.numel() == 0:
        return f"is empty: DeepSpeed ZeRO-3 keeps it elsewhere. {_INSTEAD}"
    if not is_stored_packed(linear) and not _is_finite(weight):
        return "holds NaN or infinity. The checkpoint is damaged: load it again."
    return ""


def _is_finite(weight: torch.Tensor) -> bool:
    # sums are taken in float32 whatever their result's type, and float16's result could overflow: asking for another
    # type than the weight's costs 27 times the time on a CPU
    return bool(torch.isfinite(weight.sum(dtype=torch.float32 if weight.dtype == torch.float16 else None)))


def check_units(model: nn.Module) -> None:
    """Refuse a model whose layers FSDP version 1 has wrapped, by whatever loop: they would run dense.

    Raises:
        ValueError: names the engine and what to use in its place.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel

    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(f"SparseLoRA does not run in FSDP version 1. {_INSTEAD}")


def check_engine(n_gpu: int) -> None:
    """Refuse a training engine that a sparse model does not run in; asked when training begins.

    Args:
        n_gpu: devices that this process alone trains on (`TrainingArguments.n_gpu`).

    Raises:
        ValueError: names the engine and what to use in its place.
    """
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    state = AcceleratorState()
    kind, parallel = state.distributed_type, state.parallelism_config
    split = set(parallel.active_mesh_dims) if parallel is not None else set()
    refused = {
        "DataParallel on several GPUs of one process": n_gpu > 1,
        "FSDP version 1": kind == DistributedType.FSDP and state.fsdp_plugin.fsdp_version == 1,
        "DeepSpeed ZeRO-3": kind == DistributedType.DEEPSPEED and state.deepspeed_plugin.zero_stage == 3,
        "Megatron-LM": kind == DistributedType.MEGATRON_LM,
        "tensor parallelism": "tp" in split,
        "context parallelism": "cp" in split,
        "sequence parallelism": "sp" in split,
    }
    for engine, used in refused.items():
        if used:
            raise ValueError(f"SparseLoRA does not run in {engine}. {_INSTEAD}")
