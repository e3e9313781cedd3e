"""A loop of one's own under DeepSpeed ZeRO-2, on CPU processes; launched by `test_zero2.py`.

accelerate starts DeepSpeed on accelerators alone, so the engine is made here, as DeepSpeed's own documents have it.
Argument: file for the results of rank 0, one list of mean losses per case.
"""

import json
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from helpers import SPARSE, lora_model, make_batch

from sparselora_hf import SparseLoraConfig, sparsify

STEPS = 6
CASES = {
    "plain": None,
    "exact": SparseLoraConfig(),
    "sparse": SPARSE.replace(criterion="static", compensation="low_rank", compensation_rank=4),
}
SETTINGS = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def batch(step: int) -> dict[str, torch.Tensor]:
    """This rank's half of a step's four sequences."""
    half = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    whole = make_batch(prompts=(9, 5, 12, 7), answers=(3, 4, 2, 3), seed=step)
    return {name: tensor[half] for name, tensor in whole.items()}


def losses(config: SparseLoraConfig | None) -> list[float]:
    """Loss of each step, the mean of both ranks."""
    model = lora_model()
    handle = None if config is None else sparsify(model, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, model_parameters=trained, config=SETTINGS)
    assert engine.zero_optimization_stage() == 2
    if handle is not None:
        handle.begin_run(max_steps=STEPS)
    means = []
    for step in range(STEPS):
        if handle is not None:
            handle.begin_step(step)
        loss = engine(**batch(step)).loss
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        means.append(float(mean) / dist.get_world_size())
    return means


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = {name: losses(config) for name, config in CASES.items()}
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(results))
