"""`sparselora sft`: TRL's supervised fine-tuning with SparseLoRA, from a YAML recipe, flags, or both.

All of TRL's flags and recipe keys keep their names and meaning. New are SparseLoRA's settings (see `settings.py`, also
as a section `sparselora:` of the recipe) and those of `DataArguments`. Flags win over the recipe; an unknown key or
flag is an error. LoRA is on unless `use_peft: false` says otherwise, which only `--dense` accepts.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..config import SparseLoraConfig
from .settings import sparse_arguments, sparse_config, to_arguments

__all__ = ["DataArguments", "Recipe", "main", "make_trainer", "parse", "trainer_keywords"]


@dataclasses.dataclass
class DataArguments:
    """Data and comparison options beside TRL's own."""

    prompt_format: str | None = dataclasses.field(
        default=None, metadata={"help": "alpaca, question_answer or text_split; left out, rows go to TRL as they are"}
    )
    train_on: str = dataclasses.field(
        default="output", metadata={"help": "column that alpaca completes with", "choices": ["answer", "output"]}
    )
    max_examples: int | None = dataclasses.field(default=None, metadata={"help": "train on the first so many rows"})
    window_characters: int = dataclasses.field(default=1024, metadata={"help": "window of text_split, in characters"})
    prompt_share: float = dataclasses.field(default=0.75, metadata={"help": "share of a window that is prompt"})
    dense: bool = dataclasses.field(default=False, metadata={"help": "train with TRL's SFTTrainer, for comparison"})


class Recipe(NamedTuple):
    """All that a run is told: TRL's argument objects, the data options and the sparsity."""

    script: Any
    training: Any
    model: Any
    mixture: Any
    data: DataArguments
    sparse: SparseLoraConfig | None


def _parser_class() -> type:
    from trl import TrlParser

    class RecipeParser(TrlParser):
        """`TrlParser` that reads a `sparselora:` section and reports errors by exception."""

        def set_defaults_with_config(self, **values: Any) -> list[str]:
            section = values.pop("sparselora", None)
            return super().set_defaults_with_config(**values, **to_arguments(section or {}))

        def error(self, message: str) -> None:
            raise ValueError(message)

    return RecipeParser


def _make_parser() -> Any:
    import torch
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig

    groups = (ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig, DataArguments, sparse_arguments())
    parser = _parser_class()(groups, prog="sparselora sft", allow_abbrev=False)
    parser.set_defaults_with_config(use_peft=True)
    if not torch.accelerator.is_available():
        # bf16 is TRL's default and about 80x slower than fp32 in backward on CPUs without AVX-512 bf16
        parser.set_defaults_with_config(use_cpu=True, bf16=False)
    return parser


def parse(argv: Sequence[str]) -> Recipe:
    """Read recipe and flags.

    Raises:
        FileNotFoundError: no such recipe.
        ValueError: an unknown key or flag, a value out of range, or a sparse run without LoRA.
    """
    import yaml

    argv = [part for flag in argv for part in (flag.split("=", 1) if flag.startswith("--config=") else [flag])]
    if argv[-1:] == ["--config"]:
        raise ValueError("--config needs the path of a recipe.")
    try:
        *arguments, data, sparse = _make_parser().parse_args_and_config(argv)
    except yaml.YAMLError as error:
        raise ValueError(f"The recipe is no YAML: {error}") from error
    recipe = Recipe(*arguments, data, sparse_config(vars(sparse)))
    _check(recipe)
    return recipe


def _check(recipe: Recipe) -> None:
    if recipe.model.model_name_or_path is None:
        raise ValueError("Name a model: --model_name_or_path, or model_name_or_path in the recipe.")
    if not recipe.script.dataset_name and not recipe.mixture.datasets:
        raise ValueError("Name the data: --dataset_name, or dataset_name or datasets in the recipe.")
    if recipe.script.dataset_streaming or recipe.mixture.streaming:
        raise ValueError("Streamed data is not supported here. Leave dataset_streaming and streaming out.")
    if not recipe.model.use_peft and not recipe.data.dense:
        raise ValueError("SparseLoRA trains LoRA adapters and use_peft is off. Leave it out, or add --dense.")


