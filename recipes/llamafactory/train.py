"""LLaMA-Factory with SparseLoRA: `python recipes/llamafactory/train.py run.yaml sparselora.yaml`.

The first file is a run of LLaMA-Factory's own (stage sft, finetuning_type lora), the second the fields of
SparseLoraConfig. The callback sparsifies the model when LLaMA-Factory's trainer is made and restores it at the end.

In stage sft its trainer takes the loss that the model gives and reads nothing else of a training step, so the exact
savings `last_layer` and `logits` are in force, but for runs that ask for more (READS_MORE). To turn them off, leave
them out of `exact` in the second file.
"""

import sys
from pathlib import Path

import yaml
from llamafactory.train.tuner import run_exp

from sparselora_hf import SparseLoraCallback, SparseLoraConfig

# settings with which more than the model's loss is read: a loss of its logits, one of its states, trainers of others
READS_MORE = ("use_asft_loss", "num_mtp_layers", "use_mca", "use_hyper_parallel")


def main(run: str, settings: str) -> None:
    """Train by two files."""
    arguments = yaml.safe_load(Path(run).read_text(encoding="utf-8"))
    loss_only = arguments.get("stage", "sft") == "sft" and not any(arguments.get(name) for name in READS_MORE)
    run_exp(arguments, callbacks=[SparseLoraCallback(SparseLoraConfig.from_yaml(settings), loss_only=loss_only)])


if __name__ == "__main__":
    main(*sys.argv[1:])
