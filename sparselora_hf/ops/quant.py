"""Frozen weights as they lie in memory: some rows, some columns or the whole of one, as a plain tensor.

`frozen_weight` gives what the sparse products are handed: the tensor itself, or a `QuantisedWeight` over the packed
data of a bitsandbytes linear, which dequantises no more than it is asked for. Nothing here keeps what it dequantised.

A 4-bit weight ``[out, in]`` is packed along its rows, two values a byte, with one scale for each block of values.
Where ``in`` is a multiple of the block, a row is a row of bytes and a row of scales, and dequantising gathered rows
gives the same bits as gathering dequantised ones. Double quantisation stores the scales in 8 bits, with a scale of
their own for every 256 of them.
"""

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import nn

__all__ = [
    "FrozenWeight",
    "QuantisedRows",
    "QuantisedWeight",
    "Weight4bit",
    "Weight8bit",
    "frozen_weight",
    "is_repacked",
    "is_stored_packed",
    "read_columns",
    "read_rows",
    "read_whole",
    "why_unreadable",
]

# the share of columns from which one pass over everything is faster than unpacking single ones: 1024 x 3584 on a CPU,
# a tenth of the columns 1.7 against 2.0 ms, a fifth 3.5 against 2.1 ms
_FEW_COLUMNS = 1 / 8