def _examples(recipe: Recipe, split: str) -> Any:
    from ..prompts import TextWindow, format_examples, load_examples

    options = recipe.data
    window = TextWindow(options.window_characters, options.prompt_share)
    if not recipe.mixture.datasets:
        return load_examples(
            recipe.script.dataset_name,
            split,
            options.prompt_format,
            options.train_on,
            options.max_examples,
            config_name=recipe.script.dataset_config,
            window=window,
        )
    from trl import get_dataset

    rows = format_examples(get_dataset(recipe.mixture)[split], options.prompt_format, options.train_on, window)
    return rows if options.max_examples is None else rows.take(min(options.max_examples, len(rows)))


def _check_columns(rows: Any, text_field: str) -> None:
    readable = ("prompt", "messages", "conversations", "input_ids", text_field)
    if not any(column in rows.column_names for column in readable):
        raise ValueError(
            f"TRL reads none of the columns {', '.join(rows.column_names)}. Pick a --prompt_format, "
            f"or give rows with one of {', '.join(readable)}."
        )


def trainer_keywords(recipe: Recipe) -> dict[str, Any]:
    """Arguments that `SFTTrainer` and `SparseLoraTrainer` share: model, data, tokenizer, adapter."""
    from transformers import AutoTokenizer
    from trl import get_peft_config, get_quantization_config

    from ..prompts import drop_unlabelled

    model, training = recipe.model, recipe.training
    source = {"revision": model.model_revision, "trust_remote_code": training.trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(model.model_name_or_path, **source)
    init = {**source, "attn_implementation": model.attn_implementation, "dtype": model.dtype}
    training.model_init_kwargs = {**init, **(training.model_init_kwargs or {})}
    rows = _examples(recipe, recipe.script.dataset_train_split)
    _check_columns(rows, training.dataset_text_field)
    rows, _ = drop_unlabelled(rows, tokenizer, training.max_length)
    evaluated = training.eval_strategy != "no"
    quantization = get_quantization_config(model)
    return {
        "model": model.model_name_or_path,
        "args": training,
        "train_dataset": rows,
        "eval_dataset": _examples(recipe, recipe.script.dataset_test_split) if evaluated else None,
        "processing_class": tokenizer,
        "peft_config": get_peft_config(model),
        **({} if quantization is None else {"quantization_config": quantization}),
    }


def make_trainer(recipe: Recipe, keywords: dict[str, Any]) -> Any:
    """The trainer that a recipe asks for, from `trainer_keywords`."""
    if recipe.data.dense:
        from trl import SFTTrainer

        return SFTTrainer(**keywords)
    from ..trainer import SparseLoraTrainer

    return SparseLoraTrainer(**keywords, sparse_config=recipe.sparse)


def main(argv: Sequence[str]) -> int:
    """Train, save the adapter and say so in one line.

    Raises:
        FileNotFoundError, ImportError, ValueError: the recipe, the data or the environment is not fit for a run.
    """
    from rich.console import Console

    recipe = parse(argv)
    trainer = make_trainer(recipe, trainer_keywords(recipe))
    start = time.perf_counter()
    result = trainer.train(resume_from_checkpoint=recipe.training.resume_from_checkpoint)
    seconds = time.perf_counter() - start
    trainer.save_model(recipe.training.output_dir)
    if recipe.training.push_to_hub:
        trainer.push_to_hub(dataset_name=recipe.script.dataset_name)
    if trainer.is_world_process_zero():
        kind = "dense" if recipe.data.dense else "sparse"
        Console(soft_wrap=True, markup=False, highlight=False).print(
            f"{kind}: {result.global_step} steps in {seconds:.1f} s, mean training loss {result.training_loss:.4f}, "
            f"saved to {recipe.training.output_dir}"
        )
    trainer.accelerator.end_training()
    return 0
