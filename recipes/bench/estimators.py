"""Quality of channel scores: which share of the oracle set's energy do the channels keep that an estimator picks?

    python recipes/bench/estimators.py

Forward passes of the shared checkpoints alone. The energy of a channel is the square of its true score over the
context tokens of a batch, the first three quarters of each row; a share is the mean over batches. Statistics come from
TinyStories, on which the checkpoints were pretrained; judged are other stories, and grade-school problems.
"""

import argparse
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType

import torch
import transformers
from accuracy_subjects import DATA, TEXTS, chunks
from step import RESULTS, append_csv, environment
from transformers import AutoModelForCausalLM

from sparselora_hf import SparseLoraConfig
from sparselora_hf.calibration import Calibration
from sparselora_hf.channels import top_channels
from sparselora_hf.criteria import CRITERIA, Criterion
from sparselora_hf.decoder import decoder_layers
from sparselora_hf.families import find_family
from sparselora_hf.layers import kept_channels
from sparselora_hf.svd import truncated_svd
from sparselora_hf.views import AttentionView, MlpView

ESTIMATORS = MappingProxyType(
    {
        "random": {"criterion": "random"},
        "svd_mean": {"criterion": "svd_mean"},
        "svd": {"criterion": "svd"},
        "svd, 64 tokens": {"criterion": "svd", "score_tokens": 64},
        "svd, rank 32": {"criterion": "svd", "rank": 32},
        "svd_whitened": {"criterion": "svd_whitened"},
        "svd_whitened, 64 tokens": {"criterion": "svd_whitened", "score_tokens": 64},
        "svd_whitened, rank 32": {"criterion": "svd_whitened", "rank": 32},
        "sampled, 16 tokens": {"criterion": "sampled", "score_tokens": 16},
        "sampled, 64 tokens": {"criterion": "sampled"},
        "sampled, 256 tokens": {"criterion": "sampled", "score_tokens": 256},
        "static": {"criterion": "static"},
        "output": {"criterion": "output"},
    }
)
# so many tokens at the end of each row: their true activations are computed anyway
OUTPUT_ROWS = MappingProxyType({"64 output rows": 64, "8 output rows": 8, "3 output rows": 3})
HINDSIGHT = "best fixed set"  # of the very batches that judge it
PARTS = ("mlp", "qk", "vo")
LENGTH = 256
CONTEXT = 192


