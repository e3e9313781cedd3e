"""Running totals of what sparsity did, for the Trainer's log."""

import dataclasses
import time

from .cost import BatchShape, LoraShape, ModelShape, layer_cost, step_cost
from .plan import TokenPlan
from .worth import Worth

__all__ = ["Meter", "MeteredPart"]

_KINDS = ("context", "output", "padding", "loss")


@dataclasses.dataclass(frozen=True)
class MeteredPart:
    """MLP or attention of one layer: its width, the channels it keeps and when that pays (None: always).

    A part that is never sparse keeps its width; what is no attention with projections has none.
    """

    width: int
    keep: int
    worth: Worth | None = None

    def pays(self, context: int, rows: int) -> bool:
        """Whether the part is sparse for a batch."""
        return self.keep < self.width and (self.worth is None or self.worth.pays(context, rows))


class Meter:
    """Tokens, context tokens and linear FLOPs since the last reading.

    Linear FLOPs are a sum over tokens, so the cost model is asked once per kind of token and kind of step; counting a
    batch is then a handful of multiplications, and nothing waits for the device.

    Args:
        model: shape of the model.
        rank: rank of the stand-ins for dropped channels, which count too; 0 is none.

    Attributes:
        mlp: MLP of each layer.
        attention: attention of each layer.
    """

    def __init__(self, model: ModelShape, rank: int = 0) -> None:
        self.model = model
        self.rank = rank
        self.mlp: list[MeteredPart] = []
        self.attention: list[MeteredPart] = []
        self._prices: dict[tuple[tuple[bool, ...], frozenset[str], frozenset[str]], list[float]] = {}
        self.reset()

    def reset(self) -> None:
        """Start counting anew; the clock runs from the first batch on."""
        self.tokens = self.context = 0
        self.dense_flops = self.flops = self.sparsity = 0.0
        self.batches = 0
        self.since: float | None = None
        self.stopped: float | None = None

    def stop(self) -> None:
        """A step has ended: what follows may be no training."""
        self.stopped = time.perf_counter()

    def leave_out(self) -> None:
        """Evaluating or saving has ended: the time since `stop`, or since the last reading, does not count."""
        now = time.perf_counter()
        if self.since is not None and self.stopped is not None:
            self.since += now - self.stopped
            self.stopped = now

    def add(
        self, plan: TokenPlan, sparse: bool, savings: frozenset[str], too_few: frozenset[str] = frozenset()
    ) -> bool:
        """Count one micro-batch.

        Args:
            plan: its token plan.
            sparse: whether parts drop channels that can.
            savings: names of the exact savings in force.
            too_few: those of them whose rows are too few for dense parts to leave out; sparse ones do without padding.

        Returns:
            Whether some parts can drop channels, and the batch is too small for any of them.
        """
        if self.since is None:
            self.since = time.perf_counter()
        rows, parts = plan.shape[0] * plan.shape[1], [*self.mlp, *self.attention]
        counts = (len(plan.context), len(plan.output), rows - plan.tokens, len(plan.loss))
        pays = tuple(sparse and part.pays(len(plan.context), rows) for part in parts)
        able = [part for part in parts if part.keep < part.width]
        dropped = sum(1 - part.keep / part.width for part, paid in zip(parts, pays, strict=True) if paid)
        self.sparsity += dropped / max(1, len(able))
        self.batches += 1
        self.tokens += plan.tokens
        self.context += len(plan.context)
        self.dense_flops += _total(counts, self._price((False,) * len(parts), frozenset(), frozenset()))
        self.flops += _total(counts, self._price(pays, savings, too_few))
        return sparse and bool(able) and not any(pays)

    def _price(self, pays: tuple[bool, ...], savings: frozenset[str], too_few: frozenset[str]) -> list[float]:
        """Linear FLOPs of one token of each kind, with those parts sparse that pay."""
        key = (pays, savings, too_few)
        if key not in self._prices:
            self._prices[key] = [self._linear(_one(kind), *key) for kind in _KINDS]
        return self._prices[key]

    def _linear(
        self, batch: BatchShape, pays: tuple[bool, ...], savings: frozenset[str], too_few: frozenset[str]
    ) -> float:
        """Linear FLOPs of a step, with those parts sparse that pay."""
        parts = zip([*self.mlp, *self.attention], pays, strict=True)
        dropped = [part.width - part.keep if paid else None for part, paid in parts]
        exact = tuple(savings - too_few)
        head = step_cost(dataclasses.replace(self.model, layers=0, own=()), batch, LoraShape(0), exact=exact)
        total = head.linear
        for layer in range(self.model.layers):
            shape, mlp, attention = self.model.at(layer), dropped[layer], dropped[self.model.layers + layer]
            keep = {
                "mlp_keep": mlp and shape.intermediate - mlp,
                "attention_keep": attention and shape.kv_width - attention,
            }
            for group, drop in (("mlp", mlp), ("projections", attention)):
                names = exact if drop is None else (*exact, *(savings & {"padding"}))
                cost = layer_cost(shape, batch, LoraShape(0), layer, exact=names, compensation_rank=self.rank, **keep)
                total += getattr(cost, group).total
        return total

    def read(self) -> dict[str, float]:
        """Figures since the last reading, then start anew; empty when no batch was counted."""
        if not self.tokens:
            return {}
        now = time.perf_counter()
        figures = {
            "sparselora/context_share": self.context / self.tokens,
            "sparselora/channel_sparsity": self.sparsity / self.batches,
            "sparselora/linear_flops_saved": 1 - self.flops / self.dense_flops,
            "sparselora/tokens_per_second": self.tokens / (now - self.since),
        }
        self.reset()
        self.since = self.stopped = now
        return {name: round(value, 4) for name, value in figures.items()}


def _total(counts: tuple[int, ...], prices: list[float]) -> float:
    return sum(count * price for count, price in zip(counts, prices, strict=True))


def _one(kind: str) -> BatchShape:
    """A batch of a single token of one kind, or of a single loss position apart from its token."""
    return BatchShape(**{name: int(name == kind) for name in _KINDS}, batch=1, sequence=1)
