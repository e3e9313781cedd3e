"""`SparseLoraTrainer`: TRL's `SFTTrainer` with contextual sparsity; the signature gains `sparse_config`."""

import inspect
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging
from trl import SFTTrainer

from .attach import attach, check_adapters, check_model, sparsify
from .callback import SparseLoraCallback
from .checkpoints import newest_checkpoint
from .collator import PLAN_KEY, PlanCollator
from .config import CONFIG_FILE, SparseLoraConfig, check_settings
from .families import ModelFamily
from .plan import IGNORE_INDEX, PLANNED_BY, TokenPlan
from .state import Pin
from .versions import SUPPORTED, check_versions

__all__ = ["SparseLoraTrainer"]

logger = logging.get_logger(__name__)

_MARKS_KEY = f"{PLAN_KEY}_marks"
# initialisations of adapters that take something off the frozen weights
_REWRITING = ("pissa", "olora", "corda", "loftq", "lora_ga")

_PAPER = {
    "title": "SparseLoRA: Accelerating LLM Fine-Tuning with Contextual Sparsity",
    "id": "2506.16500",
    "citation": """\
@inproceedings{khaki2025sparselora,
    title     = {{SparseLoRA: Accelerating LLM Fine-Tuning with Contextual Sparsity}},
    author    = {Khaki, Samir and Li, Xiuyu and Guo, Junxian and Zhu, Ligeng and Xu, Chenfeng and Plataniotis, \
Konstantinos N. and Yazdanbakhsh, Amir and Keutzer, Kurt and Han, Song and Liu, Zhijian},
    booktitle = {Proceedings of the 42nd International Conference on Machine Learning},
    year      = {2025}
}""",
}


class _TrainersCallback(SparseLoraCallback):
    """The callback of a trainer that saves by itself."""

    def _save(self, args, state) -> None:
        """`SparseLoraTrainer.save_model` has written everything already."""


