"""Batched generation with padding on the left, the same whatever was answered before."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from transformers.utils import logging

__all__ = ["Generator", "Sampling"]

logger = logging.get_logger(__name__)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Args:
        new_tokens: most tokens of an answer.
        samples: answers to each question.
        temperature: 0 takes the likeliest token every time.
        top_p: draw from the likeliest tokens that together have this probability.
        seed: seed of the drawing, started anew for every batch.
    """

    new_tokens: int
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        for field in ("new_tokens", "samples"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: {getattr(self, field)} is below 1.")
        if not self.temperature >= 0:
            raise ValueError(f"temperature: {self.temperature} is no number of 0 or more.")
        if self.samples > 1 and not self.temperature:
            raise ValueError(f"samples: {self.samples} answers at temperature 0 are all the same. Set --temperature.")


class Generator:
    """A model that answers.

    Args:
        model: a causal model in evaluation mode.
        tokenizer: its tokenizer.
        sampling: how answers are drawn.
    """

    def __init__(self, model: Any, tokenizer: Any, sampling: Sampling) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.sampling = sampling
        fillers = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)  # any will do: the mask hides it
        self._pad = next(token for token in fillers if token is not None)

    def batches(self, prompts: Sequence[str], size: int) -> list[list[int]]:
        """Numbers of the prompts in batches of about equal length, the longest first."""
        order = sorted(range(len(prompts)), key=lambda number: (-len(prompts[number]), number))
        return [order[start : start + size] for start in range(0, len(order), size)]

    def answer(self, prompts: Sequence[str], seed: int) -> list[list[str]]:
        """Answers to a batch of prompts, all samples of each.

        Args:
            prompts: the prompts.
            seed: number of the batch.
        """
        import torch

        torch.manual_seed(self.sampling.seed + seed)
        inputs = self._encode(prompts)
        own = self.model.generation_config
        self.model.generation_config = settings = self._settings()  # what is not set would be filled in from its own
        try:
            with torch.inference_mode():
                # the tokenizer is for strings to stop at
                tokens = self.model.generate(**inputs, generation_config=settings, tokenizer=self.tokenizer)
        finally:
            self.model.generation_config = own
        texts = self.tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        count = self.sampling.samples
        return [texts[start : start + count] for start in range(0, len(texts), count)]

    def _encode(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Token ids and mask, padded on the left without touching the tokenizer's own settings."""
        import torch

        rows = self._rows(prompts)
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), self._pad)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, longest - len(row) :] = torch.tensor(row)
            mask[number, longest - len(row) :] = 1
        device = self.model.device
        return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}

    def _rows(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of each prompt."""
        bos = self.tokenizer.bos_token
        # a chat template writes the start token itself
        rows = [
            self.tokenizer(prompt, add_special_tokens=not (bos and prompt.startswith(bos)))["input_ids"]
            for prompt in prompts
        ]
        end = self.tokenizer.eos_token_id  # some tokenizers end every text, but a prompt is to go on
        return [row[:-1] if len(row) > 1 and row[-1] == end else row for row in rows]

    def warn_of_long(self, prompts: Sequence[str]) -> None:
        """Say how many prompts leave no place for an answer in the model's window."""
        window = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        long = 0 if window is None else sum(len(row) >= window for row in self._rows(prompts))
        if long:
            logger.warning(
                f"{long} of {len(prompts)} prompts fill the model's window of {window} tokens or are longer. They are "
                "asked whole, and few models answer well beyond their window."
            )

    def _settings(self) -> Any:
        """The likeliest token every time, or drawn by its probability; of the model's own settings where to end."""
        from transformers import GenerationConfig

        draw, drawn = self.sampling, self.sampling.temperature > 0
        chance = {"temperature": draw.temperature, "top_p": draw.top_p, "top_k": 50} if drawn else {}
        return GenerationConfig(
            max_new_tokens=draw.new_tokens,
            do_sample=drawn,
            num_return_sequences=draw.samples,
            pad_token_id=self._pad,
            eos_token_id=self._ends() or None,
            stop_strings=self.model.generation_config.stop_strings,
            **chance,
        )

    def _ends(self) -> list[int]:
        """Tokens that end an answer: the model's own, and the tokenizer's, which training puts there."""
        own = self.model.generation_config.eos_token_id
        ends = [*(own if isinstance(own, list) else [own]), self.tokenizer.eos_token_id]
        return [token for token in dict.fromkeys(ends) if token is not None]
