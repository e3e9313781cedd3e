"""Short trainings of tiny models, with every loss and gradient recorded."""

import pytest
import torch
from datasets import Dataset
from helpers import VOCAB, gradients, lora_model, relative_error
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer

from sparselora_hf import SparseLoraConfig, SparseLoraTrainer


def tokenizer() -> PreTrainedTokenizerFast:
    """Words w3 .. w60 and three special tokens."""
    ids = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    inner = Tokenizer(models.WordLevel(ids, unk_token="w3"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


CHAT = (
    "{% for m in messages %}{% if m.role == 'assistant' %}w4 {% generation %}{{ m.content }} <eos> {% endgeneration %}"
    "{% else %}w5 {{ m.content }} {% endif %}{% endfor %}{% if add_generation_prompt %}w4 {% endif %}"
)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """The same with a chat template that marks what an assistant says."""
    words = tokenizer()
    words.chat_template = CHAT
    return words


def examples(n: int = 16, seed: int = 0, prompt: tuple = (4, 12), answer: tuple = (2, 4)) -> Dataset:
    """Tokenised prompts and answers of random tokens and lengths."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    rows: dict[str, list] = {"input_ids": [], "labels": []}
    for _ in range(n):
        p, a = draw(*prompt), draw(*answer)
        ids = torch.randint(3, VOCAB, (p + a,), generator=generator).tolist()
        rows["input_ids"].append(ids)
        rows["labels"].append([-100] * p + ids[p:])
    return Dataset.from_dict(rows)


def _pad(row: list[int], width: int, filler: int, side: str) -> list[int]:
    gap = [filler] * (width - len(row))
    return gap + row if side == "left" else row + gap


class Collator:
    """A collator of one's own; padding on either side, positions counted from the first token."""

    def __init__(self, side: str) -> None:
        self.side = side

    def __call__(self, rows: list) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        columns = {
            "input_ids": [_pad(row["input_ids"], width, 0, self.side) for row in rows],
            "labels": [_pad(row["labels"], width, -100, self.side) for row in rows],
            "attention_mask": [_pad([1] * len(row["input_ids"]), width, 0, self.side) for row in rows],
        }
        batch = {name: torch.tensor(values) for name, values in columns.items()}
        return batch | {"position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}


class Recorder(TrainerCallback):
    """Keeps the gradients that each optimizer step sees."""

    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append(gradients(model))


class _Recording:
    """Keeps the loss of each micro-batch in full precision."""

    def __init__(self, *args, **kwargs):
        self.recorder = Recorder()
        self.losses = []
        callbacks = kwargs.pop("callbacks", [])
        super().__init__(*args, **kwargs, callbacks=[self.recorder, *callbacks])

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.losses.append(float(loss))
        return loss


class DenseTrainer(_Recording, SFTTrainer):
    """SFTTrainer, recorded."""


class SparseTrainer(_Recording, SparseLoraTrainer):
    """SparseLoraTrainer, recorded."""


_TRAINER_ARGUMENTS = {
    "model_family",
    "callbacks",
    "compute_loss_func",
    "compute_metrics",
    "data_collator",
    "eval_dataset",
    "peft_config",
    "processing_class",
    "quantization_config",
}


def make_trainer(
    folder, config: SparseLoraConfig | None = None, model=None, data=None, given: bool = True, **settings
):
    """A trainer that is dense without a configuration; ``given=False`` leaves `sparse_config` out."""
    extra = {key: settings.pop(key) for key in _TRAINER_ARGUMENTS & settings.keys()}
    args = SFTConfig(
        str(folder),
        **{
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "learning_rate": 5e-3,
            "lr_scheduler_type": "linear",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "dataset_kwargs": {"skip_prepare_dataset": True},
            "seed": 3,
        }
        | settings,
    )
    sparse = config is not None or not given
    return (SparseTrainer if sparse else DenseTrainer)(
        model=model if model is not None else lora_model(),
        args=args,
        train_dataset=data if data is not None else examples(),
        **({"processing_class": tokenizer()} | extra),
        **({"sparse_config": config} if sparse and given else {}),
    )


def trained(folder, config=None, resume=None, **settings):
    """Train; returns the trainer with `losses` and `recorder.gradients`."""
    trainer = make_trainer(folder, config, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def assert_same_run(got, want, tol: float = 1e-5) -> None:
    """Losses of every micro-batch and gradients of every step agree."""
    assert len(got.losses) == len(want.losses) > 0
    assert got.losses == pytest.approx(want.losses, rel=tol)
    for step, (a, b) in enumerate(zip(got.recorder.gradients, want.recorder.gradients, strict=True)):
        worst = {name: relative_error(a[name], b[name]) for name in b}
        assert max(worst.values()) < 100 * tol, (step, max(worst, key=worst.get))


def metrics(trainer, name: str) -> list[float]:
    """Every value of one figure in the log."""
    return [log[name] for log in trainer.state.log_history if name in log]
