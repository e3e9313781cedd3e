"""Tokens and labels of plain prompts and completions: a token carries a label when it holds text of the completion.

Prompt and completion are tokenised as one text, as the model reads them. Where a token reaches across the boundary it
is the completion's; counting the tokens of the prompt alone, or comparing the two tokenisations, would be off by one
there. `sparselora_hf.formats` ends the paper's prompts in spaces, which byte-level BPE merges into the answer.
"""

from collections.abc import Mapping
from typing import Any

from transformers.utils import logging

from .plan import IGNORE_INDEX

__all__ = ["LONG_ROWS", "label_examples", "tokenize_examples"]

logger = logging.get_logger(__name__)

LONG_ROWS = ("cut", "drop")


def tokenize_examples(
    batch: Mapping[str, list[str]], tokenizer: Any, max_length: int | None = None, long_rows: str = "cut"
) -> dict[str, list[list[int]]]:
    """Token ids and labels of a batch of prompts and completions, the end-of-text token at the end of each.

    Args:
        batch: columns `prompt` and `completion`.
        tokenizer: a fast tokenizer.
        max_length: tokens of a row; None for any number.
        long_rows: ``cut`` rows at `max_length`, or leave them out (``drop``).

    Returns:
        Columns `input_ids` and `labels`, without the rows that have no label.
    """
    pairs = list(zip(batch["prompt"], batch["completion"], strict=True))
    encoded = tokenizer([prompt + completion for prompt, completion in pairs], return_offsets_mapping=True)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for (prompt, _), ids, offsets in zip(pairs, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        labels = [token if end > len(prompt) else IGNORE_INDEX for token, (_, end) in zip(ids, offsets, strict=True)]
        if tokenizer.eos_token_id is not None:
            text = ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids  # some tokenizers end every text
            ids, labels = [*text, tokenizer.eos_token_id], [*labels[: len(text)], tokenizer.eos_token_id]
        is_long = max_length is not None and len(ids) > max_length
        ids, labels = ids[:max_length], labels[:max_length]
        if any(label != IGNORE_INDEX for label in labels) and not (is_long and long_rows == "drop"):
            rows["input_ids"].append(ids)
            rows["labels"].append(labels)
    return rows


def label_examples(
    dataset: Any,
    tokenizer: Any,
    max_length: int | None = None,
    long_rows: str = "cut",
    max_examples: int | None = None,
    num_proc: int | None = None,
) -> tuple[Any, int]:
    """Tokenise a dataset of plain prompts and completions; rows that truncation leaves without a label are dropped.

    Args:
        dataset: a `datasets.Dataset` with `prompt` and `completion`.
        tokenizer: a fast tokenizer.
        max_length: see `tokenize_examples`.
        long_rows: see `tokenize_examples`.
        max_examples: keep the first so many of the rows that are left.
        num_proc: processes to tokenise with.

    Returns:
        The dataset with `input_ids` and `labels`, and the number of rows dropped.

    Raises:
        ValueError: an unknown `long_rows`, or no row is left.
    """
    if long_rows not in LONG_ROWS:
        raise ValueError(f"long_rows: {long_rows!r} is not one of {', '.join(LONG_ROWS)}.")
    kept = dataset.map(
        tokenize_examples,
        batched=True,
        remove_columns=dataset.column_names,
        fn_kwargs={"tokenizer": tokenizer, "max_length": max_length, "long_rows": long_rows},
        num_proc=num_proc,
        desc="Tokenizing",
    )
    dropped = len(dataset) - len(kept)
    if not len(kept):
        why = "row is longer than" if long_rows == "drop" else "prompt fills"
        raise ValueError(f"Every {why} max_length = {max_length} tokens, so no row is left. Raise max_length.")
    if dropped:
        why = "are longer than" if long_rows == "drop" else "have a prompt that fills"
        logger.warning(f"{dropped} of {len(dataset)} rows {why} max_length = {max_length} tokens and are dropped.")
    return (kept if max_examples is None else kept.take(min(max_examples, len(kept)))), dropped
