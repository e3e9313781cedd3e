"""Recipes: what a run is told, from YAML files, flags, or both.

A recipe may build on others: `base: common.yaml`, or a list of files, later ones winning over earlier ones and the
recipe over all. Paths count from the recipe's folder; the settings in a `sparselora:` section are merged one by one.
"""

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .settings import sparse_arguments, sparse_settings, to_arguments

__all__ = ["DATA_FILE", "SMOKE", "DataArguments", "Recipe", "parse", "parse_groups", "read_recipe"]

DATA_FILE = "sparselora_data.yaml"  # beside the adapter: what `sparselora eval` has to know of the training

# what --smoke changes of a recipe; its model and data become small ones made on the spot unless flags name others
SMOKE = {
    "model_name_or_path": None,
    "dataset_name": None,
    "dataset_config": None,
    "eval_data": None,
    "dataset_test_split": "train",
    "dtype": "float32",
    "attn_implementation": "eager",
    "use_cpu": True,
    "bf16": False,
    "max_steps": 4,
    "max_examples": 16,
    "max_length": 1024,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "logging_steps": 1,
    "save_strategy": "no",
    "eval_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "push_to_hub": False,
}
_SMOKE_SPARSITY = {"start_step": 2, "dense_if_slower": False}  # layers this small gain nothing: sparse all the same


@dataclasses.dataclass
class DataArguments:
    """Data, comparison and evaluation options beside TRL's own."""

    prompt_format: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "llm_adapters, alpaca, code_feedback, evol_instruct, question_answer or text_split; left out, "
            "rows go to TRL as they are"
        },
    )
    train_on: str = dataclasses.field(
        default="output",
        metadata={"help": "column of the completion, where a format has a choice", "choices": ["answer", "output"]},
    )
    max_examples: int | None = dataclasses.field(default=None, metadata={"help": "train on the first so many rows"})
    long_rows: str = dataclasses.field(
        default="cut", metadata={"help": "rows above max_length are cut or left out", "choices": ["cut", "drop"]}
    )
    window_characters: int = dataclasses.field(default=1024, metadata={"help": "window of text_split, in characters"})
    prompt_share: float = dataclasses.field(default=0.75, metadata={"help": "share of a window that is prompt"})
    dense: bool = dataclasses.field(default=False, metadata={"help": "train with TRL's SFTTrainer, for comparison"})
    eval_tasks: list[str] = dataclasses.field(
        default_factory=list, metadata={"help": "tasks of `sparselora eval` to run on the adapter after training"}
    )
    eval_data: str | None = dataclasses.field(
        default=None, metadata={"help": "folder with the tasks' data; left out, it is fetched"}
    )
    smoke: bool = dataclasses.field(
        default=False, metadata={"help": "run the recipe in small: offline, on a CPU, in under a minute"}
    )
    smoke_shape: str | None = dataclasses.field(
        default=None, metadata={"help": "shape, as `sparselora estimate` names it, that the small model is made after"}
    )
    is_chat: bool = dataclasses.field(default=False, init=False)  # seen when the rows are read

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # a flag is held against its choices, a recipe's key is not
            choices, value = field.metadata.get("choices"), getattr(self, field.name)
            if choices and value not in choices:
                raise ValueError(f"{field.name}: {value!r} is not one of {', '.join(choices)}.")
        if self.max_examples is not None and self.max_examples < 1:
            raise ValueError(f"max_examples: {self.max_examples} is below 1.")
        if isinstance(self.eval_tasks, str):
            self.eval_tasks = [self.eval_tasks]


class Recipe(NamedTuple):
    """All that a run is told: TRL's argument objects, the data options and the settings of sparsity."""

    script: Any
    training: Any
    model: Any
    mixture: Any
    data: DataArguments
    sparse: dict[str, Any]


