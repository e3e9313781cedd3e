"""Plugin for axolotl: SparseLoRA in any of its supervised LoRA runs, by two entries in the run's YAML.

```yaml
plugins:
  - sparselora_hf.integrations.axolotl.SparseLoraPlugin
sparselora: # the fields of SparseLoraConfig, or a preset
  preset: llama-3-8b-math
```

Without the section `sparselora` the plugin does nothing.
"""

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from ..callback import SparseLoraCallback
from ..config import SparseLoraConfig

__all__ = ["SparseLoraArgs", "SparseLoraPlugin"]


class SparseLoraArgs(BaseModel):
    """What axolotl's YAML gains: the section `sparselora`."""

    sparselora: dict[str, Any] | None = None


class SparseLoraPlugin(BasePlugin):
    """Adds `SparseLoraCallback`, which sparsifies the model when axolotl's trainer is made."""

    def get_input_args(self) -> str:
        """Dotted path of the settings' schema."""
        return f"{SparseLoraArgs.__module__}.{SparseLoraArgs.__qualname__}"

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[SparseLoraCallback]:
        """The callback, where the run has settings for it.

        Raises:
            TypeError, ValueError: a setting is unknown or out of range.
        """
        if cfg.sparselora is None:
            return []
        return [SparseLoraCallback(SparseLoraConfig.from_dict(cfg.sparselora))]
