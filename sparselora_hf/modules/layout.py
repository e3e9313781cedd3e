"""Keeps 4-bit weights on a CPU in the layout that has gradients, for as long as a model is sparse."""

from torch import nn

__all__ = ["TrainingLayout"]

_FLAG = "support_avx512bf16_for_cpu"


class TrainingLayout:
    """Tells the 4-bit linears of a model not to repack their weights.

    On a CPU with bf16 instructions bitsandbytes (0.50) repacks a weight at its first forward in evaluation mode, with
    scales rounded to bf16, and products with it have no gradient from then on: training on after an evaluation would
    be silently in vain.
    """

    def __init__(self, model: nn.Module) -> None:
        self._before = [(module, module.__dict__[_FLAG]) for module in model.modules() if _FLAG in module.__dict__]
        for linear, _ in self._before:
            linear.__dict__[_FLAG] = False

    def remove(self) -> None:
        """Let them do as they would again."""
        for linear, repacks in self._before:
            linear.__dict__[_FLAG] = repacks
