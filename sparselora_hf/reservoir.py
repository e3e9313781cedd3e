"""A bounded sample of the context tokens that dense steps saw, by layer: uniform over all of them, in fixed memory.

Every token draws a random priority and the highest stay. The draw depends on seed and step alone, so all layers
keep the same tokens, a resumed run draws as the uninterrupted one did, and the host decides without asking the device.
"""

import torch

from .distributed import add_up, gather_objects, rank_and_world

__all__ = ["Reservoir"]


class Reservoir:
    """Token rows by key, at most ``capacity`` each.

    Args:
        capacity: rows kept per key.
        seed: seed of the priorities.
    """

    def __init__(self, capacity: int, seed: int = 0) -> None:
        self.capacity = capacity
        self.seed = seed
        self.priorities = torch.empty(0, device="cpu")
        self.rows: dict[str, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.priorities)

    def draw(self, tokens: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Decide which of ``tokens`` new rows to keep: their numbers ``[K]`` and the slots ``[K]`` they take."""
        fresh = torch.rand(tokens, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + step), device="cpu")
        held = len(self.priorities)
        everything = torch.cat([self.priorities, fresh])
        best = everything.topk(min(self.capacity, len(everything))).indices
        picks = best[best >= held].sort().values
        free = torch.ones(held, dtype=torch.bool, device="cpu")
        free[best[best < held]] = False
        slots = torch.cat([free.nonzero().squeeze(1), torch.arange(held, max(held, len(best)), device="cpu")])
        grown = torch.empty(max(held, len(best)), device="cpu")
        grown[:held] = self.priorities
        grown[slots] = everything[picks]
        self.priorities = grown
        return picks - held, slots

    def put(self, key: str, x: torch.Tensor, slots: torch.Tensor) -> None:
        """Store rows ``x`` ``[K, H]`` in ``slots`` ``[K]``; slots that were drawn and never filled hold NaN."""
        if key not in self.rows:
            self.rows[key] = x.new_full((self.capacity, x.shape[1]), torch.nan)
        self.rows[key].index_copy_(0, slots.to(x.device), x.detach().to(self.rows[key].dtype))

    def get(self, key: str) -> torch.Tensor:
        """Rows stored under a key, ``[n, H]``."""
        return self.rows[key][: len(self)]

    def merged(self, device: torch.device) -> "Reservoir":
        """The sample of all ranks together, highest priority first; every rank must call and gets the same.

        Args:
            device: where rows go of which this rank has none.
        """
        shapes = {key: (rows.shape[1], rows.dtype) for key, rows in self.rows.items()}
        priorities, shapes = zip(*gather_objects((self.priorities, shapes)), strict=True)
        everything, whole = torch.cat(priorities), Reservoir(self.capacity, self.seed)
        best = everything.argsort(descending=True, stable=True)[: self.capacity]
        whole.priorities = everything[best]
        first = sum(len(held) for held in priorities[: rank_and_world()[0]])
        slots = ((best >= first) & (best < first + len(self))).nonzero().squeeze(1)
        for key, (width, dtype) in sorted({key: shape for each in shapes for key, shape in each.items()}.items()):
            blank = torch.full((self.capacity, width), torch.nan, dtype=dtype, device=device)
            held = self.rows.get(key, blank)
            rows = torch.zeros_like(held)
            rows[slots.to(held.device)] = held[(best[slots] - first).to(held.device)]
            add_up(rows)  # every slot is one rank's, the others add zero
            whole.rows[key] = rows
        return whole

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything there is to save."""
        return {"priorities": self.priorities, **{f"rows.{key}": self.get(key) for key in self.rows}}

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take back what `tensors` gave, each rank its share."""
        rank, world = rank_and_world()
        self.priorities = tensors["priorities"].cpu()[rank::world]
        for name, rows in tensors.items():
            if name.startswith("rows."):
                rows = rows[rank::world]
                full = rows.new_full((self.capacity, rows.shape[1]), torch.nan)
                full[: len(rows)] = rows
                self.rows[name.removeprefix("rows.")] = full