class SparseLoraTrainer(SFTTrainer):
    """`SFTTrainer` whose LoRA training steps are sparse for context tokens.

    Args:
        *args, **kwargs: those of `trl.SFTTrainer`, all of them.
        sparse_config: settings of sparsity; left out, `SparseLoraConfig.default` for the model's depth and width,
            or what the checkpoint says when a run is resumed.
        model_family: description of a model family that is not in the table.

    Attributes:
        sparse_handle: the `SparseLoraHandle` of the model in training. After `sparse_handle.restore()` the trainer
            is an ordinary `SFTTrainer`.

    Raises:
        ImportError: the version of a library is not supported.
        TypeError: `sparse_config` is no `SparseLoraConfig`.
        ValueError: settings, model and data do not fit together. A model that was passed in is then as it was, with
            two exceptions. If the data is refused, weights that PiSSA, OLoRA and the like have rewritten stay
            rewritten, and a warning says so. If `SFTTrainer` itself refuses something once it has wrapped the model,
            such as a chat template, the model stays wrapped.
    """

    _tag_names = ["trl", "sft", "sparselora"]  # noqa: RUF012 - TRL's own attribute
    _name = "SparseLoRA"
    _paper = _PAPER
    _flos_of_a_token: int | None = None

    def __init__(
        self,
        *args: Any,
        sparse_config: SparseLoraConfig | None = None,
        model_family: ModelFamily | None = None,
        **kwargs: Any,
    ) -> None:
        check_versions(*SUPPORTED)
        given = inspect.signature(SFTTrainer).bind_partial(*args, **kwargs).arguments
        model = given.get("model")
        self._config_given = sparse_config is not None
        self._family = model_family
        if any(isinstance(callback, SparseLoraCallback) for callback in given.get("callbacks") or ()):
            raise ValueError(
                "callbacks: SparseLoraTrainer has a SparseLoraCallback of its own. Leave yours out, and pass its "
                "configuration as sparse_config."
            )
        self._checked_family = _check_before(model, given.get("peft_config"), sparse_config, model_family)
        trained = _trained_parameters(model)
        super().__init__(*args, **kwargs)
        try:
            _check_labels(self.train_dataset)
            if sparse_config is None:
                shape = self.model.config.get_text_config()
                sparse_config = SparseLoraConfig.default(shape.num_hidden_layers, shape.hidden_size)
            self._sparsify(sparse_config)
            self._leave_mlp_to_us()
        except Exception:
            _unwrap(model, self.model, trained)
            raise

    def _sparsify(self, config: SparseLoraConfig) -> None:
        if self._checked_family is None:
            self.sparse_handle = sparsify(self.model, config, family=self._family)
        else:
            self.sparse_handle = attach(self.model, config, self._checked_family)
        self._checked_family = self.sparse_handle.family
        self.sparse_callback = _TrainersCallback(self.sparse_handle)
        self.add_callback(self.sparse_callback)
        logger.info("SparseLoRA:\n" + self.sparse_handle.report())

    def _leave_mlp_to_us(self) -> None:
        """Liger's other kernels stay; that of the MLP would take the place of the sparse one when training starts."""
        if self.args.use_liger_kernel:
            self.args.liger_kernel_config = {**(self.args.liger_kernel_config or {}), "swiglu": False, "geglu": False}
            logger.warning("SparseLoRA: Liger's MLP kernel is left out, its other kernels are used.")

    @property
    def sparse_config(self) -> SparseLoraConfig:
        """The sparse configuration in force."""
        return self.sparse_handle.config

    def get_train_dataloader(self):
        """As that of `SFTTrainer`; batches bring their token plan, unless one process reads and cuts them for all."""
        if self.accelerator.dispatch_batches:  # accelerate sends and cuts tensors, and refuses anything else
            return super().get_train_dataloader()
        collator = self.data_collator
        self.data_collator = PlanCollator(
            collator, self.sparse_config.token_rule, self.sparse_handle.state.records_on(self.sparse_handle.device)
        )
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """Train as `SFTTrainer.train` does; whatever happens, the model is dense afterwards.

        Raises:
            ValueError: ``resume_from_checkpoint=True`` and no checkpoint in `args.output_dir` was written to its end.
                Otherwise what `SFTTrainer.train` raises.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:  # `Trainer` would take one that was not written to its end
                raise ValueError(
                    f"No valid checkpoint found in output directory ({self.args.output_dir}). Leave "
                    "resume_from_checkpoint out to start from the beginning."
                )
        if isinstance(resume_from_checkpoint, (str, os.PathLike)):
            self._restore_config(Path(resume_from_checkpoint))
            self.sparse_handle.source = Path(resume_from_checkpoint)
        self._flos_of_a_token = None
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.sparse_handle.end_run()

    def _restore_config(self, folder: Path) -> None:
        """Take the checkpoint's settings unless others were given."""
        if not self.sparse_handle.is_attached or not (folder / CONFIG_FILE).is_file():
            return
        saved = SparseLoraConfig.from_yaml(folder)
        if saved.to_dict() == self.sparse_config.to_dict():
            return
        if self._config_given:
            logger.warning(f"The checkpoint {folder} was trained with other SparseLoRA settings; yours are used.")
            return
        self.sparse_handle.restore()
        self.remove_callback(self.sparse_callback)
        self._sparsify(saved)

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Load as `SFTTrainer` does; adapters on a quantised base, which TRL keeps in bf16, do not come back wider."""
        dtypes = {name: p.dtype for name, p in self.model.named_parameters() if p.requires_grad}
        super()._load_from_checkpoint(*args, **kwargs)
        for name, parameter in self.model.named_parameters():
            if name in dtypes:
                parameter.data = parameter.data.to(dtypes[name])

    def get_batch_samples(self, *args: Any, **kwargs: Any):
        """Batches as `Trainer` takes them, each with a mark of what its plan was made from."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        for batch in batches:
            if PLAN_KEY in batch:
                batch[_MARKS_KEY] = _marks(batch)
        return batches, items

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """One micro-batch, forward and backward, under its token plan."""
        state = self.sparse_handle.state
        plan, marks = inputs.pop(PLAN_KEY, None), inputs.pop(_MARKS_KEY, None)
        if not self.sparse_handle.is_attached:
            plan = None  # restored: a plain `SFTTrainer`
        elif plan is None or not (marks is None or _are_as_marked(inputs, marks)):  # a subclass has changed the batch
            plan = TokenPlan.of_inputs(inputs, self.sparse_config.token_rule) if "labels" in inputs else None
        # a subclass's `_prepare_inputs` may still change the batch: then each forward makes a plan of its own
        if plan is None or not self._has_own("_prepare_inputs"):
            try:
                return super().training_step(model, inputs, *args, **kwargs)
            finally:
                state.end()
        loss_only = self._uses_loss_positions_only()
        batch = state.begin(plan, self.sparse_handle.device, loss_only=loss_only, routers=self.aux_loss_enabled)
        state.pinned = True
        if not loss_only and "input_ids" in inputs:  # a user's loss may run the model on other tokens, too
            state.pinned_to = Pin(batch, inputs)
        try:
            return super().training_step(model, inputs, *args, **kwargs)
        finally:
            state.pinned, state.pinned_to = False, None
            state.end()

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch=None
    ):
        """The loss of `SFTTrainer`; in training the head sees the positions that enter the loss and no others."""
        state = self.sparse_handle.state
        if not self._compacts(inputs, return_outputs):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        plan, smoother = state.batch.plan, self.label_smoother
        if smoother is None or self.args.loss_type != "nll":
            state.head_rows, inputs["shift_labels"] = plan.head_rows, plan.head_targets[None]
        else:  # it shifts labels by itself; those of the inputs are for the metrics, which have a forward of their own
            state.head_rows, labels = plan.unshifted_head
            self.label_smoother = lambda outputs, _, **kwargs: smoother(outputs, labels, **kwargs)
        try:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            state.head_rows, self.label_smoother = None, smoother

    def _compacts(self, inputs: dict[str, Any], return_outputs: bool) -> bool:
        batch = self.sparse_handle.state.batch
        return batch is not None and "logits" in batch.savings and not return_outputs and "shift_labels" not in inputs

    def _has_own(self, method: str) -> bool:
        """Whether a method is this class's, not that of a subclass or one that others gave this trainer."""
        return getattr(getattr(self, method), "__func__", None) is getattr(SparseLoraTrainer, method)

    def _uses_loss_positions_only(self) -> bool:
        """Whether nothing but predictions at labelled positions, and what routers say, is made of a forward."""
        if not self._has_own("compute_loss"):
            return False  # another may read anything
        config = self.model.config
        records = config.output_hidden_states or config.output_attentions
        return self.compute_loss_func is None and not records

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As `Trainer` counts them, whose walk through all modules at every step is taken once a run."""
        name = getattr(self.model, "main_input_name", "input_ids")
        if name not in inputs:
            return 0
        if self._flos_of_a_token is None:
            self._flos_of_a_token = super().floating_point_ops({name: inputs[name].new_zeros(1)})
        return self._flos_of_a_token * inputs[name].numel()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as `SFTTrainer` does; training logs gain the figures of sparsity."""
        if "loss" in logs:
            logs.update(self.sparse_handle.figures())
        super().log(logs, start_time)

    def save_model(self, output_dir: str | os.PathLike | None = None, _internal_call: bool = False) -> None:
        """Save as `SFTTrainer` does, with the sparse configuration beside it, in a checkpoint with the statistics too.

        They are written before the Trainer's state is: a checkpoint that can be resumed is whole.
        """
        super().save_model(output_dir, _internal_call)
        if _internal_call and output_dir is not None:
            self.sparse_handle.save(output_dir, write=self.args.should_save)
        elif self.args.should_save:
            self.sparse_config.to_yaml(Path(output_dir or self.args.output_dir))


