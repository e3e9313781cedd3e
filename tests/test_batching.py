"""Every way in which TRL makes batches: sparsity 0 is `SFTTrainer`, and exact savings change no sparse run either."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers import SPARSE, lora_model
from training import Collator, SparseTrainer, assert_same_run, chat_tokenizer, examples, metrics, trained
from transformers import DataCollatorForSeq2Seq
from zoo import zoo_lora

from sparselora_hf import SparseLoraConfig, SparseLoraTrainer

SPARSE = SPARSE.replace(start_step=1)


def words(n: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{i}" for i in torch.randint(6, 61, (n,), generator=generator).tolist())


def plain_text() -> Dataset:
    return Dataset.from_dict({"text": [words(5 + i % 9, i) for i in range(16)]})


def completions() -> Dataset:
    rows = range(16)
    return Dataset.from_dict(
        {"prompt": [words(4 + i % 9, i) + " " for i in rows], "completion": [words(2 + i % 3, 99 + i) for i in rows]}
    )


def turn(role: str, n: int, seed: int) -> dict[str, str]:
    return {"role": role, "content": words(n, seed)}


def conversations(turns: int = 2) -> Dataset:
    def talk(i):
        return [
            turn(*side) for t in range(turns) for side in (("user", 3 + i % 5, i + t), ("assistant", 2, i + t + 50))
        ]

    return Dataset.from_list([{"messages": talk(i)} for i in range(16)])


def conversational_completions() -> Dataset:
    return Dataset.from_list(
        [{"prompt": [turn("user", 3 + i % 7, i)], "completion": [turn("assistant", 2, i + 50)]} for i in range(16)]
    )


def streamed() -> Any:
    return completions().to_iterable_dataset()


def own_loss(outputs, labels, num_items_in_batch=None):
    """Cross-entropy of one's own, with a term that reads every position."""
    logits = outputs.logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return (loss + 1e-3 * logits.square().mean()) / num_items_in_batch


class Shifting(Collator):
    """Labels are those of the next tokens already, which it says by a second name as a model's loss wants it."""

    def __call__(self, rows: list) -> dict[str, torch.Tensor]:
        batch = super().__call__(rows)
        shifted = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        return batch | {"labels": shifted, "shift_labels": shifted}


@dataclasses.dataclass
class Row:
    """One way to make batches: its data, the trainer's settings, and whether it has context tokens at all."""

    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    data: Callable = examples
    context: bool = True


