"""Never slower: whether sparsity pays for a part of a layer, from shapes alone.

A sparse part saves products and costs gathers, scatters and launches. Both are put into FLOPs of the device's dense
product: a fixed number per call and one for every row and hidden channel that is moved. Shapes and the kind of chip
decide and no clock does, so a run repeats and resumes with the same numbers.
"""

import dataclasses
import functools

import torch

from .channels import HeadLayout

__all__ = ["Worth", "attention_worth", "mlp_worth", "relative_rate"]

# Dense FLOPs that one call, and one element [row, hidden] of a part, could have done in the time of the overhead.
# CPU: measured on one core in float32 at 150 GFLOP/s, widths 128 to 1024: an MLP call 0.7 ms and 11 ns an element,
# an attention call 1.3 ms and 10 to 21 ns an element.
# CUDA: measured on an H200 in bf16 at 700 TFLOP/s, Llama-3-8B's layers over 4096 tokens, 3072 of them context. In a
# trace the host spent 1.1 ms more on an MLP call and some 2 ms on attention's, which is what the device waits for in
# small batches; launches have become cheaper since, so this errs towards dense. On the device an MLP call takes 0.3 ms
# beside what it saves; attention at sparsity 0.75 takes 1.1 ms where its products save 0.55.
_FIXED = {"cpu": {"mlp": 1.1e8, "attention": 2e8}, "cuda": {"mlp": 8e11, "attention": 1.5e12}}
_PER_ELEMENT = {"cpu": {"mlp": 1600.0, "attention": 3500.0}, "cuda": {"mlp": 1.3e4, "attention": 4.7e4}}

# What a call costs is the host's time, in which a smaller GPU does fewer FLOPs; not measured on any but the H200. What
# an element costs is the memory's time, which is in about the same ratio to that of products on all of them.
# FLOPs of 16-bit products per clock of a processor, by compute capability, from NVIDIA's descriptions of the chips;
# for 8.6, 8.9 and 12.x the higher of two rates, which errs towards dense, as that of 10.x does for chips unknown here
_PER_CLOCK = {(7, 0): 1024, (7, 5): 1024, (8, 0): 2048, (8, 6): 1024, (8, 7): 2048, (8, 9): 1024, (9, 0): 4096}
_PER_CLOCK |= {(10, 0): 8192, (10, 3): 8192, (12, 0): 1024, (12, 1): 1024}
_H200 = 132 * _PER_CLOCK[9, 0]


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


@functools.cache
def relative_rate(device: torch.device) -> float:
    """FLOPs that a GPU does in the time in which an H200 does one, by its processors; 1 for what is not NVIDIA's."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 1.0
    chip = torch.cuda.get_device_properties(device)
    per_clock = _PER_CLOCK.get((chip.major, chip.minor), max(_PER_CLOCK.values()))
    return per_clock * chip.multi_processor_count / _H200


def mlp_worth(
    hidden: int, width: int, keep: int, rank: int, device_type: str, matrices: int = 3, rate: float = 1.0
) -> Worth:
    """Balance of an MLP of 3 (gated) or 2 matrices that keeps ``keep`` of ``width`` channels beside a stand-in.

    `rate` is the device's `relative_rate`.
    """
    saved = 4.0 * hidden * (matrices * (width - keep) - 2 * rank)
    return _worth(saved, "mlp", hidden, device_type, rate)


def attention_worth(
    hidden: int, layout: HeadLayout, keep: int, device_type: str, pairs: int = 2, rank: int = 0, rate: float = 1.0
) -> Worth:
    """Balance of the projections of an attention module that keeps ``keep`` kv channels.

    `pairs` is 2 where q and k drop channels beside v and o, and 1 where v and o alone do; `rank` is of the factors
    that stand in for them, `rate` the device's `relative_rate`.
    """
    widths = (1 + layout.groups) * layout.kv_width
    dropped = (1 + layout.groups) * (layout.kv_width - keep)
    saved = 4.0 * pairs * (hidden * dropped - rank * (2 * hidden + widths))
    return _worth(saved, "attention", hidden, device_type, rate)


def _worth(saved: float, part: str, hidden: int, device_type: str, rate: float) -> Worth:
    kind = device_type if device_type in _FIXED else "cuda"
    return Worth(saved, rate * _FIXED[kind][part], _PER_ELEMENT[kind][part] * hidden)
