"""SVD factors of the weights that channels are scored by, made anew for those that change later.

Whether a weight has changed is told by its fingerprint. Addresses and counts of writes do not tell: moving a model
changes the former alone, and PEFT merges adapters by writing to a weight's `data`, which is not counted.
"""

import torch

from .config import SparseLoraConfig
from .ops.quant import FrozenWeight
from .svd import LowRank
from .svd_cache import SvdCache, print_of

__all__ = ["ScoredWeights"]


class ScoredWeights:
    """Factors of scored weights, of the rank and seed of a configuration, through its SVD cache.

    Attributes:
        factors: by number of the layer and role, on the weight's device and in its type.
    """

    def __init__(self, config: SparseLoraConfig) -> None:
        self.factors: dict[tuple[int, str], LowRank] = {}
        self._rank, self._seed = config.rank, config.seed
        self._cache = SvdCache(config.cache_dir)
        self._seen: dict[tuple[int, str], tuple[str, torch.dtype]] = {}  # fingerprint and type

    def follow(self, layer: int, role: str, weight: FrozenWeight) -> bool:
        """Factor a weight ``[out, in]`` that is new or holds other values than before; returns whether it did.

        One of another type than before was cast, as engines do, and is taken for the same.

        Raises:
            ValueError: as `truncated_svd`.
        """
        if weight.device.type == "meta":
            return False  # offloaded since: there is nothing to read
        key, now = (layer, role), (print_of(weight), weight.dtype)
        before = self._seen.get(key)
        if before is None or (now[0] != before[0] and now[1] == before[1]):
            factors = self._cache.factors(weight, self._rank, self._seed, now[0])
            self.factors[key] = factors.to(weight.device, weight.dtype)
            self._seen[key] = now
            return True
        self._seen[key] = now
        return False