PREPARED = {"dataset_kwargs": None}
PACKED = PREPARED | {"packing": True, "max_length": 40}
ROWS = {
    "padded right": Row(),
    "padded left": Row({"data_collator": Collator("left")}),
    "padded to a multiple": Row({"pad_to_multiple_of": 16}),
    "padding-free": Row({"padding_free": True, "max_length": None}),
    "padding-free to a multiple": Row({"padding_free": True, "max_length": None, "pad_to_multiple_of": 64}),
    "packing bfd": Row(PACKED),
    "packing bfd_split": Row(PACKED | {"packing_strategy": "bfd_split", "max_length": 10}),
    "packing wrapped": Row(PACKED | {"packing_strategy": "wrapped"}),
    "completion-only": Row(PREPARED, completions),
    "whole sequences": Row(PREPARED | {"completion_only_loss": False}, completions, context=False),
    "assistant-only": Row(PREPARED | {"assistant_only_loss": True}, conversations),
    "assistant-only, packed": Row(PACKED | {"assistant_only_loss": True}, conversations),
    "conversational": Row(PREPARED, conversations, context=False),
    "conversational completions": Row(PREPARED, conversational_completions),
    "plain text": Row(PREPARED, plain_text, context=False),
    "IterableDataset": Row(PREPARED, streamed),
    "IterableDataset, packed": Row(PACKED, streamed),
    "accumulation": Row({"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2}),
    "accumulation of uneven batches": Row({"gradient_accumulation_steps": 3, "num_train_epochs": 1, "max_steps": -1}),
    "group_by_length": Row({"train_sampling_strategy": "group_by_length"}),
    "label smoothing": Row({"label_smoothing_factor": 0.1}),
    "loss_type dft": Row({"loss_type": "dft"}),
    "compute_loss_func": Row({"compute_loss_func": own_loss}),
    "custom collator": Row({"data_collator": Collator("right")}),
    "collator that shifts the labels": Row({"data_collator": Shifting("left")}),
    "collator that pads by the tokenizer": Row({"data_collator": DataCollatorForSeq2Seq(chat_tokenizer())}),
    "worker processes": Row({"dataloader_num_workers": 1, "dataloader_prefetch_factor": 2}),
    "auto_find_batch_size": Row({"auto_find_batch_size": True}),
    "truncation": Row(PREPARED | {"max_length": 9, "truncation_mode": "keep_end"}, completions),
}
rows = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())


def run(folder, config, row: Row):
    settings = {"max_steps": 2, "processing_class": chat_tokenizer()} | row.settings
    return trained(folder, config, data=row.data(), **settings)


@rows
def test_sparsity_0_gives_the_run_of_sft(tmp_path, row):
    dense, exact = (run(tmp_path, config, row) for config in (None, SparseLoraConfig()))
    assert_same_run(exact, dense)
    assert exact.state.num_input_tokens_seen == dense.state.num_input_tokens_seen
    assert exact._total_train_tokens == dense._total_train_tokens > 0


@rows
def test_exact_savings_leave_a_sparse_run_as_it_is(tmp_path, row):
    plain, saving = (run(tmp_path, SPARSE.replace(exact=exact), row) for exact in (False, True))
    assert_same_run(saving, plain)
    sparse_steps = [log["sparselora/channel_sparsity"] > 0 for log in saving.state.log_history if "loss" in log]
    assert sparse_steps == [False] + [row.context] * (len(sparse_steps) - 1)


def test_labels_that_are_shifted_already_give_the_same_run(tmp_path):
    """The same tokens are sparse."""
    runs = [
        trained(tmp_path, SPARSE, data_collator=collator("left"), max_steps=3) for collator in (Collator, Shifting)
    ]
    assert_same_run(*runs)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_smoothed_labels_are_scored_from_labelled_rows_alone(tmp_path, checkpointing):
    """The metrics have a forward without gradients of their own, with every row."""
    settings = {"label_smoothing_factor": 0.1, "max_steps": 2, "gradient_checkpointing": checkpointing}
    runs, rows = [], []
    for config in (None, SparseLoraConfig(), SPARSE.replace(start_step=0, exact=False), SPARSE.replace(start_step=0)):
        model, seen = lora_model(), []
        norm = model.get_base_model().model.norm
        norm.register_forward_hook(
            lambda module, args, out, seen=seen: seen.append((out.requires_grad, out.shape[:-1].numel()))
        )
        runs.append(trained(tmp_path, config, model=model, **settings))
        rows.append(seen)
    dense, exact, plain, sparse = runs
    assert_same_run(exact, dense)
    assert_same_run(sparse, plain)
    for name in ("entropy", "mean_token_accuracy"):
        assert metrics(exact, name) == pytest.approx(metrics(dense, name), rel=1e-4)
    assert rows[1] == rows[3]
    for (learns, few), (_, whole) in zip(rows[1], rows[0], strict=True):
        assert few < whole if learns else few == whole
    assert [learns for learns, _ in rows[1]] == [True, False] * 2


def prepared(self, inputs):
    """As a subclass would have it: each forward makes its plan by itself then."""
    return SparseLoraTrainer._prepare_inputs(self, inputs)


@pytest.mark.parametrize("method", [None, prepared], ids=["plan of the trainer", "plan of the forward"])
def test_routers_see_padding_that_no_mask_hides(tmp_path, method, monkeypatch):
    """The loss that balances experts counts every token of a batch without a mask."""
    if method is not None:
        monkeypatch.setattr(SparseTrainer, "_prepare_inputs", method, raising=False)
    settings = ROWS["padding-free to a multiple"].settings | {"router_aux_loss_coef": 0.5, "max_steps": 2}
    dense, exact = (
        trained(tmp_path, config, model=zoo_lora("mixtral"), **settings) for config in (None, SparseLoraConfig())
    )
    assert_same_run(exact, dense)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe with a dense layer", "gpt_oss"])
def test_logits_are_left_out_where_routers_see_every_token(tmp_path, name):
    """The balance of experts is made of all tokens of all layers, the rest of the loss of labelled ones alone.

    In float64: a router carries roundings of float32 far.
    """
    settings = {"router_aux_loss_coef": 0.5, "max_steps": 2}
    dense = trained(tmp_path, model=zoo_lora(name, dtype=torch.float64), **settings)
    model, rows = zoo_lora(name, dtype=torch.float64), []
    decoder = model.base_model.model.model
    for module in (decoder.layers[-1], decoder.norm):
        module.register_forward_hook(lambda module, args, out: rows.append(args[0].shape[:-1].numel()))
    exact = trained(tmp_path, SparseLoraConfig(), model=model, **settings)
    assert_same_run(exact, dense)
    assert all(head < whole for whole, head in zip(rows[::2], rows[1::2], strict=True))
