"""Sparsity per layer: one number for all layers, or a mapping of layer ranges, checked once.

``0.9`` means every layer; ``{"3-30": 0.99}`` means layers 3 to 30 inclusive, the rest dense; a key may join
ranges with commas (``"14-19, 21-23"``) and a bare layer number is a range of one.
"""

import re
from collections.abc import Mapping

__all__ = ["check_sparsity", "expand_layers", "kept_channels", "per_layer_sparsity"]

_RANGE = re.compile(r"^\s*(\d{1,4})\s*(?:-\s*(\d{1,4})\s*)?$")  # a range is spelt out before the model is known


def _check_fraction(field: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{field}: sparsity must be a number in [0, 1), got {value!r}.")
    if not 0.0 <= value < 1.0:
        raise ValueError(
            f"{field}: sparsity {value!r} is outside [0, 1). It is the fraction of channels dropped: "
            "0 keeps a layer dense, 0.99 keeps one channel in a hundred."
        )
    return float(value)


def expand_layers(field: str, key: object) -> list[int]:
    """Layer numbers named by one key of a layer mapping.

    Args:
        field: name of the configuration field, for error messages.
        key: ``7``, ``"7"``, ``"3-30"`` or ``"3-5, 8"``.

    Raises:
        ValueError: the key is no layer number or ascending range.
    """
    layers: list[int] = []
    for part in str(key).split(","):
        match = _RANGE.match(part)
        if not match:
            raise ValueError(
                f"{field}: {key!r} is no layer range. Write a layer (7), a range (3-30) or several (3-5, 8)."
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"{field}: range {part.strip()!r} runs backwards. Write {last}-{first}.")
        layers.extend(range(first, last + 1))
    return layers


def _expand_mapping(field: str, value: Mapping) -> dict[int, float]:
    expanded: dict[int, float] = {}
    for key, fraction in value.items():
        fraction = _check_fraction(f"{field}[{key!r}]", fraction)
        for layer in expand_layers(field, key):
            if layer in expanded:
                raise ValueError(
                    f"{field}: layer {layer} is named twice ({key!r} overlaps another range). Name it once."
                )
            expanded[layer] = fraction
    return expanded


def check_sparsity(field: str, value: object) -> None:
    """Check a sparsity setting without knowing the model.

    Raises:
        TypeError: neither a number nor a mapping.
        ValueError: a fraction outside [0, 1), an unreadable, overlapping or reversed range.
    """
    if isinstance(value, Mapping):
        _expand_mapping(field, value)
    else:
        _check_fraction(field, value)


def per_layer_sparsity(field: str, value: float | Mapping, num_layers: int) -> list[float]:
    """One sparsity per layer of a model with ``num_layers`` layers.

    Raises:
        ValueError: a layer beyond the model's last one, or what `check_sparsity` raises.
    """
    if not isinstance(value, Mapping):
        return [_check_fraction(field, value)] * num_layers
    expanded = _expand_mapping(field, value)
    beyond = sorted(layer for layer in expanded if layer >= num_layers)
    if beyond:
        raise ValueError(
            f"{field}: layer {beyond[0]} does not exist, the model has layers 0 to {num_layers - 1}. "
            "Shorten the range or pick the preset of this model."
        )
    return [expanded.get(layer, 0.0) for layer in range(num_layers)]


def kept_channels(width: int, sparsity: float) -> int:
    """Channels kept out of ``width``: rounded to a multiple of 16 where the width is 512 or more.

    Matrix units work in tiles of 16, so 143 channels cost what 144 do. At sparsity 0 all channels are kept.
    """
    if sparsity == 0:
        return width
    multiple = 16 if width >= 512 else 1
    return min(width, max(multiple, round(width * (1.0 - sparsity) / multiple) * multiple))
