"""Plugin for axolotl: SparseLoRA in any of its supervised LoRA runs, by two entries in the run's YAML.

```yaml
plugins:
  - sparselora_hf.integrations.axolotl.SparseLoraPlugin
sparselora: # the fields of SparseLoraConfig, or a preset
  preset: llama-3-8b-math
```

Without the section `sparselora` the plugin does nothing.

Where axolotl's own trainer takes the loss that the model gives, nothing else is read of a training step, and the exact
savings `last_layer` and `logits` are in force. They stay off under `orpo_alpha`, under a trainer of another plugin or
of `trainer_cls` that makes its loss itself (distillation, diffusion), and where `exact` does not name them.
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

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Promise that nothing but the loss is read of a training step, where axolotl's trainer reads nothing else."""
        if not _takes_the_models_loss(trainer):
            return
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, SparseLoraCallback):
                callback.loss_only = True


def _takes_the_models_loss(trainer: Any) -> bool:
    """Whether a trainer's loss is that of axolotl's trainer for supervised runs, and nobody has wrapped it.

    A loss that the run gives in place of the model's (`use_eaft`) changes nothing: labels then stay with the trainer.
    """
    method = getattr(trainer.compute_loss, "__func__", None)
    name, module = (getattr(method, field, "") for field in ("__qualname__", "__module__"))
    is_own = name == "AxolotlTrainer.compute_loss" and module.startswith("axolotl.")
    return is_own and not getattr(trainer.args, "orpo_alpha", None)
