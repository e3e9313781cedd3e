"""Never slower: whether sparsity pays for a part of a layer, from shapes alone.

A sparse part saves products and costs gathers, scatters and launches. Both are put into FLOPs of the device's dense
product: a fixed number per call and one for every row and hidden channel that is moved. Shapes decide and no clock
does, so a run repeats and resumes with the same numbers.
"""

import dataclasses

from .channels import HeadLayout

__all__ = ["Worth", "attention_worth", "mlp_worth"]

# Dense FLOPs that one call, and one element [row, hidden] of a part, could have done in the time of the overhead.
# CPU: measured on one core in float32 at 150 GFLOP/s, widths 128 to 1024: an MLP call 0.7 ms and 11 ns an element,
# an attention call 1.3 ms and 10 to 21 ns an element.
# CUDA: measured on an H200 in bf16 at 700 TFLOP/s, Llama-3-8B's layers over 4096 tokens, 3072 of them context. In a
# trace the host spent 1.1 ms more on an MLP call and some 2 ms on attention's, which is what the device waits for in
# small batches; launches have become cheaper since, so this errs towards dense. On the device an MLP call takes 0.3 ms
# beside what it saves; attention at sparsity 0.75 takes 1.1 ms where its products save 0.55.
_FIXED = {"cpu": {"mlp": 1.1e8, "attention": 2e8}, "cuda": {"mlp": 8e11, "attention": 1.5e12}}
_PER_ELEMENT = {"cpu": {"mlp": 1600.0, "attention": 3500.0}, "cuda": {"mlp": 1.3e4, "attention": 4.7e4}}


@dataclasses.dataclass(frozen=True)
class Worth:
    """Balance of one part of a layer, in FLOPs forward and backward.

    Args:
        saved: per context token.
        fixed: overhead per call.
        per_row: overhead per row of the batch.
    """

    saved: float
    fixed: float
    per_row: float

    def pays(self, context: int, rows: int) -> bool:
        """Whether a batch with so many context tokens, in so many rows, is faster sparse."""
        return self.saved * context > self.fixed + self.per_row * rows

    @property
    def ever(self) -> bool:
        """Whether any batch could be faster sparse."""
        return self.saved > self.per_row


def mlp_worth(hidden: int, width: int, keep: int, rank: int, device_type: str, matrices: int = 3) -> Worth:
    """Balance of an MLP of 3 (gated) or 2 matrices that keeps ``keep`` of ``width`` channels beside a stand-in."""
    saved = 4.0 * hidden * (matrices * (width - keep) - 2 * rank)
    return _worth(saved, "mlp", hidden, device_type)


def attention_worth(
    hidden: int, layout: HeadLayout, keep: int, device_type: str, pairs: int = 2, rank: int = 0
) -> Worth:
    """Balance of the projections of an attention module that keeps ``keep`` kv channels.

    `pairs` is 2 where q and k drop channels beside v and o, and 1 where v and o alone do; `rank` is of the factors
    that stand in for them.
    """
    widths = (1 + layout.groups) * layout.kv_width
    dropped = (1 + layout.groups) * (layout.kv_width - keep)
    saved = 4.0 * pairs * (hidden * dropped - rank * (2 * hidden + widths))
    return _worth(saved, "attention", hidden, device_type)


def _worth(saved: float, part: str, hidden: int, device_type: str) -> Worth:
    kind = device_type if device_type in _FIXED else "cuda"
    return Worth(saved, _FIXED[kind][part], _PER_ELEMENT[kind][part] * hidden)
