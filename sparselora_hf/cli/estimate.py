"""`sparselora estimate`: what a schedule can save on a model, from shapes alone; no weights are loaded."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..config import SparseLoraConfig, read_settings
from ..cost import (
    GROUPS,
    BatchShape,
    LoraShape,
    ModelShape,
    StepCost,
    activation_bytes,
    bound,
    keep_lists,
    layer_cost,
    step_cost,
    weight_bytes,
)
from ..counting import count_layers
from ..families import FAMILIES
from ..shapes import MODEL_SHAPES
from .settings import add_sparse_arguments, configured, positive, sparse_settings, to_arguments

__all__ = ["Estimate", "counted_shape", "estimate", "main", "model_shape", "run_bound"]


class Estimate(NamedTuple):
    """Costs of three steps (dense, dense with the exact savings, sparse) and what they were computed for."""

    model: ModelShape
    batch: BatchShape
    lora: LoraShape
    config: SparseLoraConfig
    checkpointing: bool
    dense: StepCost
    exact: StepCost
    sparse: StepCost


def model_shape(name: str) -> ModelShape:
    """Shape of a model.

    Args:
        name: a key of `shapes.MODEL_SHAPES`, a folder, a `config.json`, or a name on the hub.

    Raises:
        OSError: nothing of that name, or the hub is out of reach.
        ValueError: a configuration without the fields that give a shape.
    """
    from transformers import AutoConfig

    if name in MODEL_SHAPES:
        return counted_shape(AutoConfig.for_model(**MODEL_SHAPES[name]))
    try:
        config = AutoConfig.from_pretrained(name)
    except OSError as error:
        known = ", ".join(MODEL_SHAPES)
        raise OSError(f"{name}: no such shape, folder or model within reach. Shapes: {known}. ({error})") from error
    return counted_shape(config)


def counted_shape(config: Any) -> ModelShape:
    """Shape of a configuration; of a known family, counted in its modules, which are built without memory.

    Of an unknown one it is what `ModelShape.from_config` takes for granted, with a warning.
    """
    import torch
    from transformers import MODEL_MAPPING, AutoModel
    from transformers.utils import logging

    shape, text_config = ModelShape.from_config(config), config.get_text_config()
    family = FAMILIES.get(text_config.model_type)
    if family is None:
        logging.get_logger(__name__).warning(
            f"Model type {text_config.model_type!r} is in no row of the family table. Counted are, in every layer "
            "alike, a gated MLP (gate, up, down) and an attention with q, k, v and o, which the model may not have. "
            "To train it, describe it with ModelFamily(...)."
        )
        return shape
    source = text_config if type(text_config) in MODEL_MAPPING else config  # PaddleOCR-VL's tower is none by itself
    with torch.device("meta"):
        model = AutoModel.from_config(source, dtype=torch.bfloat16, attn_implementation="eager")
    decoder = model.get_decoder()
    weights = sum(weight.numel() for weight in decoder.parameters())
    weights += 0 if shape.tied else shape.vocab * shape.hidden
    return dataclasses.replace(count_layers(shape, decoder, family), counted=weights)


def _sparse_options(config: SparseLoraConfig, batch: BatchShape) -> dict[str, int | None]:
    criterion, tokens = config.criterion, config.score_tokens
    by_weights, by_factors = criterion in ("oracle", "sampled"), criterion.startswith("svd")
    rows = {"svd_mean": batch.batch, "sampled": tokens or 64}  # the former averages each sequence
    return {
        "rank": None if by_weights else config.rank if by_factors else 0,
        "score_tokens": rows.get(criterion, tokens),
        "compensation_rank": config.compensation_rank if config.compensation == "low_rank" else 0,
    }


def estimate(
    model: ModelShape, batch: BatchShape, lora: LoraShape, config: SparseLoraConfig, *, checkpointing: bool, head: str
) -> Estimate:
    """Cost of a dense step as TRL runs it, of one with the exact savings, and of a sparse one."""
    if head == "labels":  # a GPU
        config = config.replace(exact=tuple(name for name in config.exact if name != "recomputation"))
    mlp_keep, attention_keep = keep_lists(config, model)
    shared: dict[str, Any] = {"checkpointing": checkpointing, "head": head}
    keep = {"mlp_keep": mlp_keep, "attention_keep": attention_keep}
    dense = step_cost(model, batch, lora, **shared)
    exact = step_cost(model, batch, lora, exact=config.exact, **shared)
    sparse = step_cost(model, batch, lora, exact=config.exact, **keep, **_sparse_options(config, batch), **shared)
    return Estimate(model, batch, lora, config, checkpointing, dense, exact, sparse)


def run_bound(result: Estimate) -> float | None:
    """Bound over a whole run, its dense steps included; None where the configuration counts steps."""
    start, end = result.config.start_step, result.config.end_step
    if not (isinstance(start, float) and isinstance(end, float)):
        return None
    sparse = end - start
    return result.dense.total / (sparse * result.sparse.total + (1.0 - sparse) * result.exact.total)


def _layer_rows(result: Estimate) -> list[dict[str, Any]]:
    """Per layer: channels kept and FLOPs of the linears, dense and sparse."""
    rows = []
    options = {"exact": result.config.exact, "checkpointing": result.checkpointing}
    keeps = zip(*keep_lists(result.config, result.model), strict=True)
    for layer, (mlp, attention) in enumerate(keeps):
        where = (result.model, result.batch, result.lora, layer)
        dense = layer_cost(*where, checkpointing=result.checkpointing)
        sparse = layer_cost(
            *where, mlp_keep=mlp, attention_keep=attention, **options, **_sparse_options(result.config, result.batch)
        )
        kept = {"mlp_keep": mlp, "attention_keep": attention}
        rows.append({"layer": layer, **kept, "dense_flops": dense.linear, "sparse_flops": sparse.linear})
    return rows


def _memory(result: Estimate) -> dict[str, float]:
    shared: dict[str, Any] = {"checkpointing": result.checkpointing}
    where = (result.model, result.batch, result.lora)
    mlp_keep, _ = keep_lists(result.config, result.model)
    return {
        "weights": weight_bytes(result.model, result.lora),
        "dense_activations": activation_bytes(*where, **shared),
        "sparse_activations": activation_bytes(*where, mlp_keep=mlp_keep, exact=result.config.exact, **shared),
    }


def _step_row(result: Estimate, name: str) -> dict[str, Any]:
    cost: StepCost = getattr(result, name)
    groups = {group: getattr(cost, group).total for group in GROUPS}
    passes = {"forward_flops": cost.forward, "backward_flops": cost.backward, "bytes": cost.bytes}
    return {"flops": cost.total, **passes, "bound": bound(result.dense, cost), "groups": groups}


def _as_dict(result: Estimate) -> dict[str, Any]:
    return {
        "model": dataclasses.asdict(result.model) | {"parameters": result.model.parameters},
        "batch": dataclasses.asdict(result.batch),
        "lora": dataclasses.asdict(result.lora),
        "config": result.config.to_dict(),
        "checkpointing": result.checkpointing,
        "steps": {name: _step_row(result, name) for name in ("dense", "exact", "sparse")},
        "run_bound": run_bound(result),
        "memory_bytes": _memory(result),
        "layers": _layer_rows(result),
    }


def _layer_table(result: Estimate) -> Any:
    from rich.table import Table

    table = Table(title="Linear layers, forward and backward", title_justify="left")
    for column in ("layer", "MLP kept", "k/v kept", "dense GFLOP", "sparse GFLOP", "ratio"):
        table.add_column(column, justify="right")
    for row in _layer_rows(result):
        kept = (f"{row['mlp_keep'] or 'all'}", f"{row['attention_keep'] or 'all'}")
        flops = (row["dense_flops"], row["sparse_flops"])
        ratio = f"{flops[0] / flops[1]:.2f}x"
        table.add_row(str(row["layer"]), *kept, *(f"{value / 1e9:,.1f}" for value in flops), ratio)
    return table


def _step_table(result: Estimate) -> Any:
    from rich.table import Table

    steps = {name: _step_row(result, name) for name in ("dense", "exact", "sparse")}
    table = Table(title="One step, GFLOP", title_justify="left")
    table.add_column("group")
    for name in steps:
        table.add_column(name, justify="right")
    for group in GROUPS:
        table.add_row(group, *(f"{row['groups'][group] / 1e9:,.1f}" for row in steps.values()))
    table.add_section()
    table.add_row("total", *(f"{row['flops'] / 1e9:,.1f}" for row in steps.values()))
    table.add_row("bound", *(f"{row['bound']:.2f}x" for row in steps.values()))
    return table


def _show(result: Estimate) -> None:
    from rich.console import Console

    console = Console(soft_wrap=True)
    batch, memory = result.batch, {name: value / 2**30 for name, value in _memory(result).items()}
    console.print(
        f"{result.model.parameters / 1e6:,.0f} M parameters; {batch.batch} x {batch.sequence} tokens: "
        f"{batch.context} context, {batch.output} output, {batch.padding} padding"
    )
    console.print(_layer_table(result))
    console.print(_step_table(result))
    whole = run_bound(result)
    if whole is not None:
        console.print(f"Bound over the run, with its dense steps: {whole:.2f}x")
    console.print(
        f"Memory: weights {memory['weights']:.2f} GiB (bf16, fp32 adapters with optimizer); activations "
        f"{memory['dense_activations']:.2f} GiB dense, {memory['sparse_activations']:.2f} GiB sparse"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sparselora estimate", description=__doc__.partition(": ")[2], allow_abbrev=False
    )
    parser.add_argument("model", help=f"name on the hub, folder, config.json, or a shape: {', '.join(MODEL_SHAPES)}")
    parser.add_argument("--sparse-config", type=Path, help="YAML file of settings, or its folder; flags win over it")
    parser.add_argument("--batch", type=positive, default=8, help="rows of a batch")
    parser.add_argument("--sequence", type=positive, default=512, help="tokens of a row")
    parser.add_argument("--output", type=positive, default=128, help="answer tokens of a row")
    parser.add_argument("--fill", type=float, default=1.0, help="share of a row that is no padding")
    parser.add_argument("--lora-rank", type=positive, default=32, help="rank of LoRA on attention's linears")
    parser.add_argument("--checkpointing", action="store_true", help="activations are recomputed in backward")
    parser.add_argument(
        "--head", choices=("all", "labels"), default="labels", help="positions TRL scores (GPU: labels)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_sparse_arguments(parser)
    return parser


def _config(arguments: argparse.Namespace, shape: ModelShape) -> SparseLoraConfig:
    stored = {}
    if arguments.sparse_config is not None:
        stored = to_arguments(read_settings(arguments.sparse_config))
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    return configured(sparse_settings({**stored, **given}), shape.layers, shape.hidden)


def main(argv: Sequence[str]) -> int:
    """Print the estimate; without a schedule, for that which `SparseLoraTrainer` picks by itself.

    Raises:
        OSError, ValueError: no such model or file, or a setting out of range.
    """
    arguments = _parser().parse_args(argv)
    batch = BatchShape.full(arguments.batch, arguments.sequence, arguments.output, arguments.fill)
    model = model_shape(arguments.model)
    result = estimate(
        model,
        batch,
        LoraShape(arguments.lora_rank),
        _config(arguments, model),
        checkpointing=arguments.checkpointing,
        head=arguments.head,
    )
    if arguments.json:
        from rich.console import Console

        Console(soft_wrap=True).print_json(json.dumps(_as_dict(result)))
    else:
        _show(result)
    return 0
