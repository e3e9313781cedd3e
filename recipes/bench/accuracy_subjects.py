"""What the accuracy study trains: a model, data that it has not met in this shape, and held-out data of that kind.

The small checkpoints and texts are read from the folder `SPARSELORA_DATA`. The model of the text world is trained from
scratch once and kept in the folder of `--work-dir`.
"""

import argparse
import dataclasses
import functools
import json
import os
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from datasets import Dataset
from setup import quantize
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedModel, set_seed

from sparselora_hf.cli.quickstart import ASSETS
from sparselora_hf.modules.layout import TrainingLayout
from sparselora_hf.world import build_tokenizer, finetuning_examples

DATA = Path(os.environ.get("SPARSELORA_DATA", Path(__file__).parents[3] / "shared" / "data"))
WORK_DIR = Path("~/.cache/sparselora-study").expanduser()
QUICKSTART = Path(__file__).parents[1] / "quickstart"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
WORLD_3M = {
    "num_hidden_layers": 8,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 24,
}
# for a GPU, and not trained yet: its rates are a guess
WORLD_50M = {
    "hidden_size": 768,
    "num_hidden_layers": 6,
    "intermediate_size": 3072,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 96,
}

__all__ = ["SUBJECTS", "TEXTS", "WORK_DIR", "Task", "TextSubject", "WorldSubject", "chunks"]


@dataclasses.dataclass(frozen=True)
class Task:
    """One training of a subject: rows for `SFTTrainer`, and questions for exact match where there are answers."""

    train: Dataset
    test: Dataset
    questions: tuple[dict[str, str], ...] = ()


def _problems(split: str) -> str:
    """Grade-school problems with their solutions, GSM8K."""
    path = DATA / ("train/gsm8k_train.jsonl" if split == "train" else "test/gsm8k_test.jsonl")
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return "\n".join(f"{row['question']} {row['answer']}" for row in rows)


def _stories(split: str) -> str:
    """TinyStories, on which the small checkpoints were pretrained; the last fifth is for tests."""
    text = (DATA / "text/tinystories_lowercase_4MB.txt").read_text(encoding="utf-8")
    cut = 4 * len(text) // 5
    return text[:cut] if split == "train" else text[cut:]


TEXTS = MappingProxyType({"problems": _problems, "stories": _stories})


