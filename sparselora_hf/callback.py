"""`SparseLoraCallback`: switches sparsity by the global step, in any `transformers.Trainer`."""

from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from .attach import sparsify
from .config import CONFIG_FILE, SparseLoraConfig, check_settings
from .decoder import causal_model
from .families import ModelFamily
from .handle import SparseLoraHandle
from .placement import check_engine

__all__ = ["SparseLoraCallback"]

logger = logging.get_logger(__name__)


class SparseLoraCallback(TrainerCallback):
    """Turns a sparse model's sparsity on and off as training goes, saves its configuration, logs what it did.

    Whether a step is sparse depends on the global step alone. A resumed run takes what dense steps had gathered from
    the checkpoint, found through `args.resume_from_checkpoint` or in `args.output_dir`. Figures join
    `state.log_history`. The loggers that `report_to` names run before this callback and miss them; under
    `SparseLoraTrainer` they get them too.

    Args:
        sparse: what `sparsify` returned for the model in training, or a configuration if the model is out of reach.
            With a configuration the callback sparsifies the Trainer's model when the Trainer is made (or when training
            begins, if the callback is added later) and restores it when training ends.
        model_family: with a configuration, description of a model family that is not in the table.
        loss_only: as `SparseLoraHandle.loss_only`. A plain `Trainer` reads nothing but the loss, unless `compute_loss`
            or a callback looks at the outputs of training forwards.

    Attributes:
        handle: the handle of the model in training. With a configuration it is None before the model is sparsified
            and after training.
        loss_only: the promise; it may be made until training begins.

    Raises:
        TypeError: `sparse` is neither.
        ValueError: settings and model do not fit together; the model is untouched then.

    Example:
        >>> handle = sparsify(model, SparseLoraConfig(mlp_sparsity=0.9))
        >>> Trainer(model, args, train_dataset=data, callbacks=[SparseLoraCallback(handle)]).train()
        >>> Trainer(model, args, train_dataset=data, callbacks=[SparseLoraCallback(config)]).train()
    """

    def __init__(
        self,
        sparse: SparseLoraHandle | SparseLoraConfig,
        model_family: ModelFamily | None = None,
        loss_only: bool = False,
    ) -> None:
        if not isinstance(sparse, SparseLoraHandle):
            check_settings(sparse)
        self._config = sparse if isinstance(sparse, SparseLoraConfig) else None
        self._family = model_family
        self.loss_only = loss_only
        self.handle = None if self._config else sparse

    def on_init_end(self, args, state, control, model=None, **kwargs) -> None:
        """Sparsify the model before an engine wraps or shards it."""
        if self.handle is None or (self._config and not self.handle.is_attached):
            self.handle = sparsify(model, self._config, family=self._family)
            logger.info("SparseLoRA:\n" + self.handle.report())
        self.handle.loss_only |= self.loss_only

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        """Resolve the schedule against the length of the run; refuse engines that a sparse model does not run in."""
        check_engine(args.n_gpu)
        if self.handle is not None and causal_model(self.handle.model) not in set(model.modules()):
            self._leave_other_model()  # `model_init` makes a new one for every run
        self.on_init_end(args, state, control, model)
        if state.global_step and self.handle.config.needs_statistics:
            self._resume(args, state.global_step)
        self.handle.begin_run(state.max_steps, state.global_step)

    def _leave_other_model(self) -> None:
        if self._config is None:
            raise ValueError(
                "SparseLoraCallback was given the handle of another model than the one in training, which would run "
                "dense. Where the Trainer makes its model itself, by model_init, pass a SparseLoraConfig instead."
            )
        self.handle.restore()
        self.handle = None

    def _resume(self, args, step: int) -> None:
        """Start again from the checkpoint's statistics, also where a first try of this run had gathered others."""
        given = args.resume_from_checkpoint
        named = [self.handle.source, given if isinstance(given, str) else None]
        usual = _folder(args, step)
        folders = [Path(folder) for folder in (*named, usual) if folder and (Path(folder) / CONFIG_FILE).is_file()]
        if folders and SparseLoraConfig.from_yaml(folders[0]).learns_as(self.handle.config):
            self.handle.load(folders[0])

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """Switch where the schedule says so."""
        self._save_beside_jit(args, state, control)
        self.handle.begin_step(state.global_step, args.gradient_accumulation_steps)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """Add the figures of the last interval to a training log."""
        if logs is not None and "loss" in logs:
            figures = self.handle.figures()
            logs.update(figures)
            state.log_history[-1].update(figures)

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        """The time that evaluation took is none of training."""
        if self.handle is not None:
            self.handle.state.meter.leave_out()

    def on_save(self, args, state, control, **kwargs) -> None:
        """Write configuration and calibration beside the checkpoint; the time it took is none of training."""
        if not state.is_hyper_param_search:  # a trial's checkpoints lie where the Trainer alone knows
            self._save(args, state)
        self.handle.state.meter.leave_out()

    def _save(self, args, state) -> None:
        self.handle.save(_folder(args, state.global_step), write=args.should_save)

    def _save_beside_jit(self, args, state, control, **kwargs) -> None:
        """Save where `enable_jit_checkpoint` just wrote a checkpoint: its callback comes first, and tells nobody."""
        stops = control.should_training_stop and state.global_step < state.max_steps
        if getattr(args, "enable_jit_checkpoint", False) and stops and _folder(args, state.global_step).is_dir():
            self.on_save(args, state, control)

    on_pre_optimizer_step = on_epoch_end = _save_beside_jit

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Tell the clock of the figures."""
        self._save_beside_jit(args, state, control)
        self.handle.state.meter.stop()

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Leave a dense model behind, and a plain one where the callback made it sparse."""
        self.handle.end_run()
        if self._config:
            self.handle.restore()
            self.handle = None


def _folder(args, step: int) -> Path:
    """Where the checkpoint of a step usually lies."""
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