def _trained_parameters(model: object) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad] if isinstance(model, nn.Module) else []


def _unwrap(model: object, wrapped: nn.Module, trained: list[nn.Parameter]) -> None:
    """Take back what `SFTTrainer` did to a model that was passed in: its adapters, its forward, frozen parameters."""
    if not isinstance(model, PreTrainedModel) or wrapped is model:
        return
    initialisations = {str(config.init_lora_weights).lower() for config in wrapped.peft_config.values()}
    wrapped.unload()
    for name in filter(lambda name: name.startswith(_REWRITING), initialisations):
        logger.warning(
            f'SparseLoRA: init_lora_weights="{name}" has rewritten the frozen weights of the model that was passed '
            "in. Load it again before you use it."
        )
    model.disable_input_require_grads()
    model.__dict__.pop("forward", None)
    for parameter in trained:
        parameter.requires_grad_(True)


_Marks = list[tuple[Any, int]]


def _marks(inputs: Mapping[str, Any]) -> _Marks:
    """What a batch's plan is made from: each tensor, and how often it was written to."""
    tensors = (inputs.get(name) for name in PLANNED_BY)
    return [(tensor, getattr(tensor, "_version", 0)) for tensor in tensors]


def _are_as_marked(inputs: Mapping[str, Any], marks: _Marks) -> bool:
    """Whether no tensor was exchanged or written to."""
    pairs = zip(_marks(inputs), marks, strict=True)
    return all(now is before and writes == seen for (now, writes), (before, seen) in pairs)