class QuantisedWeight(ABC):
    """A weight ``[out, in]`` stored in few bits.

    Attributes:
        product: type of products with it; None is that of the input.
    """

    product: torch.dtype | None

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """``[out, in]``."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the packed data is."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of what is derived from it where there is no input to go by."""
        return self.product or torch.float32

    @abstractmethod
    def rows(self, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows ``index`` ``[K]``: ``[K, in]``."""

    @abstractmethod
    def columns(self, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Columns ``index`` ``[K]``: ``[out, K]``."""

    @abstractmethod
    def whole(self, dtype: torch.dtype) -> torch.Tensor:
        """All of it."""

    @abstractmethod
    def tensors(self) -> list[torch.Tensor]:
        """What is stored, for a fingerprint."""


@dataclasses.dataclass(frozen=True)
class Weight4bit(QuantisedWeight):
    """NF4 or FP4 of bitsandbytes, with or without double quantisation.

    Args:
        packed: bytes, two values each.
        state: bitsandbytes' `QuantState`: scales, block size and kind.
        product: type of products.
    """

    packed: torch.Tensor
    state: object
    product: torch.dtype | None

    @classmethod
    def of(cls, linear: nn.Module) -> "Weight4bit":
        """The weight of a `Linear4bit`."""
        return cls(linear.weight.data.view(torch.uint8).view(-1), linear.weight.quant_state, linear.compute_dtype)

    @staticmethod
    def is_quantised(linear: nn.Module) -> bool:
        """Whether there are scales yet: a `Linear4bit` quantises when it is moved to its device."""
        return linear.weight.quant_state is not None

    @property
    def shape(self) -> torch.Size:
        """``[out, in]``."""
        return self.state.shape

    @property
    def device(self) -> torch.device:
        """Where the packed data is."""
        return self.packed.device

    @property
    def _in_rows(self) -> bool:
        """Whether no block and no byte reaches over the end of a row."""
        return self.shape[1] % self.state.blocksize == 0

    def rows(self, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows ``index`` ``[K]``: ``[K, in]``; no other row is read where the layout allows."""
        if not self._in_rows:
            return self.whole(dtype).index_select(0, index)
        packed = self.packed.view(self.shape[0], -1).index_select(0, index)
        blocks = torch.arange(self.shape[1] // self.state.blocksize, device=index.device)
        scales = self.scales(index[:, None] * len(blocks) + blocks)
        return self._dequantise(packed, scales, (len(index), self.shape[1]), dtype)

    def columns(self, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Columns ``index`` ``[K]``: ``[out, K]``; few of them are unpacked one by one where the layout allows."""
        if not self._in_rows or len(index) > _FEW_COLUMNS * self.shape[1]:
            return self.whole(dtype).index_select(1, index)
        packed = self.packed.view(self.shape[0], -1).index_select(1, index // 2)
        values = packed >> (4 * (1 - index % 2)).to(torch.uint8) & 15  # the even column is the high half of a byte
        scales = self.scales().view(self.shape[0], -1).index_select(1, index // self.state.blocksize)
        return (self.state.code.index_select(0, values.view(-1).int()).view(values.shape) * scales).to(dtype)

    def whole(self, dtype: torch.dtype) -> torch.Tensor:
        """All of it."""
        return self._dequantise(self.packed, self.scales(), self.shape, dtype)

    def scales(self, blocks: torch.Tensor | None = None) -> torch.Tensor:
        """Scales of the blocks by number, of all without it, in float32."""
        state = self.state
        scales = state.absmax if blocks is None else state.absmax[blocks]
        if not state.nested:
            return scales
        if blocks is None:
            blocks = torch.arange(len(scales), device=scales.device)
        return state.state2.code[scales.int()] * state.state2.absmax[blocks // state.state2.blocksize] + state.offset

    def _dequantise(
        self, packed: torch.Tensor, scales: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype
    ) -> torch.Tensor:
        from bitsandbytes.functional import QuantState, dequantize_4bit

        if not packed.numel():  # a launch of no blocks is an error to CUDA, with which bitsandbytes ends the process
            return scales.new_empty(shape, dtype=dtype)
        state = self.state
        plain = QuantState(scales.view(-1), torch.Size(shape), state.code, state.blocksize, state.quant_type, dtype)
        return dequantize_4bit(packed.view(-1, 1), plain)  # a single row would come back transposed

    def tensors(self) -> list[torch.Tensor]:
        """What is stored, for a fingerprint."""
        state = self.state
        nested = [state.state2.absmax, state.state2.code, state.offset] if state.nested else []
        packed, scales = self.packed, state.absmax
        if self._in_rows:
            packed, scales = (part.view(self.shape[0], -1) for part in (packed, scales))
        return [packed, state.code, scales, *nested]


@dataclasses.dataclass(frozen=True)
class Weight8bit(QuantisedWeight):
    """LLM.int8() of bitsandbytes, which has one scale a row.

    Args:
        values: int8 ``[out, in]``.
        scales: largest magnitude of each row, ``[out]``.
    """

    values: torch.Tensor
    scales: torch.Tensor
    product = None

    @classmethod
    def of(cls, linear: nn.Module) -> "Weight8bit":
        """The weight of a `Linear8bitLt`, whose scales its first forward moves from the weight to the module."""
        scales = linear.weight.SCB if linear.weight.SCB is not None else linear.state.SCB
        return cls(linear.weight.data, scales)

    @staticmethod
    def is_quantised(linear: nn.Module) -> bool:
        """Whether the weight is int8: with ``has_fp16_weights`` it never is."""
        return linear.weight.dtype == torch.int8

    @property
    def shape(self) -> torch.Size:
        """``[out, in]``."""
        return self.values.shape

    @property
    def device(self) -> torch.device:
        """Where the packed data is."""
        return self.values.device

    def rows(self, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows ``index`` ``[K]``: ``[K, in]``."""
        return _scaled(self.values.index_select(0, index), self.scales.index_select(0, index), dtype)

    def columns(self, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Columns ``index`` ``[K]``: ``[out, K]``."""
        return _scaled(self.values.index_select(1, index), self.scales, dtype)

    def whole(self, dtype: torch.dtype) -> torch.Tensor:
        """All of it."""
        return _scaled(self.values, self.scales, dtype)

    def tensors(self) -> list[torch.Tensor]:
        """What is stored, for a fingerprint."""
        return [self.values, self.scales]


def _scaled(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # in place and in this order: the bits that bitsandbytes multiplies with
    return values.to(dtype, copy=True).mul_((scales * (1.0 / 127.0))[:, None])


@dataclasses.dataclass(frozen=True)
class QuantisedRows(QuantisedWeight):
    """Some rows of a quantised weight: one role's share of a fused linear.

    Args:
        weight: the fused weight.
        pick: row numbers of the share ``[K]`` to those of the fused weight.
        count: rows of the share.
    """

    weight: QuantisedWeight
    pick: Callable[[torch.Tensor], torch.Tensor]
    count: int

    @property
    def product(self) -> torch.dtype | None:
        """Type of products."""
        return self.weight.product

    @property
    def shape(self) -> torch.Size:
        """``[out, in]``."""
        return torch.Size((self.count, self.weight.shape[1]))

    @property
    def device(self) -> torch.device:
        """Where the packed data is."""
        return self.weight.device

    def rows(self, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows ``index`` ``[K]``: ``[K, in]``."""
        return self.weight.rows(self.pick(index), dtype)

    def columns(self, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Columns ``index`` ``[K]``: ``[out, K]``."""
        return self.weight.columns(index, dtype).index_select(0, self._all())

    def whole(self, dtype: torch.dtype) -> torch.Tensor:
        """All of it."""
        return self.weight.rows(self._all(), dtype)

    def _all(self) -> torch.Tensor:
        return self.pick(torch.arange(self.count, device=self.device))

    def tensors(self) -> list[torch.Tensor]:
        """What is stored, for a fingerprint: of the whole, and which rows."""
        return [*self.weight.tensors(), self._all()]


FrozenWeight = torch.Tensor | QuantisedWeight

_QUANTISED: dict[str, type[Weight4bit | Weight8bit]] = {
    "bitsandbytes.nn.modules.Linear4bit": Weight4bit,
    "bitsandbytes.nn.modules.Linear8bitLt": Weight8bit,
}


def _kind(linear: nn.Module) -> type[Weight4bit | Weight8bit] | None:
    return _kind_of(type(linear))


@functools.cache
def _kind_of(cls: type) -> type[Weight4bit | Weight8bit] | None:
    # by name: bitsandbytes is not imported before a model needs it
    names = (f"{base.__module__}.{base.__qualname__}" for base in cls.__mro__)
    return next((_QUANTISED[name] for name in names if name in _QUANTISED), None)


def frozen_weight(linear: nn.Module) -> FrozenWeight:
    """The weight of a frozen linear as the sparse products take it: the tensor, or a view of the quantised one."""
    kind = _kind(linear)
    return linear.weight.detach() if kind is None else kind.of(linear)


def why_unreadable(linear: nn.Module) -> str:
    """Reason why the weight of a linear cannot be read by rows and columns; empty where it can."""
    name, kind = type(linear).__name__, _kind(linear)
    if kind is not None:
        return "" if kind.is_quantised(linear) else f"a {name} whose weight is not quantised yet"
    hint = "of quantised weights, those of bitsandbytes alone can be sparse"
    if not isinstance(linear, nn.Linear):
        return f"a {name}, not a plain linear: {hint}"
    if type(linear) is not nn.Linear:
        return f"a {name}, not a plain linear"
    weight = getattr(linear, "weight", None)
    if weight is None:
        return f"a linear without a weight: {hint}"
    kind = type(weight)
    if kind.__module__.startswith("torchao."):
        return f"a linear with a {kind.__name__}: {hint}"
    if not weight.is_floating_point() or weight.dtype.itemsize == 1:  # as compressed-tensors keeps them
        return f"a linear with a weight in {str(weight.dtype).removeprefix('torch.')}: {hint}"
    return ""


def is_stored_packed(linear: nn.Module) -> bool:
    """Whether the weight of a linear is one of bitsandbytes, whose bytes may be stored as if they were floats."""
    return _kind(linear) is not None


def is_repacked(linear: nn.Module) -> bool:
    """Whether bitsandbytes has turned a 4-bit weight into the layout of its CPU kernel for inference."""
    # an attribute that only repacking sets
    return _kind(linear) is Weight4bit and bool(vars(linear.weight.quant_state).get("packing_format_for_cpu"))


def read_rows(weight: FrozenWeight, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows ``index`` ``[K]`` of a weight ``[out, in]`` in a type: ``[K, in]``."""
    if isinstance(weight, QuantisedWeight):
        return weight.rows(index, dtype)
    return weight.index_select(0, index).to(dtype)


def read_columns(weight: FrozenWeight, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Columns ``index`` ``[K]`` of a weight ``[out, in]`` in a type: ``[out, K]``."""
    if isinstance(weight, QuantisedWeight):
        return weight.columns(index, dtype)
    return weight.index_select(1, index).to(dtype)


def read_whole(weight: FrozenWeight, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A weight ``[out, in]`` in a type, by default its own."""
    if isinstance(weight, QuantisedWeight):
        return weight.whole(dtype or weight.dtype)
    return weight.to(dtype or weight.dtype)
