"""Which checkpoint of a run can be resumed."""

import json
import re
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

__all__ = ["newest_checkpoint", "steps_taken"]

logger = logging.get_logger(__name__)


def newest_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint in a folder that was written to its end; None where there is none.

    The Trainer writes its state last: a run that was stopped before leaves a checkpoint that cannot be resumed.
    """
    numbered = {path: re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name) for path in Path(folder).glob("*")}
    found = [(int(match[1]), path) for path, match in numbered.items() if match and path.is_dir()]
    for _, path in sorted(found, reverse=True):
        if _is_whole(path):
            return str(path)
        logger.warning(f"{path} was not written to its end: it is passed over, and can be deleted.")
    return None


def steps_taken(checkpoint: str | Path) -> int:
    """Optimizer steps before a checkpoint; 0 where it does not say."""
    return _state(Path(checkpoint)).get("global_step", 0)


def _is_whole(checkpoint: Path) -> bool:
    return bool(_state(checkpoint))


def _state(checkpoint: Path) -> dict[str, Any]:
    """What the Trainer noted of a run, empty where that cannot be read."""
    try:
        return json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
