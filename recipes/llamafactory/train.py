"""LLaMA-Factory with SparseLoRA: `python recipes/llamafactory/train.py run.yaml sparselora.yaml`.

The first file is a run of LLaMA-Factory's own (stage sft, finetuning_type lora), the second the fields of
SparseLoraConfig. The callback sparsifies the model when LLaMA-Factory's trainer is made and restores it at the end.
"""

import sys
from pathlib import Path

import yaml
from llamafactory.train.tuner import run_exp

from sparselora_hf import SparseLoraCallback, SparseLoraConfig


def main(run: str, settings: str) -> None:
    """Train by two files."""
    arguments = yaml.safe_load(Path(run).read_text(encoding="utf-8"))
    run_exp(arguments, callbacks=[SparseLoraCallback(SparseLoraConfig.from_yaml(settings))])


if __name__ == "__main__":
    main(*sys.argv[1:])
