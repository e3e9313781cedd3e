"""Arms of the accuracy study: each a row of a table, from which the configuration for a model follows."""

import dataclasses
from collections.abc import Iterable
from types import MappingProxyType
from typing import Any

from sparselora_hf import SparseLoraConfig
from sparselora_hf.criteria import CRITERIA

__all__ = ["ARMS", "Arm", "config_of", "select"]

SPANS = {
    "below_last": lambda n: range(n - 1),  # exact savings leave the last MLP no context to be sparse on
    "inner": lambda n: range(1, n - 1),
    "all": lambda n: range(n),
    "lower": lambda n: range((n - 1) // 2),
    "upper": lambda n: range((n - 1) - (n - 1) // 2, n - 1),
}
SLOPES = {"uniform": 0.0, "rising": 1.0, "falling": -1.0}  # of sparsity with depth
SPREAD = 0.9  # of the largest slope that keeps every sparsity below 1


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train.

    Args:
        group: the question that the arm helps to answer.
        mlp: sparsity of the MLPs in the span.
        attention: sparsity of the attention projections in the span.
        stand_in: rank of the low-rank stand-in, 0 for none.
        span: layers that are sparse, a name out of `SPANS`.
        slope: how sparsity changes with depth at the same mean, a name out of `SLOPES`.
        layers: sparsity of each MLP, lowest first, in place of `mlp`.
        study: a change that the package does not offer, a name out of `accuracy_ablations.STUDY`.
        micro_batch: rows of a micro-batch, whose tokens share their channel sets; None is the whole batch.
        longer: optimizer steps over those of the other arms, for comparisons at equal FLOPs.
        settings: further fields of `SparseLoraConfig`.
        trainer: ``sparse``; ``sft`` is the baseline and ``none`` trains nothing.
    """

    group: str
    mlp: float = 0.9
    attention: float = 0.0
    stand_in: int = 0
    span: str = "below_last"
    slope: str = "uniform"
    layers: tuple[float, ...] | None = None
    study: str | None = None
    micro_batch: int | None = None
    longer: float = 1.0
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    trainer: str = "sparse"


def config_of(arm: Arm, layers: int) -> SparseLoraConfig:
    """Configuration of an arm for a model with so many layers."""
    span = list(SPANS[arm.span](layers))
    mlp = _profile(arm.mlp, arm.slope, span) if arm.layers is None else dict(enumerate(arm.layers))
    stand_in = {"compensation": "low_rank", "compensation_rank": arm.stand_in} if arm.stand_in else {}
    return SparseLoraConfig(
        mlp_sparsity=mlp,
        attention_sparsity=_profile(arm.attention, arm.slope, span),
        dense_if_slower=False,  # models of this size gain no time: they are to be sparse all the same
        **stand_in,
        **arm.settings,
    )


def _profile(mean: float, slope: str, span: list[int]) -> dict[str, float]:
    """Sparsity per layer of the span, its mean given."""
    reach = SPREAD * SLOPES[slope] * min(mean, 1 - mean)
    steps = [2 * place / max(1, len(span) - 1) - 1 for place in range(len(span))]
    return {str(layer): round(mean + reach * step, 4) for layer, step in zip(span, steps, strict=True)}


def _criterion(name: str, group: str, **more: Any) -> Arm:
    return Arm(group, settings={"criterion": name, **more.pop("settings", {})}, **more)


def _static(group: str, stand_in: int, **more: Any) -> Arm:
    return _criterion("static", group, stand_in=stand_in, **more)


_MAIN = {
    "dense": Arm("main", mlp=0.0, trainer="sft"),
    "svd@0.9": _criterion("svd", "main"),
    "static+r8@0.9": _static("main", 8),
    "svd_mean@0.9": _criterion("svd_mean", "main"),
    "random@0.9": _criterion("random", "main"),
    "oracle@0.9": _criterion("oracle", "main"),
    "static+r32@0.97": _static("main", 32, mlp=0.97),
    "svd_whitened+r8@0.9": _criterion("svd_whitened", "main", stand_in=8),
    "output+r8@0.9": _criterion("output", "main", stand_in=8),
    "output+r32@0.9": _criterion("output", "main", stand_in=32),
    "static+r32@0.9": _static("main", 32),
}
_SCALE = {"untrained": Arm("scale", mlp=0.0, trainer="none"), "exact": Arm("scale", mlp=0.0)}
_MAPPING = {
    f"svd attention@{sparsity}{', reference mapping' if study else ''}": Arm(
        "mapping", mlp=0.0, attention=sparsity, study=study
    )
    for sparsity in (0.5, 0.75)
    for study in (None, "reference_mapping")
}
_WARM_UP = {
    f"{name}@0.9, {share:.0%} dense": Arm("warmup", **arm, settings={"criterion": criterion, "start_step": share})
    for name, criterion, arm in (("svd", "svd", {}), ("static+r8", "static", {"stand_in": 8}))
    for share in (0.0, 0.1, 0.2)
}
_CRITERIA = {f"{name}@0.9": _criterion(name, "criteria") for name in CRITERIA}
_CRITERIA |= {f"{name}+r8@0.9": _criterion(name, "criteria", stand_in=8) for name in CRITERIA}
_CURVE = {
    f"{name}@{sparsity}": Arm("curve", mlp=sparsity, **arm, settings={"criterion": criterion})
    for sparsity in (0.5, 0.75, 0.97, 0.99)
    for name, criterion, arm in (
        ("svd", "svd", {}),
        ("oracle", "oracle", {}),
        ("static+r8", "static", {"stand_in": 8}),
        ("static+r32", "static", {"stand_in": 32}),
    )
}
_RANK = {f"static+r{rank}@0.9": _static("rank", rank) for rank in (1, 2, 4, 16, 32)}
_RANK |= {f"svd@0.9, rank {rank}": _criterion("svd", "rank", settings={"rank": rank}) for rank in (1, 2, 4, 16, 32)}
_FAR = {
    "svd@0.9, inner layers": _criterion("svd", "far", span="inner"),
    "svd@0.9, all layers": _criterion("svd", "far", span="all"),
    "static+r8@0.9, all layers": _static("far", 8, span="all"),
    "static+r8, one channel": _static("far", 8, mlp=0.999),
    "static+r32, one channel": _static("far", 32, mlp=0.999),
    "svd@0.9, attention 0.75": _criterion("svd", "far", attention=0.75),
    "static+r8@0.9, attention 0.75": _static("far", 8, attention=0.75),
    "output+r8@0.9, attention 0.5": _criterion("output", "far", stand_in=8, attention=0.5),
    "output+r32@0.97, attention 0.5": _criterion("output", "far", stand_in=32, mlp=0.97, attention=0.5),
    "output+r32@0.97": _criterion("output", "far", stand_in=32, mlp=0.97),
    "output+r32@0.97, 8192 tokens": _criterion(
        "output", "far", stand_in=32, mlp=0.97, settings={"calibration_tokens": 8192}
    ),
    "output+r8@0.9, 8192 tokens": _criterion("output", "far", stand_in=8, settings={"calibration_tokens": 8192}),
    "output+r16@0.9": _criterion("output", "far", stand_in=16),
    "static+r32@0.97, attention 0.75": _static("far", 32, mlp=0.97, attention=0.75),
}
_EQUAL_FLOPS = {  # 75 % context, 5 layers: about the dense run's linear FLOPs
    "svd@0.9, equal FLOPs": _criterion("svd", "equal FLOPs", longer=2.14),
    "static+r8@0.9, equal FLOPs": _static("equal FLOPs", 8, longer=2.16),
    "svd_whitened+r8@0.9, equal FLOPs": _criterion("svd_whitened", "equal FLOPs", stand_in=8, longer=2.11),
}
_DEPTH = {
    "svd@0.9, lower layers": _criterion("svd", "depth", span="lower"),
    "svd@0.9, upper layers": _criterion("svd", "depth", span="upper"),
    "svd@0.9, rising": _criterion("svd", "depth", slope="rising"),
    "svd@0.9, falling": _criterion("svd", "depth", slope="falling"),
    "static+r8@0.9, rising": _static("depth", 8, slope="rising"),
    "static+r8@0.9, falling": _static("depth", 8, slope="falling"),
}
_TOKENS = {
    "svd@0.9, token rule label": _criterion("svd", "tokens", settings={"token_rule": "label"}),
    "svd@0.9, output tokens alone": _criterion("svd", "tokens", study="sparse_outputs_alone"),
    "svd@0.9, output tokens too": _criterion("svd", "tokens", study="sparse_outputs_too"),
    "static+r8@0.9, output tokens too": _static("tokens", 8, study="sparse_outputs_too"),
    "svd@0.9, 64 tokens scored": _criterion("svd", "tokens", settings={"score_tokens": 64}),
    "svd@0.9, a set per sequence": _criterion("svd", "tokens", micro_batch=1),
    "svd@0.9, a set for 10 batches": _criterion("svd", "tokens", study="held_sets"),
    "oracle@0.9, a set per sequence": _criterion("oracle", "tokens", micro_batch=1),
}
_QLORA = {
    f"static+r{rank}@{sparsity}, inner layers": _static("qlora", rank, span="inner", mlp=sparsity)
    for rank, sparsity in ((8, 0.9), (32, 0.9), (32, 0.75))
}
_ATTENTION = {
    "svd attention@0.75, RoPE pairs": Arm("attention", mlp=0.0, attention=0.75, study="rope_pairs"),
    "svd attention@0.75, QK alone": Arm("attention", mlp=0.0, attention=0.75, study="qk_alone"),
    "svd attention@0.75, VO alone": Arm("attention", mlp=0.0, attention=0.75, study="vo_alone"),
    "svd attention@0.75, sliced branch": Arm("attention", mlp=0.0, attention=0.75, settings={"lora_branch": "sliced"}),
}
_ATTENTION |= {
    f"output{f'+r{rank}' if rank else ''} attention@{sparsity}": _criterion(
        "output", "attention", stand_in=rank, mlp=0.0, attention=sparsity
    )
    for sparsity in (0.5, 0.75)
    for rank in (0, 8, 32)
}

_GROUPS = (
    _CRITERIA,
    _SCALE,
    _MAPPING,
    _WARM_UP,
    _CURVE,
    _RANK,
    _FAR,
    _EQUAL_FLOPS,
    _DEPTH,
    _TOKENS,
    _QLORA,
    _ATTENTION,
)
ARMS = MappingProxyType(_MAIN | {name: arm for group in _GROUPS for name, arm in group.items()} | _MAIN)
"""All arms by name, the main ones first; one that stands in several groups belongs to main, or to the last."""


def select(wanted: Iterable[str]) -> list[str]:
    """Names of the arms that are named, or whose group is.

    Raises:
        ValueError: neither an arm nor a group.
    """
    found: list[str] = []
    for name in wanted:
        names = [name] if name in ARMS else [arm for arm, row in ARMS.items() if row.group == name]
        if not names:
            groups = sorted({arm.group for arm in ARMS.values()})
            raise ValueError(f"{name!r} is no arm and no group of arms. Groups: {', '.join(groups)}; arms: --list.")
        found += names
    return list(dict.fromkeys(found))
