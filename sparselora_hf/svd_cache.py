"""Cache of SVD factors: one safetensors file per weight, named by a fingerprint of the weight itself.

A file is written to a temporary name and moved into place, so a reader never meets half of one; a file that is
damaged or not ours is rebuilt, never trusted, and what is no file is left alone. A cache that cannot be read or
written costs time, not the run.
"""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from transformers.utils import logging

from .cache import default_cache_dir
from .files import write_atomically
from .ops.quant import FrozenWeight, QuantisedWeight, read_whole
from .svd import LowRank, truncated_svd

__all__ = ["SvdCache", "fingerprint", "print_of"]

logger = logging.get_logger(__name__)

_FORMAT = "sparselora-svd-2"
_BLOCK = 64  # rows: 512 KB at width 4096
_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


def fingerprint(weight: torch.Tensor) -> str:
    """Hash of a weight ``[out, in]``: of its type, its shape and the integer sums of its bits by row and column.

    Integer sums are the same on every device; changing an element, or exchanging two rows or columns, changes them.
    Rows are summed in the widest words that they fill, on a CPU a few at a time, which its cache holds for the sums by
    column: 9 ms for 14336 x 4096 in bf16 on one core, 18 ms at once, 556 ms by element.
    """
    row_bytes = weight.shape[1] * weight.element_size()
    size = next(size for size in _WORDS if row_bytes % size == 0)
    flat = weight.detach().contiguous().flatten()  # a single row may have a stride that no wider word fits
    bits = flat.view(_WORDS[size]).view(weight.shape[0], row_bytes // size)
    blocks = bits.split(_BLOCK) if bits.device.type == "cpu" else (bits,)
    rows, columns = [], torch.zeros(bits.shape[1], dtype=torch.int64, device=bits.device)
    for block in blocks:
        rows.append(block.sum(1, dtype=torch.int64))
        columns += block.sum(0, dtype=torch.int64)
    digest = hashlib.sha256(f"{weight.dtype}{tuple(weight.shape)}".encode())
    for sums in (columns, torch.cat(rows)):
        digest.update(sums.cpu().numpy().tobytes())
    return digest.hexdigest()


def print_of(weight: FrozenWeight) -> str:
    """`fingerprint` of a weight ``[out, in]``, or of all that is stored of a quantised one."""
    if not isinstance(weight, QuantisedWeight):
        return fingerprint(weight)
    parts = [fingerprint(part if part.dim() == 2 else part.reshape(1, -1)) for part in weight.tensors()]
    return "/".join([str(tuple(weight.shape)), *parts])


class SvdCache:
    """Factors by weight, on disk.

    Args:
        folder: cache folder; None is `default_cache_dir`.
    """

    def __init__(self, folder: str | os.PathLike | None = None) -> None:
        self.folder = Path(folder) if folder is not None else default_cache_dir()
        self.hits = 0
        self._writable = True

    def factors(self, weight: FrozenWeight, rank: int, seed: int = 0, known: str | None = None) -> LowRank:
        """Factors of a weight, from the cache or computed and stored. Raises what `truncated_svd` raises.

        A quantised weight is found by what is stored of it and dequantised only where its factors are not at hand.
        ``known`` is its `print_of`, where the caller has it.
        """
        known = print_of(weight) if known is None else known
        key = hashlib.sha256(f"{_FORMAT}/{known}/{rank}/{seed}".encode()).hexdigest()
        path = self.folder / "svd" / f"{key}.safetensors"
        if os.path.exists(path) and not os.path.isfile(path):  # to open a pipe would wait for ever
            logger.warning(f"{path} is no file: its factors are computed in every run. Delete it.")
            return truncated_svd(read_whole(weight), rank, seed)
        factors = self._read(path, key, weight.shape, rank)
        if factors is not None:
            self.hits += 1
            return factors.to(weight.device)
        factors = truncated_svd(read_whole(weight), rank, seed)
        self._write(path, key, factors)
        return factors

    def _read(self, path: Path, key: str, shape: torch.Size, rank: int) -> LowRank | None:
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                factors = LowRank(file.get_tensor("down"), file.get_tensor("up"))
        except FileNotFoundError:  # also where the folder is another user's, of which no more can be told
            return None
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            logger.warning(f"SVD cache file {path.name} is damaged ({error}); computing it again.")
            return None
        sound = factors.down.shape == (rank, shape[1]) and factors.up.shape == (shape[0], rank)
        if not sound or metadata.get("key") != key or metadata.get("sum") != _checksum(factors):
            logger.warning(f"SVD cache file {path.name} is not what its name says; computing it again.")
            return None
        return factors

    def _write(self, path: Path, key: str, factors: LowRank) -> None:
        if not self._writable:
            return
        factors = factors.to(torch.device("cpu"))
        tensors = {"down": factors.down.contiguous(), "up": factors.up.contiguous()}
        data = save(tensors, metadata={"key": key, "sum": _checksum(factors), "format": _FORMAT})
        try:
            write_atomically(path, data)
        except OSError as error:
            self._writable = False
            logger.warning(f"SVD cache {self.folder} cannot be written ({error}); factors are computed in every run.")


def _checksum(factors: LowRank) -> str:
    return hashlib.sha256(json.dumps([fingerprint(factors.down), fingerprint(factors.up)]).encode()).hexdigest()
