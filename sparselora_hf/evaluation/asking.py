"""How a question is put to a model: in the prompt format of its training, or with its chat template."""

from collections.abc import Sequence
from typing import Any

from ..formats import FORMATS

__all__ = ["CHAT", "Asker"]

CHAT = "chat"


class Asker:
    """Prompts of a conversation's next turn.

    Args:
        prompt_format: a name in `FORMATS`, or ``chat`` for the tokenizer's chat template.
        tokenizer: tokenizer of the model.

    Raises:
        ValueError: an unknown format, or no chat template where one is needed.
    """

    def __init__(self, prompt_format: str, tokenizer: Any) -> None:
        if prompt_format != CHAT and prompt_format not in FORMATS:
            raise ValueError(f"prompt_format: {prompt_format!r} is not one of {', '.join([*FORMATS, CHAT])}.")
        if prompt_format == CHAT and not tokenizer.chat_template:
            raise ValueError(
                f"The tokenizer has no chat template. Name the format of the training: --prompt-format "
                f"{', '.join(FORMATS)}."
            )
        self.prompt_format = prompt_format
        self.tokenizer = tokenizer

    def prompt(self, turns: Sequence[Any], replies: Sequence[str]) -> str:
        """Prompt of the turn after ``replies``.

        Args:
            turns: what is asked, turn by turn: text, or whole conversations of messages.
            replies: answers to the turns before.
        """
        asked = turns[: len(replies) + 1]
        if self.prompt_format != CHAT:
            form = FORMATS[self.prompt_format]
            *before, last = [form.ask(text) for text in asked]
            told = [f"{prompt}{reply}\n\n" for prompt, reply in zip(before, replies, strict=True)]
            return "".join(told) + last
        messages: list[dict[str, str]] = []
        for place, turn in enumerate(asked):
            messages += turn if isinstance(turn, list) else [{"role": "user", "content": turn}]
            messages += [{"role": "assistant", "content": replies[place]}] if place < len(replies) else []
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