def _check_before(
    model: object, peft_config: object, config: SparseLoraConfig | None, family: ModelFamily | None
) -> ModelFamily | None:
    """Everything that can be said before `SFTTrainer` wraps the model; returns the family of one that is loaded."""
    if config is not None:
        check_settings(config)
    targets = getattr(peft_config, "target_modules", None) or ()
    if re.fullmatch(targets, "lm_head") if isinstance(targets, str) else "lm_head" in targets:
        raise ValueError("target_modules: a LoRA adapter on lm_head is not supported. Leave lm_head out.")
    if isinstance(peft_config, PeftConfig) and not isinstance(peft_config, LoraConfig):
        raise ValueError(
            f"peft_config: {type(peft_config).__name__} gives the model no LoRA adapter, and SparseLoraTrainer trains "
            "nothing else. Pass peft_config=LoraConfig(...), or use SFTTrainer."
        )
    if peft_config is None:
        if not isinstance(model, nn.Module):
            raise ValueError(
                "SparseLoraTrainer trains LoRA adapters and the model carries none. Pass peft_config=LoraConfig(...)."
            )
        check_adapters(model)
    if isinstance(model, (PreTrainedModel, PeftModel)):
        return check_model(model, _before_replication(config or SparseLoraConfig(), peft_config), family)
    return None


def _before_replication(config: SparseLoraConfig, peft_config: object) -> SparseLoraConfig:
    """Settings for the layers there are before PEFT replicates some; layer numbers count the replicas."""
    replication = getattr(peft_config, "layer_replication", None)
    if not replication:
        return config
    mlp, attention = config.layer_sparsity(sum(end - start for start, end in replication))
    return config.replace(mlp_sparsity=max(mlp), attention_sparsity=max(attention))


def _check_labels(dataset: object, rows: int = 100) -> None:
    """Refuse a prepared dataset that is empty, or whose first rows carry no label: nothing would be learned."""
    if not isinstance(dataset, Dataset):
        return
    if len(dataset) == 0:
        raise ValueError(
            "No training example is left: none has a token that carries a label. Check that completions are not empty "
            "and that max_length does not cut them off."
        )
    if "labels" not in dataset.column_names:
        return
    labels = list(dataset.select(range(min(rows, len(dataset))))["labels"])
    if not all(getattr(row, "ndim", isinstance(row, list)) for row in labels):
        return  # no labels of tokens: the user's collator knows what they are
    if all(label == IGNORE_INDEX for row in labels for label in row):
        raise ValueError(
            f"No token of the first {len(labels)} training examples carries a label: every label is {IGNORE_INDEX}. "
            "Check that completions are not empty and not cut off by max_length."
        )
