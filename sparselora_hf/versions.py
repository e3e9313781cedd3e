"""Versions of the libraries that the package stands on: what is supported, checked in this one place.

`lowest` and `newest` are the ends of what the tests were run with. Newer releases of the same series are let through
with a warning, since most of them change nothing that matters here; `refused` is where the next series begins.
"""

import functools
import importlib.metadata
import logging
from typing import NamedTuple

from packaging.version import Version

__all__ = ["SUPPORTED", "Range", "check_versions", "installed", "peft_skips_model_hooks"]

logger = logging.getLogger(__name__)


class Range(NamedTuple):
    """Supported versions ``lowest <= version < refused``, tested up to `newest`, and what the lowest one brought."""

    lowest: str
    newest: str
    refused: str
    reason: str


SUPPORTED = {
    "torch": Range("2.6", "2.15", "3", "FSDP2 under its public name"),
    "transformers": Range("5.0", "5.24", "6", "layers that hand keyword arguments on to attention"),
    "peft": Range("0.18", "0.21", "1", "LoRA variants as objects of their own"),
    "accelerate": Range("1.10.1", "1.15", "2", "parallelism settings"),
    "trl": Range("1.16", "1.16", "2", "a fused head that trains on a CPU, too"),
}


def installed(package: str) -> Version:
    """Version of an installed package.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return Version(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(f"{package} is not installed. {_remedy(package)}") from error


def _remedy(package: str) -> str:
    bounds = SUPPORTED[package]
    return f'Run: pip install "{package}>={bounds.lowest},<{bounds.refused}"'


@functools.cache
def check_versions(*packages: str) -> None:
    """Refuse packages whose version is not supported; asked once.

    Raises:
        ImportError: names the package, its version, the supported range and the command that helps.
    """
    for package in packages:
        version, bounds = installed(package), SUPPORTED[package]
        if not Version(bounds.lowest) <= version < Version(bounds.refused):
            raise ImportError(
                f"{package} {version} is not supported: SparseLoRA needs {package} >= {bounds.lowest} "
                f"({bounds.reason}) and < {bounds.refused}. {_remedy(package)}"
            )
        if version.release[:2] > Version(bounds.newest).release:
            logger.warning(f"{package} {version} is newer than the versions tested, up to {bounds.newest}.")


def peft_skips_model_hooks() -> bool:
    """Whether PEFT calls the wrapped model's `forward` and not the model, which passes its hooks by (before 0.21)."""
    return installed("peft") < Version("0.21")