def read_recipe(path: str | Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Values of a recipe and of those that it builds on.

    Args:
        path: YAML file.
        above: recipes on the way to this one.

    Raises:
        OSError: no such file.
        ValueError: no mapping of names, a `base` that is no file, or a recipe that builds on itself.
    """
    import yaml

    path = Path(path).resolve()
    if path in above:
        raise ValueError(f"{path}: the recipe builds on itself. Look at its `base`.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"The recipe is no YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected `name: value` lines, found {type(values).__name__}.")
    strangers = [key for key in values if not isinstance(key, str)]
    if strangers:
        raise ValueError(f"{path}: the key {strangers[0]!r} is no name. YAML reads on, off, yes and no as booleans.")
    bases = values.pop("base", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ValueError(f"{path}: base is a file or a list of files, found {bases!r}.")
    merged: dict[str, Any] = {}
    for base in bases:
        merged = _merge(merged, read_recipe(path.parent / base, (*above, path)))
    return _merge(merged, values)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    sections = [values.get("sparselora") for values in (below, above)]
    merged = {**below, **above}
    if all(isinstance(section, dict) for section in sections):
        merged["sparselora"] = {**sections[0], **sections[1]}
    return merged


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


def _make_parser(groups: Sequence[type], prog: str) -> Any:
    import torch

    parser = _parser_class()(groups, prog=prog, allow_abbrev=False)
    parser.set_defaults_with_config(use_peft=True)
    if not torch.accelerator.is_available():
        # bf16 is TRL's default and about 80x slower than fp32 in backward on CPUs without AVX-512 bf16
        parser.set_defaults_with_config(use_cpu=True, bf16=False)
    return parser


def _split_config(argv: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Flags without `--config`, and the values of the recipe that it names."""
    flags = [part for flag in argv for part in (flag.split("=", 1) if flag.startswith("--config=") else [flag])]
    if "--config" not in flags:
        return flags, {}
    if flags.count("--config") > 1:
        raise ValueError("--config is given twice. A recipe takes others in by its `base`.")
    place = flags.index("--config")
    if place + 1 == len(flags):
        raise ValueError("--config needs the path of a recipe.")
    values = read_recipe(flags[place + 1])
    variables = values.pop("env", None) or {}
    if not isinstance(variables, dict):
        raise ValueError(f"Expected env as `NAME: value` lines, found {variables!r}.")
    for name, value in variables.items():
        os.environ[str(name)] = str(value)
    return flags[:place] + flags[place + 2 :], values


def parse_groups(argv: Sequence[str], groups: Sequence[type], prog: str) -> list[Any]:
    """Read recipe and flags into argument classes; flags win, and `--smoke` wins over the recipe.

    Args:
        argv: flags, `--config RECIPE` among them.
        groups: argument classes; SparseLoRA's settings come last of what is returned.
        prog: name of the command.

    Raises:
        FileNotFoundError: no such recipe.
        ValueError: an unknown key or flag, or a value out of range.
    """
    flags, values = _split_config(argv)
    if _asks_for_smoke(flags, values):
        values = _in_small(values, {field.name for group in groups for field in dataclasses.fields(group)})
    parser = _make_parser([*groups, sparse_arguments()], prog)
    unknown = parser.set_defaults_with_config(**values)
    if unknown:
        raise ValueError(f"The recipe has keys that nothing reads: {', '.join(n[2:] for n in unknown[::2])}.")
    try:
        *arguments, sparse = parser.parse_args_into_dataclasses(args=flags)
    except TypeError as error:  # a flag is text and is converted, a recipe's value is what YAML made of it
        raise ValueError(f"A value of the recipe has another type than its setting: {error}") from error
    for group in arguments:
        if getattr(group, "max_steps", None) == 0:  # the Trainer would take one step, at a learning rate of 0 mostly
            raise ValueError("max_steps: a run of 0 steps trains nothing. Give 1 or more, or -1 for num_train_epochs.")
        # TRL makes text of a list of one, and PEFT takes text for a pattern of whole paths
        target = getattr(group, "lora_target_modules", None)
        if isinstance(target, str) and target.isidentifier():
            group.lora_target_modules = [target]
    return [*arguments, sparse_settings(vars(sparse))]


def _asks_for_smoke(flags: Sequence[str], values: dict[str, Any]) -> bool:
    """Whether flags or else the recipe say so, in any of the forms that the parser itself takes."""
    from transformers.hf_argparser import string_to_bool

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--smoke", nargs="?", const=True, default=values.get("smoke", False), type=string_to_bool)
    return parser.parse_known_args(flags)[0].smoke


def _in_small(values: dict[str, Any], known: set[str]) -> dict[str, Any]:
    section = values.get("sparselora") or {}
    to_arguments(section)  # what is wrong with it is said here as without --smoke
    folder = f"{values.get('output_dir', 'runs/recipe')}-smoke"
    small = {name: value for name, value in SMOKE.items() if name in known}
    return {**values, **small, "output_dir": folder, "sparselora": {**section, **_SMOKE_SPARSITY}}


def parse(argv: Sequence[str]) -> Recipe:
    """Read the recipe and flags of a fine-tuning.

    Raises:
        FileNotFoundError, ValueError: see `parse_groups`; a sparse run without LoRA, or one without LoRA into an
            adapter's folder.
    """
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig

    groups = (ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig, DataArguments)
    recipe = Recipe(*parse_groups(argv, groups, "sparselora sft"))
    _check(recipe)
    return recipe


def _check(recipe: Recipe) -> None:
    if recipe.model.model_name_or_path is None and not recipe.data.smoke:
        raise ValueError("Name a model: --model_name_or_path, or model_name_or_path in the recipe.")
    if not recipe.script.dataset_name and not recipe.mixture.datasets and not recipe.data.smoke:
        raise ValueError("Name the data: --dataset_name, or dataset_name or datasets in the recipe.")
    if recipe.script.dataset_streaming or recipe.mixture.streaming:
        raise ValueError("Streamed data is not supported here. Leave dataset_streaming and streaming out.")
    if not recipe.model.use_peft and not recipe.data.dense:
        raise ValueError("SparseLoRA trains LoRA adapters and use_peft is off. Leave it out, or add --dense.")
    folder = Path(recipe.training.output_dir)
    if folder.is_file():
        raise ValueError(f"output_dir: {folder} is a file. Name a folder.")
    if not recipe.model.use_peft and (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"output_dir: {folder} holds an adapter, and transformers would put it on top of the whole model trained "
            "into the same folder. Name another folder."
        )
