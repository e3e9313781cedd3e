"""The package's cache folder."""

import os
import tempfile
from pathlib import Path

__all__ = ["default_cache_dir"]


def default_cache_dir() -> Path:
    """``$SPARSELORA_CACHE``, else ``sparselora`` under ``$XDG_CACHE_HOME`` or ``~/.cache``; empty ones do not count.

    A user without a home, as in some containers, gets a folder among the temporary files.
    """
    if own := os.environ.get("SPARSELORA_CACHE"):
        return Path(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "sparselora"
    try:
        return Path.home() / ".cache" / "sparselora"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / "sparselora"
