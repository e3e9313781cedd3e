"""`SparseLoraHandle`, which `sparsify` returns: switch sparsity, list what was done, save, load, undo."""

import dataclasses
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn
from tqdm.auto import tqdm
from transformers.utils import logging

from .config import SparseLoraConfig
from .decoder import Layer, causal_model, decoder_layers
from .distributed import gather_objects, rank_and_world, whole_weights
from .factors import ScoredWeights
from .families import ModelFamily
from .files import write_atomically
from .modules.classes import link_of, unpatch
from .placement import check_units
from .schedule import Schedule
from .state import SparseState
from .views import AttentionView, MlpView

__all__ = ["CALIBRATION_FILE", "Decision", "SparseLoraHandle"]

logger = logging.get_logger(__name__)

CALIBRATION_FILE = "sparselora_calibration.safetensors"
_PARTS = "sparse_parts"


@dataclasses.dataclass(frozen=True)
class Decision:
    """What became of one module: `sparse`, `exact` (exact savings alone) or `dense` (left alone), and why."""

    name: str
    outcome: str
    width: int
    keep: int
    reason: str = ""

    @property
    def sparsity(self) -> float:
        """Realised fraction of channels dropped for context tokens."""
        return 1 - self.keep / self.width if self.width else 0.0


class SparseLoraHandle:
    """A patched model: switch sparsity, list what was done, undo it. As a context manager it undoes it at the end.

    Attributes:
        state: shared state of the patched modules.
        decisions: what became of each MLP and attention module.
        attach_seconds: what `sparsify` took, SVD factors included.
        source: checkpoint that a resumed run takes its statistics from; None looks where checkpoints usually lie.
    """

    def __init__(self, model: nn.Module, state: SparseState, family: ModelFamily, scored: ScoredWeights) -> None:
        self.model = model
        self.state = state
        self.family = family
        self._scored = scored
        self.decisions: list[Decision] = []
        self.attach_seconds = 0.0
        self.source: Path | None = None
        self._schedule: Schedule | None = None
        self._max_steps = 0
        self._has_waited = False
        self._patched: list[nn.Module] = []
        self._hooks: list[Any] = []  # hooks and whatever else `remove` undoes, in the order in which it was done

    @property
    def config(self) -> SparseLoraConfig:
        """The configuration in force."""
        return self.state.config

    @property
    def enabled(self) -> bool:
        """Whether training batches are sparse from now on; exact savings do not depend on it."""
        return self.state.enabled

    @property
    def loss_only(self) -> bool:
        """A promise, False unless set: of the outputs of training forwards nothing but the loss is read.

        The exact savings `last_layer` and `logits` need it: a causal model of transformers, with images too, then
        gives logits ``[1, L + 1, V]``, of its L labelled positions and one more. One whose loss is not
        transformers' `ForCausalLMLoss` gives all of them still. `SparseLoraTrainer` does without.
        """
        return self.state.loss_only

    @loss_only.setter
    def loss_only(self, promised: bool) -> None:
        self.state.loss_only = promised

    @property
    def is_attached(self) -> bool:
        """Whether the model is patched: until `restore` is called."""
        return bool(self._hooks)

    def set_enabled(self, enabled: bool) -> None:
        """Switch channel sparsity on or off, from the next batch on; the first time, fit what dense steps gathered.

        Raises:
            RuntimeError: statistics are asked for and no dense training step has run.
        """
        if enabled and self.state.calibration.gathers:
            self.fit()
        self.state.enabled = enabled

    def begin_run(self, max_steps: int, step: int = 0) -> None:
        """Resolve the schedule against the length of a run. `SparseLoraCallback` calls this; your own loop has to.

        SVD factors are made anew of frozen weights that have changed since. Every rank must call.

        Args:
            max_steps: optimizer steps of the run.
            step: finished steps of a run that is resumed; 0 forgets what an earlier run has gathered.

        Raises:
            ValueError: sparsity would end before it starts, FSDP version 1 has wrapped the layers, another library
                has replaced the forward of a sparse module, or a weight that has changed holds NaN.
        """
        if not self.is_attached:
            logger.warning("SparseLoRA: the model was restored, so training is dense. Call sparsify for a new handle.")
        check_units(self.model)
        self._check_forwards()
        self._follow_weights()
        self._has_waited = False
        self._schedule, self._max_steps = Schedule.of(self.config, max_steps), max_steps
        schedule = self._schedule
        if self.config.is_sparse and max_steps and not schedule.is_ever_sparse(max_steps):
            logger.warning(
                f"SparseLoRA: no step of this run is sparse: sparsity would start after step {schedule.start} and "
                f"end after step {min(schedule.end, max_steps)}. Lower start_step, or train longer."
            )
        if self.config.is_sparse and self.is_attached and all(d.outcome != "sparse" for d in self.decisions):
            reasons = "; ".join(sorted({d.reason for d in self.decisions if d.reason})) or "too few to drop one"
            logger.warning(
                f"SparseLoRA: no layer drops channels, though the settings ask for it: {reasons}. report() of the "
                "handle lists them; config.replace(dense_if_slower=False) makes sparse what is dense for speed alone."
            )
        if self.state.graphs is not None and not self.state.records_on(self.device):
            logger.warning(
                "SparseLoRA: cuda_graphs is of no effect: it takes an NVIDIA GPU with PyTorch's own "
                "allocator, and a single process."
            )
        self.state.reset()  # a run that was interrupted may have been sparse
        self.state.meter.reset()
        self.state.warned.clear()
        if not step:
            self.state.calibration.reset()
        self.begin_step(step)

    def begin_step(self, step: int, accumulation: int = 1) -> None:
        """Switch where the schedule says so. Call it before the first micro-batch of each optimizer step.

        Where a sparse step needs statistics of dense steps and there are none yet, it is dense and gathers them.

        Args:
            step: finished optimizer steps.
            accumulation: micro-batches of a step.

        Raises:
            RuntimeError: `begin_run` was not called.
        """
        if self._schedule is None:
            raise RuntimeError(
                "begin_step needs the length of the run: call begin_run(max_steps=...) before the loop."
            )
        self.state.set_aside.clear()  # what a forward left that was interrupted, for which PyTorch calls no hook
        self.state.step = step * accumulation
        wanted = self.is_attached and self.config.is_sparse and self._schedule.is_sparse(step)
        if step > self._max_steps and self.config.is_sparse and not wanted:  # at its end a run may be resumed
            self.state.warn_once(
                f"SparseLoRA: begin_run was given max_steps = {self._max_steps}, and every later step is dense. "
                "Give it the steps of all epochs."
            )
        enabled = wanted and self._can_be_sparse()
        if enabled != self.enabled:
            self.set_enabled(enabled)
            logger.info(f"SparseLoRA: sparsity {'on' if enabled else 'off'} from step {step + 1}.")

    def end_run(self) -> None:
        """Leave a dense model behind."""
        self.source = None
        self.state.reset()

    def _can_be_sparse(self) -> bool:
        """Whether any rank has the statistics that sparse steps need; every rank must call."""
        calibration = self.state.calibration
        if not calibration.gathers or any(gather_objects(not calibration.is_blank)):
            return True
        if not self._has_waited:
            self._has_waited = True
            logger.warning(
                "SparseLoRA: sparsity was to start, but no dense step has sampled a context token. Steps stay dense "
                "until one has. If the run is resumed and its statistics lie elsewhere, call handle.load(checkpoint)."
            )
        return False

    def _check_forwards(self) -> None:
        replaced = [type(module).__name__ for module in self._patched if "forward" in vars(module)]
        if replaced:
            raise ValueError(
                f"Another library has replaced the forward of {len(replaced)} sparse modules ({replaced[0]}), which "
                'would run dense. With Liger pass liger_kernel_config={"swiglu": False, "geglu": False}.'
            )

    @torch.no_grad()
    def _follow_weights(self) -> None:
        """SVD factors of the weights as they are now, a state dict that was loaded or an adapter merged included."""
        if not self._scored.factors:
            return
        start, changed, sparse = time.perf_counter(), 0, self._sparse_parts()
        for layer in decoder_layers(self.model, self.config, self.family):
            inputs = MlpView.of(layer.mlp, self.family).inputs if f"{layer.number}.mlp" in sparse else {}
            if f"{layer.number}.o" in sparse:
                inputs = inputs | AttentionView.of(layer.attention, self.family).inputs
            inputs = {role: p for role, p in inputs.items() if (layer.number, role) in self._scored.factors}
            with whole_weights(layer.module, self.model) if inputs else nullcontext():
                weights = ((role, projection.weight) for role, projection in inputs.items())
                changed += sum(self._scored.follow(layer.number, *each) for each in weights)
        if changed:
            seconds = time.perf_counter() - start
            logger.info(f"SparseLoRA: {changed} weights have changed since their SVD, made anew in {seconds:.1f} s.")

    def fit(self) -> None:
        """Fit the criterion's and the stand-in's statistics, if they have any, to the sample of the dense steps.

        Every rank must call. Where they are fitted already nothing is done.

        Raises:
            RuntimeError: there is no sample.
        """
        calibration = self.state.calibration
        if not calibration.gathers:
            return
        calibration.reservoir = calibration.reservoir.merged(self.device)
        if not len(calibration.reservoir):
            raise RuntimeError(
                f"criterion {self.config.criterion!r} and compensation {self.config.compensation!r} learn from "
                "dense training steps, and none with context tokens has run. Let one step run before sparsity."
            )
        start = time.perf_counter()
        layers = decoder_layers(self.model, self.config, self.family)
        is_shown = logging.is_progress_bar_enabled() and rank_and_world()[0] == 0
        for layer in tqdm(list(layers), desc="SparseLoRA: fit", disable=not is_shown):
            # sums over all tokens take float32, also in a loop that is under autocast as a whole
            with whole_weights(layer.module, self.model), torch.autocast(self.device.type, enabled=False):
                self._fit_layer(layer)
        tokens = calibration.finish()
        self.state.forget_graphs()
        logger.info(f"SparseLoRA: fitted to {tokens} tokens of dense steps in {time.perf_counter() - start:.1f} s.")

    def _fit_layer(self, layer: Layer) -> None:
        calibration = self.state.calibration
        keeps = {link.role: link.keep for link in map(link_of, self._patched) if link.layer == layer.number}
        if keeps.get("mlp") is not None:
            calibration.fit_mlp(layer.number, MlpView.of(layer.mlp, self.family), keeps["mlp"])
        if keeps.get("o") is not None:
            roles = [role for role, keep in keeps.items() if role != "mlp" and keep is not None]
            calibration.fit_attention(layer.number, AttentionView.of(layer.attention, self.family), roles)

    def figures(self) -> dict[str, float]:
        """Figures for the log since the last call: shares of context and of saved FLOPs, sparsity, speed, replays."""
        figures, graphs = self.state.meter.read(), self.state.graphs
        return figures if graphs is None or not figures else {**figures, **graphs.figures()}

    @property
    def device(self) -> torch.device:
        """Device on which the model takes its input."""
        return causal_model(self.model).get_input_embeddings().weight.device

    def save(self, folder: str | Path, write: bool | None = None) -> None:
        """Write the configuration, and what dense steps have gathered if anything, into a checkpoint's folder.

        Every rank must call, since each holds a part of the sample.

        Args:
            folder: the checkpoint's folder.
            write: whether this rank writes; None lets rank 0 write.
        """
        tensors = self.state.calibration.tensors(self.device)
        if not (rank_and_world()[0] == 0 if write is None else write):
            return
        Path(folder).mkdir(parents=True, exist_ok=True)
        if self.config.needs_statistics:
            tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
            metadata = {_PARTS: " ".join(sorted(self._sparse_parts()))} if self.is_attached else None
            write_atomically(Path(folder) / CALIBRATION_FILE, save(tensors, metadata))
        self.config.to_yaml(Path(folder))

    def load(self, folder: str | Path) -> bool:
        """Take back what dense steps had gathered when a checkpoint was written.

        Returns:
            Whether the folder has statistics and they serve every sparse part; if not, a new sample is gathered from
            the next dense steps.

        Raises:
            ValueError: the file is damaged.
        """
        self.source, path = Path(folder), Path(folder) / CALIBRATION_FILE
        calibration, devices = self.state.calibration, self._layer_devices()
        calibration.reset()
        self.state.forget_graphs()
        if not path.is_file():
            return False
        try:
            tensors = load_file(path)
            with safe_open(path, framework="pt") as file:
                parts = (file.metadata() or {}).get(_PARTS)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} is damaged ({error}). Resume from another checkpoint, or delete the file: a new sample is "
                "then gathered from dense steps."
            ) from error
        missing = self._sparse_parts() - set(parts.split()) if parts is not None else ()
        if missing:
            logger.warning(
                f"SparseLoRA: {path} was written where {len(missing)} of the projections and MLPs that are sparse "
                "here were dense, and does not serve them. A new sample is gathered from dense steps."
            )
            return False
        calibration.load({name: tensor.to(_device_of(name, devices)) for name, tensor in tensors.items()})
        return True

    def _sparse_parts(self) -> set[str]:
        """Layer and role of everything that drops channels."""
        return {f"{link.layer}.{link.role}" for link in map(link_of, self._patched) if link.keep is not None}

    def _layer_devices(self) -> dict[str, torch.device]:
        layers = decoder_layers(self.model, self.config, self.family)
        return {str(x.number): next(x.attention.parameters()).device for x in layers}

    def restore(self) -> nn.Module:
        """Undo everything; calling it again does nothing. Returns the model."""
        self.state.reset()
        self.undo(0, 0)
        return self.model

    def undo(self, patched: int, hooks: int) -> None:
        """Take back the latest patches and hooks, down to so many of each."""
        while len(self._patched) > patched:
            unpatch(self._patched.pop())
        while len(self._hooks) > hooks:
            self._hooks.pop().remove()

    def __enter__(self) -> "SparseLoraHandle":
        return self

    def __exit__(self, *exception) -> None:
        self.restore()

    def __repr__(self) -> str:
        counts = {name: sum(d.outcome == name for d in self.decisions) for name in ("sparse", "exact", "dense")}
        return f"SparseLoraHandle({', '.join(f'{count} {name}' for name, count in counts.items())})"

    def report(self) -> str:
        """One line per module: sparse with its realised sparsity, exact savings alone, or dense and why.

        Exact savings that this model does not allow follow, each with its reason.
        """
        lines = []
        for d in self.decisions:
            kept = (
                f", keeps {d.keep} of {d.width} channels ({d.sparsity:.1%} dropped)" if d.outcome == "sparse" else ""
            )
            lines.append(f"{d.name}: {d.outcome}{kept}{f' ({d.reason})' if d.reason else ''}")
        lines += [f"exact saving {name}: off ({reason})" for name, reason in self.state.withheld.items()]
        return "\n".join(lines)


def _device_of(name: str, devices: dict[str, torch.device]) -> torch.device:
    """Where a tensor of the calibration belongs: with its layer, whose number is a part of its name."""
    layer = next((part for part in name.split(".") if part in devices), None)
    return torch.device("cpu") if layer is None else devices[layer]
