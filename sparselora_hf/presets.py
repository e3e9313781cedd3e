"""The paper's schedules by name (arXiv 2506.16500, appendix on configurations).

Each preset gives the sparsity per layer and the share of dense warm-up steps, nothing else: the estimator
settings are the paper's own, rank 8 and all context tokens scored.
"""

from types import MappingProxyType

__all__ = ["PRESETS", "get_preset"]

_UPPER_HALF = "14-19, 21-23, 25-29"  # layers 14 to 29 without 20 and 24
_FROM_17 = "17-19, 21-23, 25-29"  # layers 17 to 29 without 20 and 24


def _schedule(mlp: dict, attention: dict | float, start: float = 0.05) -> MappingProxyType:
    return MappingProxyType(
        {"mlp_sparsity": mlp, "attention_sparsity": attention, "start_step": start}
        | {"criterion": "svd", "rank": 8, "compensation": "none"}
    )


PRESETS = MappingProxyType(
    {
        "llama-3-8b-math": _schedule({"3-30": 0.99}, {_UPPER_HALF: 0.75}),
        "llama-3.1-8b-code": _schedule({"3-30": 0.99}, {_UPPER_HALF: 0.4}),
        "llama-3.1-8b-wizard": _schedule({"3-30": 0.99}, {_UPPER_HALF: 0.4}),
        "llama-2-7b-code": _schedule({"3-30": 0.99}, {_UPPER_HALF: 0.25}),
        "llama-3-8b-csr": _schedule({"17-30": 0.97}, {_FROM_17: 0.2}),
        "llama-2-7b-csr": _schedule({"13-29": 0.9}, {_FROM_17: 0.5}),
        "llama-2-7b-math": _schedule({"13-29": 0.9}, {_FROM_17: 0.6}),
        "llama-2-13b-csr": _schedule({"13-36": 0.97}, {"17-36": 0.2}, start=0.1),
        "llama-2-13b-math": _schedule({"13-36": 0.97}, {"17-36": 0.25}),
        "llama-3-8b-glue": _schedule({"17-30": 0.95, "31": 0.5}, {"17-29": 0.75}),
        "llama-3.1-8b-arc-agi": _schedule({"16-29": 0.9}, 0.0, start=0.1),
    }
)


def get_preset(name: str) -> dict:
    """Settings of a preset, as keyword arguments of `SparseLoraConfig`.

    Raises:
        ValueError: no preset of that name; the message lists those there are.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"There is no preset {name!r}. Presets: {', '.join(sorted(PRESETS))}.")
    return dict(PRESETS[name])
