"""`SparseLoraConfig`: every choice of the method in one frozen dataclass, checked when it is made.

`sparsity` is always the fraction of channels dropped. Reading this file needs no torch.
"""

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .files import write_atomically
from .layers import check_sparsity, per_layer_sparsity
from .presets import get_preset

__all__ = [
    "CONFIG_FILE",
    "EXACT_SAVINGS",
    "TOKEN_RULES",
    "SparseLoraConfig",
    "check_choice",
    "check_settings",
    "read_settings",
]

CONFIG_FILE = "sparselora_config.yaml"
EXACT_SAVINGS = (
    "activations",
    "adapters",
    "frozen_below",
    "last_layer",
    "logits",
    "norms",
    "padding",
    "recomputation",
    "rotary",
)
TOKEN_RULES = ("label_or_predictor", "label")

# what dense steps gather depends on these
_TEACHING = (
    "mlp_sparsity",
    "attention_sparsity",
    "rank",
    "criterion",
    "compensation",
    "compensation_rank",
    "calibration_tokens",
    "token_rule",
    "seed",
)

_CHOICES = {
    "compensation": ("none", "mean", "low_rank"),
    "criterion": ("svd", "svd_mean", "svd_whitened", "sampled", "static", "output", "oracle", "random"),
    "kernels": ("auto", "torch", "triton"),
    "lora_branch": ("dense", "sliced"),
    "token_rule": TOKEN_RULES,
}