@dataclasses.dataclass(frozen=True)
class Probe:
    """One layer of a frozen model: its views, by the part that a score belongs to."""

    mlp: MlpView
    attention: AttentionView

    def scores(self, criterion: Criterion, part: str, layer: int, x: torch.Tensor, step: int) -> torch.Tensor:
        """Scores of one part's channels from its inputs ``[B, S, H]``."""
        rows = torch.arange(x.shape[0] * x.shape[1])
        sampled = criterion.sample(x.reshape(len(rows), -1), rows, rows // x.shape[1])
        return getattr(criterion, part)(layer, self.mlp if part == "mlp" else self.attention, sampled, step)

    def output_scores(self, criterion: Criterion, layer: int, x: torch.Tensor) -> torch.Tensor:
        """Scores of the MLP's channels from output rows ``[B, S, H]``."""
        x = x.flatten(0, 1)
        return criterion.mlp_of_output(layer, x, self.mlp.channels(x), torch.arange(len(x)))


class Subject:
    """A model with a probe of every layer, and the inputs of its layers for a batch of token ids."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        family = find_family(self.model.config.model_type)
        self.layers = list(decoder_layers(self.model, SparseLoraConfig(), family))
        self.probes = [
            Probe(MlpView.of(layer.mlp, family), AttentionView.of(layer.attention, family)) for layer in self.layers
        ]

    @torch.no_grad()
    def inputs(self, ids: torch.Tensor) -> dict[tuple[str, int], torch.Tensor]:
        """Inputs ``[B, S, H]`` of every MLP and attention module, by kind and layer, for ids ``[B, S]``."""
        found = {}

        def keep(key):
            def hook(module, args, kwargs):
                found[key] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

            return hook

        hooks = []
        for layer in self.layers:
            for kind, module in (("mlp", layer.mlp), ("attention", layer.attention)):
                hooks.append(module.register_forward_pre_hook(keep((kind, layer.number)), with_kwargs=True))
        self.model(input_ids=ids)
        for hook in hooks:
            hook.remove()
        return found

    @torch.no_grad()
    def criterion(self, settings: dict, statistics: dict[tuple[str, int], torch.Tensor]) -> Criterion:
        """A criterion with its factors, or what it learns from inputs of dense steps."""
        config = SparseLoraConfig(mlp_sparsity=0.5, **settings)
        calibration, factors = Calibration(config), {}
        picks, slots = calibration.reservoir.draw(statistics["mlp", 0].shape[:2].numel(), 0)
        for (kind, layer), x in statistics.items():
            calibration.reservoir.put(f"{kind}.{layer}", x.flatten(0, 1)[picks], slots)
        for number, probe in enumerate(self.probes):
            if config.needs_statistics:
                calibration.fit_mlp(number, probe.mlp, keep=1)
                calibration.fit_attention(number, probe.attention, list(probe.attention.inputs))
            inputs = {**probe.mlp.inputs, **probe.attention.inputs} if CRITERIA[config.criterion].needs_factors else {}
            for role, projection in inputs.items():
                factors[number, role] = truncated_svd(projection.weight, config.rank)
        return CRITERIA[config.criterion](factors, calibration, config)


def share(energy: torch.Tensor, index: torch.Tensor) -> float:
    """Energy of a set over that of the best set of its size."""
    return float(energy[index].sum() / energy.topk(len(index)).values.sum())


def scores_of(
    probe: Probe, part: str, layer: int, xs: list[torch.Tensor], criteria: dict[str, Criterion], oracle: Criterion
) -> tuple[list[torch.Tensor], dict[str, list[torch.Tensor]]]:
    """Energy of the channels of one part in each batch ``[B, S, H]``, and the scores by estimator."""
    context = [x[:, :CONTEXT] for x in xs]
    energies = [probe.scores(oracle, part, layer, x, 0).square() for x in context]
    scores = {}
    for name, criterion in criteria.items():
        if criterion.reads_output and part == "mlp":
            for rows, tokens in OUTPUT_ROWS.items():
                scores[f"{name}, {rows}"] = [probe.output_scores(criterion, layer, x[:, -tokens:]) for x in xs]
        else:
            scores[name] = [probe.scores(criterion, part, layer, x, step) for step, x in enumerate(context)]
    for rows, tokens in OUTPUT_ROWS.items():
        scores[f"{rows} alone"] = [probe.scores(oracle, part, layer, x[:, -tokens:], 0) for x in xs]
    scores[HINDSIGHT] = [torch.stack(energies).sum(0)] * len(xs)
    return energies, scores


@torch.no_grad()
def rows_of(checkpoint: str, text: str, sparsities: list[float], batches: int, batch: int) -> Iterator[dict]:
    """One row per estimator, part, layer and sparsity."""
    folder = DATA / "models" / checkpoint
    subject = Subject(folder)
    statistics = subject.inputs(chunks(folder, "stories", "train", LENGTH)[:batch])
    judged = [subject.inputs(ids) for ids in chunks(folder, text, "test", LENGTH)[: batches * batch].split(batch)]
    oracle = subject.criterion({"criterion": "oracle"}, statistics)
    criteria = {name: subject.criterion(settings, statistics) for name, settings in ESTIMATORS.items()}
    for (layer, probe), part in itertools.product(enumerate(subject.probes), PARTS):
        xs = [inputs["mlp" if part == "mlp" else "attention", layer] for inputs in judged]
        energies, scores = scores_of(probe, part, layer, xs, criteria, oracle)
        for name, sparsity in itertools.product(scores, sparsities):
            keep = kept_channels(len(energies[0]), sparsity)
            shares = [share(e, top_channels(s, keep)) for e, s in zip(energies, scores[name], strict=True)]
            yield {
                "checkpoint": checkpoint,
                "text": text,
                "estimator": name,
                "part": part,
                "layer": layer,
                "sparsity": sparsity,
                "keep": keep,
                "share": round(sum(shares) / len(shares), 4),
                "batches": len(xs),
            }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoints", nargs="+", default=["babyllama361", "stories260K"])
    parser.add_argument("--texts", nargs="+", default=sorted(TEXTS), choices=sorted(TEXTS))
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.5, 0.75, 0.9, 0.97, 0.99])
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8, help="rows of 256 tokens in a batch")
    parser.add_argument("--csv", type=Path, default=RESULTS / "accuracy-estimators.csv", help="written anew")
    args = parser.parse_args(argv)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    where = environment("cpu")
    args.csv.unlink(missing_ok=True)
    for checkpoint in args.checkpoints:
        for text in args.texts:
            found = rows_of(checkpoint, text, args.sparsities, args.batches, args.batch)
            append_csv(args.csv, [{**row, **where} for row in found])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
