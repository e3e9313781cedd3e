"""SparseLoRA's settings as command-line flags and recipe keys, generated from the fields of `SparseLoraConfig`.

Every field is a flag of its own name; one whose name the Trainer's arguments already use gets the prefix `sparse_`
(`seed` is the Trainer's, `sparse_seed` the estimator's). Values are read as YAML: `--mlp_sparsity '{3-30: 0.99}'`.
Without a schedule (`SCHEDULE`) they change the model's default, so a configuration takes the model's shape.
"""

import argparse
import dataclasses
import inspect
import re
from collections.abc import Mapping
from typing import Any

from ..config import SparseLoraConfig

__all__ = [
    "CLASHING",
    "SCHEDULE",
    "add_sparse_arguments",
    "argument_name",
    "configured",
    "laid_over",
    "positive",
    "sparse_arguments",
    "sparse_settings",
    "to_arguments",
]

CLASHING = ("seed",)  # fields that SFTConfig has too
SCHEDULE = ("preset", "mlp_sparsity", "attention_sparsity")  # one of them says what is sparse
_FIELDS = ("preset", *(field.name for field in dataclasses.fields(SparseLoraConfig)))


def argument_name(field: str) -> str:
    """Name of a field on the command line and in a recipe."""
    return f"sparse_{field}" if field in CLASHING else field


def _descriptions() -> dict[str, str]:
    """What the docstring of `SparseLoraConfig` says of each field."""
    text = (inspect.getdoc(SparseLoraConfig) or "").partition("Args:\n")[2].partition("\n\n")[0]
    found = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", text, re.MULTILINE)
    return {name: re.sub(r"`+|\s+", lambda m: " " if m[0].isspace() else "", words) for name, words in found}


def _help(field: str) -> str:
    text = "a schedule of the paper by name" if field == "preset" else _descriptions().get(field, field)
    return text.replace("%", "%%")


def positive(text: str) -> int:
    """A whole number of at least 1, as a type of an argument."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def sparse_arguments() -> type:
    """A dataclass with every setting as an optional string, for `TrlParser`."""
    fields = [
        (argument_name(name), str | None, dataclasses.field(default=None, metadata={"help": _help(name)}))
        for name in _FIELDS
    ]
    return dataclasses.make_dataclass("SparseArguments", fields)


def add_sparse_arguments(parser: argparse.ArgumentParser) -> None:
    """Add every setting to a plain parser, under the names that recipes use."""
    group = parser.add_argument_group("SparseLoRA settings")
    for name in _FIELDS:
        flag = f"--{argument_name(name)}"
        group.add_argument(*dict.fromkeys((flag, flag.replace("_", "-"))), metavar="VALUE", help=_help(name))


def to_arguments(section: Mapping[str, Any]) -> dict[str, Any]:
    """Settings under their field names, as in a settings file, under the names that flags have.

    Raises:
        ValueError: no mapping, or an unknown key.
    """
    if not isinstance(section, Mapping):
        raise ValueError(f"Expected SparseLoRA settings as `name: value` lines, found {section!r}.")
    unknown = sorted(map(str, set(section) - set(_FIELDS)))
    if unknown:
        raise ValueError(f"Unknown SparseLoRA setting {', '.join(unknown)}. Settings: {', '.join(_FIELDS)}.")
    return {argument_name(name): value for name, value in section.items()}


def _parsed(name: str, value: Any) -> Any:
    import yaml

    if not isinstance(value, str):
        return value
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"{name}: {value!r} cannot be read as YAML: {error}") from error


def sparse_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that flags and recipe give, under their field names; `configured` makes a configuration of them.

    Args:
        values: flag name to value; None stands for "not given", strings are read as YAML.

    Raises:
        ValueError: a value that `SparseLoraConfig` refuses or that is no YAML.
    """
    given = {}
    for name in _FIELDS:
        value = values.get(argument_name(name))
        if value is not None:
            given[name] = _parsed(name, value)
    try:
        SparseLoraConfig.from_dict(given)
    except TypeError as error:
        raise ValueError(str(error)) from error
    return given


def laid_over(given: Mapping[str, Any], default: SparseLoraConfig) -> SparseLoraConfig:
    """A configuration of settings by field names; those that name no schedule change a default."""
    if any(name in given for name in SCHEDULE):
        return SparseLoraConfig.from_dict(given)
    return default.replace(**given)


def configured(given: Mapping[str, Any], layers: int, hidden: int) -> SparseLoraConfig:
    """The configuration of a model: settings laid over the model's default.

    Args:
        given: what `sparse_settings` returns.
        layers: decoder layers of the model.
        hidden: width of its residual stream.
    """
    return laid_over(given, SparseLoraConfig.default(layers, hidden))