@functools.lru_cache(maxsize=8)
def chunks(checkpoint: Path, text: str, split: str, length: int, characters: int = 2_000_000) -> torch.Tensor:
    """The start of a text in pieces of `length` tokens, ``[n, length]``."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer(TEXTS[text](split)[:characters], add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


@dataclasses.dataclass(frozen=True)
class TextSubject:
    """A shared checkpoint that goes on with pieces of a text: the first share is context, the rest is predicted.

    Args:
        checkpoint: folder under `DATA/models`.
        text: a name out of `TEXTS`.
        context: share of a row that is context.
        quantization: of the frozen weights, a name out of `setup.QUANTIZATIONS`.
    """

    checkpoint: str
    text: str = "problems"
    context: float = 0.75
    steps: int = 160
    batch: int = 12
    length: int = 256
    learning_rate: float = 3e-3
    held_out: int = 96
    quantization: str = "none"

    @property
    def folder(self) -> Path:
        """Where the checkpoint lies."""
        return DATA / "models" / self.checkpoint

    def ready(self, work_dir: Path, device: str = "cpu") -> None:
        """Check that everything is there.

        Raises:
            FileNotFoundError: the shared data is not.
        """
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder} does not exist. Set SPARSELORA_DATA to the folder of the data.")

    def model(self, work_dir: Path) -> PreTrainedModel:
        """The checkpoint, in float32 but for quantised weights."""
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        model = quantize(model, self.quantization, torch.float32)
        TrainingLayout(model)  # without it bitsandbytes cannot evaluate these widths on CPUs with bf16 instructions
        return model

    def tokenizer(self, work_dir: Path):
        """Its tokenizer."""
        return AutoTokenizer.from_pretrained(self.folder)

    def task(self, seed: int, rows: int) -> Task:
        """Training rows drawn by the seed; the held-out ones are always the same."""
        train = chunks(self.folder, self.text, "train", self.length)
        test = chunks(self.folder, self.text, "test", self.length)[: self.held_out]
        drawn = random.Random(seed).choices(range(len(train)), k=rows)
        return Task(self._rows(train[drawn]), self._rows(test))

    def _rows(self, ids: torch.Tensor) -> Dataset:
        labels = ids.clone()
        labels[:, : round(self.length * self.context)] = -100
        return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})


@dataclasses.dataclass(frozen=True)
class WorldSubject:
    """A model that was trained from scratch on the text world, and the quickstart's task.

    Args:
        name: of its folder in the folder of the study.
        folder: a pretrained model of the package, in place of training one.
        shape: what differs from the quickstart's model in one that is trained here.
        offsets: how many tokens back the first heads look at the start of its training.
        pretraining_steps: of its training, with `pretraining_rate`.
    """

    name: str = ""
    folder: Path | None = None
    shape: Mapping[str, int] = dataclasses.field(default_factory=dict)
    offsets: tuple[int, ...] = (1, 2, 1, 3, 1, 2, 1, 3)
    pretraining_steps: int = 2600
    pretraining_rate: float = 2e-3
    context: float = 0.98
    steps: int = 70
    batch: int = 16
    learning_rate: float = 3e-3
    held_out: int = 200

    def ready(self, work_dir: Path, device: str = "cpu") -> None:
        """Pretrain unless that was done before; 3 million parameters take about 20 minutes on one core."""
        folder = self._folder(work_dir)
        if folder.is_dir():
            return
        sys.path.append(str(QUICKSTART))
        import pretrain

        set_seed(0)
        tokenizer = build_tokenizer()
        config = pretrain.build_model(tokenizer).config
        config.update(self.shape)
        model = LlamaForCausalLM(config)
        pretrain.wire_looking_back(model, self.offsets)
        model.to(device)
        rate = self.pretraining_rate
        options = {"steps": self.pretraining_steps, "minutes": 0.0, "lr": rate, "seed": 0, "tokens": 1024}
        pretrain.train(model, tokenizer, argparse.Namespace(**options))
        half_done = folder.with_suffix(".part")
        model.save_pretrained(half_done)
        tokenizer.save_pretrained(half_done)
        half_done.rename(folder)

    def _folder(self, work_dir: Path) -> Path:
        return self.folder or work_dir / f"{self.name}-{self.pretraining_steps}"

    def model(self, work_dir: Path) -> PreTrainedModel:
        """The pretrained model, in float32."""
        folder = self._folder(work_dir)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")

    def tokenizer(self, work_dir: Path):
        """The world's tokenizer."""
        return build_tokenizer()

    def task(self, seed: int, rows: int) -> Task:
        """Requests about ledger pages; the held-out ones are always the same."""
        test = finetuning_examples(10_007, self.held_out, "test")
        return Task(
            Dataset.from_list(finetuning_examples(seed, rows, "train")), Dataset.from_list(test), questions=tuple(test)
        )


SUBJECTS = MappingProxyType(
    {
        "babyllama361": TextSubject("babyllama361"),
        "babyllama361-90": TextSubject("babyllama361", context=0.9),
        "babyllama361-97": TextSubject("babyllama361", context=0.97),
        "babyllama361-stories": TextSubject("babyllama361", text="stories"),
        "babyllama361-stories-nf4": TextSubject(
            "babyllama361", text="stories", quantization="nf4", learning_rate=1e-3
        ),
        "stories260K": TextSubject("stories260K"),
        "stories260K-97": TextSubject("stories260K", context=0.97),
        "stories260K-stories": TextSubject("stories260K", text="stories"),
        "world": WorldSubject(folder=ASSETS),
        "world-3m": WorldSubject("world-3m", shape=WORLD_3M, steps=280),
        "world-50m": WorldSubject("world-50m", shape=WORLD_50M, pretraining_rate=6e-4, learning_rate=1e-3, steps=280),
    }
)
