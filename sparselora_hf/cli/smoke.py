"""`--smoke`: a recipe's whole way in small. A model of the recipe's family and depth, and rows made on the spot.

The model is as deep as the real one, so the recipe's own schedule runs, and narrow enough for a CPU. It learns
nothing; what is shown is that data, training, saving and evaluation fit together.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..shapes import MODEL_SHAPES
from .recipe import Recipe

__all__ = ["furnish", "make_model"]

_ROWS = 24
_WIDTHS = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "max_position_embeddings": 8192}
_CHAT = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def _sum(number: int) -> dict[str, str]:
    return {
        "instruction": f"Tom has {number} apples and buys {number + 3}. How many has he?",
        "input": "",
        "output": f"He has {number} + {number + 3} = {2 * number + 3} apples. The answer is {2 * number + 3}.",
        "answer": ("true", "false")[number % 2],
    }


def _code(number: int) -> dict[str, str]:
    block = f"```python\ndef add(x):\n    return x + {number}\n```"
    return {"query": f"Write a function that adds {number}.", "answer": f"Here it is:\n{block}\nThat is all."}


def _puzzles() -> Iterable[dict[str, Any]]:
    from ..arc import training_rows
    from ..evaluation.tasks import TASKS

    return training_rows(TASKS["arc_agi"].example, copies=_ROWS // 2)


_MADE: dict[str, Callable[[int], dict[str, str]]] = {
    "alpaca": _sum,
    "code_feedback": _code,
    "evol_instruct": _sum,
    "llm_adapters": _sum,
}


def _rows(prompt_format: str | None) -> list[dict[str, Any]]:
    if prompt_format is None:
        return list(_puzzles())
    if prompt_format not in _MADE:
        raise ValueError(
            f"--smoke makes no rows of prompt format {prompt_format!r}. Name some with --dataset_name FILE."
        )
    return [_MADE[prompt_format](number) for number in range(_ROWS)]


def _tokenizer(texts: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]
    inner.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=512, special_tokens=special, initial_alphabet=alphabet)
    )
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=_CHAT, **names)


def make_model(folder: Path, shape: str | None, texts: list[str]) -> Path:
    """Write a narrow model with random weights and a tokenizer of its own.

    Args:
        folder: where to.
        shape: name in `MODEL_SHAPES` of the model that it is made after.
        texts: what the tokenizer is trained on.

    Raises:
        ValueError: an unknown shape, or None.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if shape not in MODEL_SHAPES:
        raise ValueError(
            f"smoke_shape: {shape!r} is not one of {', '.join(sorted(MODEL_SHAPES))}. --smoke makes a model after it: "
            "name a recipe that has one, or give --smoke_shape."
        )
    real, tokenizer = MODEL_SHAPES[shape], _tokenizer(texts)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    if real["num_key_value_heads"] < real["num_attention_heads"]:
        heads["num_key_value_heads"] = 2
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    depth = real["num_hidden_layers"]
    config = AutoConfig.for_model(
        real["model_type"], vocab_size=len(tokenizer), num_hidden_layers=depth, **_WIDTHS, **heads, **ids
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _write_questions(folder: Path) -> Path:
    from ..evaluation.tasks import TASKS

    folder.mkdir(parents=True, exist_ok=True)
    for name, task in TASKS.items():
        (folder / f"{name}.json").write_text(json.dumps([dict(task.example)] * 2), encoding="utf-8")
    return folder


def furnish(recipe: Recipe) -> None:
    """Give a recipe in small what no flag has named: model, rows, questions."""
    folder, data = Path(recipe.training.output_dir), recipe.data
    folder.mkdir(parents=True, exist_ok=True)
    if not recipe.script.dataset_name and not recipe.mixture.datasets:
        path = folder / "rows.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in _rows(data.prompt_format)), encoding="utf-8")
        recipe.script.dataset_name = str(path)
    if recipe.model.model_name_or_path is None:
        texts = [json.dumps(row) for row in _rows(data.prompt_format)]
        recipe.model.model_name_or_path = str(make_model(folder / "base", data.smoke_shape, texts))
    data.eval_data = data.eval_data or str(_write_questions(folder / "questions"))
