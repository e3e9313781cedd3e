"""The package's cache folder."""

import os
from pathlib import Path

__all__ = ["default_cache_dir"]


def default_cache_dir() -> Path:
    """``$SPARSELORA_CACHE``, else ``sparselora`` under ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if "SPARSELORA_CACHE" in os.environ:
        return Path(os.environ["SPARSELORA_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sparselora"
