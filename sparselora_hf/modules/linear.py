"""A frozen linear that computes all channels for output rows and the kept ones for context rows."""

import torch
from torch import nn

from ..hooks import has_hooks
from ..ops.context import ContextPart, add_stand_in, context_linear, stand_in_factors
from ..ops.projection import Frozen, MixedRows, projections
from ..ops.quant import frozen_weight
from ..ops.rows import fork_rows, overlay_rows
from ..state import Rows
from .classes import Patched, has_own_forward, link_of

__all__ = ["SparseLinear", "is_bare", "mixed_rows", "product_type"]

_AUTOCAST = {torch.float32, torch.float16, torch.bfloat16}  # what autocast casts; it leaves float64 alone


class SparseLinear(Patched):
    """Mixin for the base linear of a q, k, v, fused qkv or o projection.

    Only products are dropped: a bias costs nothing and is added to every channel of every row.
    """

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """``[..., in]`` to ``[..., out]``; rows that the batch does not need come back as zero."""
        rows = _rows(self, x)
        if rows is None or self.weight.requires_grad:  # unfrozen since: the sparse product gives it no gradient
            return self.dense_forward(x, *args, **kwargs)
        dtype = product_type(x, self.weight)
        if not (args or kwargs) and is_bare(self, dtype):
            return projections(x, [Frozen(self.weight, self.bias, rows=_mixed(self, rows, dtype))], dtype)[0]
        flat = x.reshape(-1, x.shape[-1])
        whole, few = fork_rows(flat, rows.dense, apart=True)
        y_dense = self.dense_forward(few, *args, **kwargs)
        # a 4-bit linear computes in a type of its own and answers in that of its input
        y = self._context(whole, rows).to(y_dense.dtype)
        y = overlay_rows(y, y_dense, rows.dense, apart=True)
        # as a linear does it: an adapter's branch may be added in place, which on a view would copy gradients
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))

    def _context(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """All rows ``[T, out]``, of which the context rows alone are computed."""
        part, stand_in = _part(self, rows), _stand_in(self, rows)
        y = context_linear(x, frozen_weight(self), self.bias, part)
        return y if stand_in is None else add_stand_in(y, x, part.index, *stand_in, over_outputs=part.over_outputs)


def _rows(module: SparseLinear, x: torch.Tensor) -> Rows | None:
    link = link_of(module)
    if link.role == "o" and link.state.config.compensation == "low_rank":
        link.observe("o", x)
    return link.rows(x, module.training)


def _part(module: SparseLinear, rows: Rows) -> ContextPart:
    link, covered = link_of(module), len(rows.dense) + len(rows.sparse)
    # where there is no context row, no channel set was chosen
    index = link.channels() if len(rows.sparse) else rows.sparse
    return ContextPart(rows.sparse, index, link.role != "o", covered, link.state.config.kernels)


def _stand_in(module: SparseLinear, rows: Rows) -> tuple[torch.Tensor, torch.Tensor] | None:
    link = link_of(module)
    factors = link.state.calibration.factor_stand_ins.get((link.layer, link.role))
    return None if factors is None or not len(rows.sparse) else (factors.down, factors.up)


def _mixed(module: SparseLinear, rows: Rows, dtype: torch.dtype) -> MixedRows:
    part, stand_in = _part(module, rows), _stand_in(module, rows)
    if stand_in is not None:
        stand_in = stand_in_factors(part.index, *stand_in, over_outputs=part.over_outputs)
        stand_in = tuple(factor.to(dtype) for factor in stand_in)
    return MixedRows(rows.dense, part, stand_in)


def mixed_rows(module: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> MixedRows | None:
    """How a linear treats the rows of its input ``x`` now; None where all have all channels."""
    rows = _rows(module, x) if isinstance(module, SparseLinear) else None
    return None if rows is None else _mixed(module, rows, dtype)


def product_type(*tensors: torch.Tensor) -> torch.dtype | None:
    """Type in which a linear multiplies these: autocast's, or the one that all have; None where they differ."""
    types, kind = {tensor.dtype for tensor in tensors}, tensors[0].device.type
    if torch.is_autocast_enabled(kind) and types <= _AUTOCAST:
        return torch.get_autocast_dtype(kind)
    return types.pop() if len(types) == 1 else None


def is_bare(linear: nn.Module, dtype: torch.dtype | None) -> bool:
    """Whether a linear is nothing but a product with a frozen weight of this type that nobody watches."""
    if (linear._dense_class if isinstance(linear, Patched) else type(linear)) is not nn.Linear:
        return False
    if has_hooks(linear) or has_own_forward(linear):
        return False
    own = linear._parameters  # not by `nn.Module.__getattr__`, which costs more than all else here
    return _is_frozen(own["weight"], dtype) and _is_frozen(own["bias"], dtype)


def _is_frozen(parameter: torch.Tensor | None, dtype: torch.dtype | None) -> bool:
    return parameter is None or (parameter.dtype is dtype and not parameter.requires_grad)