@dataclasses.dataclass(frozen=True)
class SparseLoraConfig:
    """Settings of contextual sparsity (arXiv 2506.16500).

    Args:
        mlp_sparsity: fraction of MLP channels dropped for context tokens: one number for all layers, or layer
            ranges (``{"3-30": 0.99}``), the other layers staying dense.
        attention_sparsity: the same for the channels of the q, k, v and o projections; of v and o alone where a model
            normalises queries and keys.
        start_step: first sparse optimizer step, counted from 0; a float is a fraction of the run, an int counts
            steps. Steps before it are dense (the paper: 5 or 10 %).
        end_step: first step that is dense again, counted like `start_step`; 1.0 is the end of the run.
        rank: rank of the SVD estimator (paper, section 3.2: 8).
        criterion: how channels are scored: ``svd`` (the paper's text, all context tokens), ``svd_mean`` (the
            reference code: tokens averaged first), ``svd_whitened`` (SVD weighted by the inputs seen in dense
            steps), ``sampled`` (true activations of a few context tokens), ``static`` (norms gathered in dense
            steps, one fixed set), ``output`` (the same norms, moved by the MLP activations of the batch's output
            tokens, which are computed anyway), ``oracle`` (true activations of all context tokens), ``random``.
        score_tokens: at most this many context tokens, evenly spaced, enter the scores; None takes all. For
            ``sampled``, None means 64, and for ``output`` 512 output tokens.
        compensation: stand-in for the dropped channels: ``none`` (the paper), ``mean`` (of MLPs alone) or
            ``low_rank`` (of MLPs, and of attention by factors of its weights), fitted in closed form on activations
            of the dense warm-up steps.
        compensation_rank: rank of the ``low_rank`` stand-ins.
        calibration_tokens: token rows kept per layer while dense steps run, for the criteria and stand-ins
            that need statistics.
        token_rule: a token is dense when its own label or the next one counts (``label_or_predictor``), or
            only its own (``label``, the paper's rule).
        lora_branch: the LoRA branch of sparse attention projections computes all channels (``dense``, the
            paper) or is zero on dropped ones (``sliced``, plain LoRA alone). On MLP projections it always follows the
            kept ones.
        exact: savings that change no number: True for all, False for none, or names out of ``activations``,
            ``adapters``, ``frozen_below``, ``last_layer``, ``logits``, ``norms``, ``padding``, ``recomputation`` and
            ``rotary``. Under ``padding`` the logits at padding are not the dense model's: a `compute_loss_func` of
            yours has to leave them out.
        dense_if_slower: run a layer dense when its shapes promise no gain from sparsity.
        kernels: ``auto``, ``torch`` or ``triton``.
        cuda_graphs: record what the decoder layers do with a batch and replay it for batches of the same shape, which
            an NVIDIA GPU that waits for its host gains from (README); in one process, and not with reentrant
            checkpointing. So that shapes repeat, a few of a batch's context tokens are dense.
        seed: seed of the randomised SVD, the ``random`` criterion and the statistics' reservoir.
        cache_dir: folder of the SVD cache; None is ``$SPARSELORA_CACHE`` or the user's cache folder.

    Raises:
        TypeError, ValueError: a field is of the wrong kind or out of range; the message names field, value and
            remedy.
    """

    mlp_sparsity: float | Mapping[str, float] = 0.0
    attention_sparsity: float | Mapping[str, float] = 0.0
    start_step: float | int = 0.05
    end_step: float | int = 1.0
    rank: int = 8
    criterion: str = "svd"
    score_tokens: int | None = None
    compensation: str = "none"
    compensation_rank: int = 32
    calibration_tokens: int = 2048
    token_rule: str = "label_or_predictor"
    lora_branch: str = "dense"
    exact: bool | tuple[str, ...] = True
    dense_if_slower: bool = True
    kernels: str = "auto"
    cuda_graphs: bool = False
    seed: int = 0
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        for field in ("mlp_sparsity", "attention_sparsity"):
            check_sparsity(field, getattr(self, field))
            self._set(field, _plain_sparsity(getattr(self, field)))
        for field, allowed in _CHOICES.items():
            check_choice(field, getattr(self, field), allowed)
        for field in ("rank", "compensation_rank", "calibration_tokens"):
            _check_positive(field, getattr(self, field))
        if self.score_tokens is not None:
            _check_positive("score_tokens", self.score_tokens)
        if type(self.seed) is not int:
            raise TypeError(f"seed: {self.seed!r} must be a whole number.")
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"seed: {self.seed} is not between 0 and {(1 << 32) - 1}.")
        for field in ("dense_if_slower", "cuda_graphs"):
            if not isinstance(getattr(self, field), bool):
                raise TypeError(f"{field}: {getattr(self, field)!r} must be True or False.")
        if self.cache_dir is not None:
            self._set("cache_dir", _plain_path(self.cache_dir))
        for field in ("start_step", "end_step"):
            _check_step(field, getattr(self, field))
            if isinstance(getattr(self, field), float):
                self._set(field, float(getattr(self, field)))
        if type(self.start_step) is type(self.end_step) and self.start_step > self.end_step:
            raise ValueError(
                f"start_step {self.start_step} is after end_step {self.end_step}: no step would be sparse. "
                "Make start_step the smaller one."
            )
        self._set("exact", _exact_names(self.exact))

    def _set(self, field: str, value: object) -> None:
        object.__setattr__(self, field, value)

    @property
    def is_sparse(self) -> bool:
        """Whether any layer may drop channels."""
        return any(
            any(value.values()) if isinstance(value, Mapping) else value > 0
            for value in (self.mlp_sparsity, self.attention_sparsity)
        )

    @property
    def needs_statistics(self) -> bool:
        """Whether dense steps must gather activations before sparsity can start."""
        return self.criterion in ("static", "output", "svd_whitened") or self.compensation != "none"

    def learns_as(self, other: "SparseLoraConfig") -> bool:
        """Whether dense steps gather the same under both, so that a checkpoint of one serves a run of the other."""
        mine, others = self.to_dict(), other.to_dict()
        return all(mine[field] == others[field] for field in _TEACHING)

    def layer_sparsity(self, num_layers: int) -> tuple[list[float], list[float]]:
        """MLP and attention sparsity per layer; raises ValueError where a layer does not exist."""
        return (
            per_layer_sparsity("mlp_sparsity", self.mlp_sparsity, num_layers),
            per_layer_sparsity("attention_sparsity", self.attention_sparsity, num_layers),
        )

    def replace(self, **changes: Any) -> "SparseLoraConfig":
        """A copy with some fields changed, checked anew.

        Raises:
            ValueError: an unknown field, or `preset`, which is not a field.
        """
        if "preset" in changes:  # every field has a value already, which would win over the preset's
            raise ValueError(
                f"preset: {changes['preset']!r} is no field to replace. SparseLoraConfig.from_preset(name, "
                "**settings) starts from a schedule."
            )
        return self.from_dict({**dataclasses.asdict(self), **changes})

    @classmethod
    def default(cls, num_layers: int, hidden: int) -> "SparseLoraConfig":
        """What `SparseLoraTrainer` uses for a model when it is told nothing.

        Channels that dense steps and the batch's output tokens show to matter, with a low-rank stand-in for the rest:
        on the small models that could be trained this costs far less quality than the paper's criterion at the same
        FLOPs. The lowest eighth of the layers and the last one stay dense, and attention too.

        Args:
            num_layers: decoder layers.
            hidden: width of the residual stream; the stand-in's rank is a sixteenth of it, from 8 to 256, and dense
                steps are sampled for as many tokens as it is wide, 2048 at least (Llama-3-8B: 0.9 GB until the fit).
        """
        first, last = max(1, num_layers // 8), num_layers - 2
        return cls(
            mlp_sparsity={f"{first}-{last}": 0.9} if last >= first else 0.0,
            criterion="output",
            compensation="low_rank",
            compensation_rank=min(256, max(8, hidden // 16)),
            calibration_tokens=max(2048, hidden),
        )

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "SparseLoraConfig":
        """A schedule of the paper by name, with fields overridden by keyword."""
        return cls.from_dict({**get_preset(name), **overrides})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SparseLoraConfig":
        """Build from a mapping; a key ``preset`` names a schedule that the other keys override.

        Raises:
            ValueError: an unknown key or preset.
        """
        values = dict(values)
        preset = values.pop("preset", None)
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(map(str, set(values) - set(known)))
        if unknown:
            raise ValueError(f"Unknown SparseLoRA setting {', '.join(unknown)}. Settings: preset, {', '.join(known)}.")
        if preset is not None:
            values = {**get_preset(preset), **values}
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: str | Path) -> "SparseLoraConfig":
        """Read a YAML file, or `sparselora_config.yaml` in a folder such as a checkpoint.

        Raises:
            OSError: no such file.
            ValueError: no YAML, or settings that `from_dict` refuses; the message names the file.
        """
        path = _settings_file(Path(path))
        values = read_settings(path)
        try:
            return cls.from_dict(values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values that YAML and JSON can hold."""
        values = dataclasses.asdict(self)
        values["exact"] = list(self.exact)
        return values

    def to_yaml(self, path: str | Path) -> Path:
        """Write all fields; a folder gets a file named `sparselora_config.yaml`. Returns the file's path.

        The file is written whole or not at all: half of it would read as other settings.
        """
        import yaml

        path = Path(path)
        path = path / CONFIG_FILE if path.is_dir() else path
        write_atomically(path, yaml.safe_dump(self.to_dict(), sort_keys=False).encode())
        return path


def _settings_file(path: Path) -> Path:
    return path / CONFIG_FILE if path.is_dir() else path


def read_settings(path: Path) -> dict[str, Any]:
    """Settings in a YAML file, or in `sparselora_config.yaml` in a folder, as they stand there.

    Raises:
        OSError: no such file.
        ValueError: no YAML, or no mapping; the message names the file.
    """
    import yaml

    path = _settings_file(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML, or damaged: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected settings as `name: value` lines, found {type(values).__name__}.")
    return values


def check_settings(value: object) -> None:
    """Raise TypeError where a `SparseLoraConfig` is wanted and something else was given."""
    if not isinstance(value, SparseLoraConfig):
        raise TypeError(
            f"SparseLoRA settings must be a SparseLoraConfig, got {value!r}. SparseLoraConfig.from_dict makes one of "
            "a mapping, from_preset of a schedule's name, from_yaml of a file or a checkpoint."
        )


def check_choice(field: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise ValueError where a value is none of those allowed."""
    if value not in allowed:
        raise ValueError(f"{field}: {value!r} is not one of {', '.join(allowed)}.")


def _check_positive(field: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{field}: {value!r} must be a whole number of at least 1.")


def _check_step(field: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise ValueError(f"{field}: {value!r} must be a fraction in [0, 1] (a float) or a step count (an int).")
    if value == math.inf:
        raise ValueError(f"{field}: {value!r} must be finite. 1.0 is the end of the run.")
    if isinstance(value, float) and value > 1:
        raise ValueError(f"{field}: the fraction {value!r} is above 1. Write steps as a whole number, {int(value)}.")


# Subclasses of float, paths and numbers of layers are fine as settings, but a file does not give them back: they
# become what it gives.


def _plain_sparsity(value: float | Mapping[str, float]) -> float | dict[str, float]:
    return {str(key): float(part) for key, part in value.items()} if isinstance(value, Mapping) else float(value)


def _plain_path(value: object) -> str:
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"cache_dir: {value!r} must be a path or None.")
    return os.fspath(value)


def _exact_names(value: object) -> tuple[str, ...]:
    if isinstance(value, bool):
        return EXACT_SAVINGS if value else ()
    if not isinstance(value, Iterable):
        raise TypeError(f"exact: {value!r} must be True, False or names.")
    names = (value,) if isinstance(value, str) else tuple(value)
    for name in names:
        check_choice("exact", name, EXACT_SAVINGS)
    return tuple(sorted(set(names)))
