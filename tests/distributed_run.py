"""Trainings of one process of several; launched by `test_distributed.py`, one launch for a table of cases.

Arguments: engine, folder for results, names of cases. Results of all ranks go into one JSON file per case.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from datasets import Dataset
from helpers import ATTENTION, MLP, SPARSE, lora_model
from torch.distributed.tensor import DTensor
from training import examples, make_trainer
from transformers import TrainerCallback
from transformers.utils import logging

from sparselora_hf import SparseLoraConfig, config, files, handle

FIXED = SPARSE.replace(criterion="static", compensation="low_rank", compensation_rank=4)
CRITERIA = ("oracle", "output", "random", "sampled", "svd", "svd_mean", "svd_whitened")


def uneven() -> Dataset:
    """Rows without context, rows without a label and rows of all shares of context."""
    rows = examples(16, prompt=(3, 20), answer=(1, 8)).to_dict()
    for number in (2, 7, 12):
        rows["labels"][number] = list(rows["input_ids"][number])
    for number in (3, 9, 13):
        rows["labels"][number] = [-100] * len(rows["input_ids"][number])
    return Dataset.from_dict(rows)


def alike() -> Dataset:
    """Rows of one length: what one process reads for all is put together without padding."""
    return examples(16, prompt=(8, 8), answer=(3, 3))


CASES = {
    "exact": {"config": SparseLoraConfig()},
    "fixed sets": {"config": FIXED},
    **{name: {"config": SPARSE.replace(criterion=name)} for name in CRITERIA},
    "all linears": {"config": FIXED, "targets": ATTENTION + MLP},
    "uneven": {"config": FIXED, "data": uneven, "per_device_train_batch_size": 1, "max_steps": 8},
    "uneven, all linears": {
        "config": SPARSE,
        "data": uneven,
        "per_device_train_batch_size": 1,
        "max_steps": 8,
        "targets": ATTENTION + MLP,
    },
    "checkpointing": {"config": SPARSE, "gradient_checkpointing": True},
    "dispatched": {"config": SPARSE, "data": alike, "accelerator_config": {"dispatch_batches": True}},
    "saved": {"config": FIXED, "save_strategy": "steps", "save_steps": 1},
}


class _Kill(TrainerCallback):
    """No process survives the end of step 4."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            os.kill(os.getpid(), signal.SIGKILL)


def build(folder: Path, case: str, **changes):
    """Trainer of a case; two rows a process unless the case says otherwise."""
    settings = {"per_device_train_batch_size": 2, "ddp_find_unused_parameters": False} | CASES[case] | changes
    model = lora_model(targets=settings.pop("targets", ATTENTION))
    data = settings.pop("data", examples)()
    return make_trainer(folder, settings.pop("config"), model=model, data=data, **settings)


def run(folder: Path, case: str, resume: str | None = None, **changes) -> dict:
    """Losses per micro-batch, gradients of the last step and what was fitted, as plain numbers."""
    trainer = build(folder, case, **changes)
    trainer.train(resume_from_checkpoint=resume)
    fitted = trainer.sparse_handle.state.calibration.tensors(torch.device("cpu"))
    return {
        "losses": trainer.losses,
        "gradients": _numbers(trainer.recorder.gradients[-1]),
        "fitted": _numbers(fitted),
        "engine": type(trainer.model_wrapped).__name__,
    }


def _numbers(tensors: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}
    return {name: tensor.flatten()[::7].tolist() for name, tensor in whole.items()}


def _watch_writes() -> list[str]:
    """Names of the files that this process writes of configuration and calibration, as they come."""
    written, write = [], files.write_atomically

    def watched(path, data):
        written.append(Path(path).name)
        return write(path, data)

    config.write_atomically = handle.write_atomically = watched
    return written


def fsdp2() -> dict:
    """accelerate turns FSDP on for accelerators alone: its state is set by hand, its own code does the rest."""
    state = Accelerator(cpu=True).state
    plugin = FullyShardedDataParallelPlugin()  # from the environment, as the launcher sets it
    shared = {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    AcceleratorState._shared_state.update(shared)
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    assert state.is_fsdp2
    return {"accelerator_config": {"use_configured_state": True}, "ddp_find_unused_parameters": None}


ENGINES = {"ddp": dict, "fsdp2": fsdp2}


def main(engine: str, results: Path, cases: list[str]) -> None:
    """Run cases one after the other; ``killed`` and ``resumed STEP`` are two halves of ``saved``."""
    changes, written = ENGINES[engine](), _watch_writes()
    for case in cases:
        kind, *step = case.split()
        if kind == "killed":
            run(results / "killed", "saved", callbacks=[_Kill()], **changes)
        if kind == "resumed":
            folder = results / step[0]
            result = run(folder, "saved", resume=str(folder / f"checkpoint-{step[1]}"), **changes)
        else:
            result = run(results / case, case, **changes)
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, {**result, "written": list(written)})
        if dist.get_rank() == 0:
            (results / f"{case}.json").write_text(json.dumps(everyone))
        dist.barrier()
    # all is written: threads of gloo now and then abort a process that takes itself down
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
