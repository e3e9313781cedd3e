"""`sparselora sft`: TRL's supervised fine-tuning with SparseLoRA, from a YAML recipe, flags, or both.

All of TRL's flags and recipe keys keep their names and meaning. New are SparseLoRA's settings (see `settings.py`, also
as a section `sparselora:` of the recipe) and those of `DataArguments`. Flags win over the recipe, and settings without
a schedule change the model's default; an unknown key or flag is an error. LoRA is on unless `use_peft: false` says
otherwise, which only `--dense` accepts.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..files import write_atomically
from .recipe import DATA_FILE, DataArguments, Recipe, parse
from .resume import run_to_end
from .settings import configured

__all__ = ["DataArguments", "Recipe", "main", "make_trainer", "parse", "trainer_keywords"]

logger = logging.get_logger(__name__)


def _examples(recipe: Recipe, split: str) -> Any:
    from ..prompts import TextWindow, format_examples, load_examples

    options = recipe.data
    window = TextWindow(options.window_characters, options.prompt_share)
    most = None if options.long_rows == "drop" else options.max_examples  # rows may yet be left out
    if not recipe.mixture.datasets:
        return load_examples(
            recipe.script.dataset_name,
            split,
            options.prompt_format,
            options.train_on,
            most,
            config_name=recipe.script.dataset_config,
            window=window,
        )
    from trl import get_dataset

    rows = format_examples(get_dataset(recipe.mixture)[split], options.prompt_format, options.train_on, window)
    return rows if most is None else rows.take(min(most, len(rows)))


def _check_columns(rows: Any, text_field: str) -> None:
    readable = ("prompt", "messages", "conversations", "input_ids", text_field)
    if not any(column in rows.column_names for column in readable):
        raise ValueError(
            f"TRL reads none of the columns {', '.join(rows.column_names)}. Pick a --prompt_format, "
            f"or give rows with one of {', '.join(readable)}."
        )


def _prepared(recipe: Recipe, split: str, tokenizer: Any) -> Any:
    """Rows for a trainer: plain prompts and completions with exact labels, everything else as TRL takes it.

    Prompts with images are TRL's too: its collator puts both together, batch by batch.
    """
    from ..labels import label_examples

    options, training = recipe.data, recipe.training
    rows = _examples(recipe, split)
    _check_columns(rows, training.dataset_text_field)
    is_text = {"prompt", "completion"} <= set(rows.column_names) and isinstance(rows[0]["prompt"], str)
    is_text &= not _has_images(rows)
    if not is_text or not tokenizer.is_fast or training.completion_only_loss is False:
        if options.long_rows == "drop":
            raise ValueError(
                "long_rows: TRL prepares these rows and cuts them at max_length. Leaving rows out takes plain prompts "
                "and completions, and a fast tokenizer."
            )
        return rows
    if training.truncation_mode != "keep_start":
        raise ValueError(
            f"truncation_mode: {training.truncation_mode!r} is for rows that TRL prepares. Plain prompts and "
            "completions are cut at their end, or left out with long_rows: drop."
        )
    longest = None if training.packing and options.long_rows == "cut" else training.max_length
    return label_examples(
        rows, tokenizer, longest, options.long_rows, options.max_examples, training.dataset_num_proc
    )[0]


def _has_images(rows: Any) -> bool:
    """Whether TRL takes rows for those of a vision-language model."""
    return not {"image", "images"}.isdisjoint(rows.column_names)


def trainer_keywords(recipe: Recipe) -> dict[str, Any]:
    """Arguments that `SFTTrainer` and `SparseLoraTrainer` share: model, data, tokenizer, adapter."""
    from transformers import AutoTokenizer
    from trl import get_peft_config, get_quantization_config
    from trl.data_utils import is_conversational, is_conversational_from_value

    model, training = recipe.model, recipe.training
    source = {"revision": model.model_revision, "trust_remote_code": training.trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(model.model_name_or_path, **source)
    except OSError as error:
        raise OSError(
            f"The model {model.model_name_or_path} cannot be loaded: no such folder, or no network or permission to "
            "fetch it. Name a folder: --model_name_or_path PATH."
        ) from error
    if training.eos_token in tokenizer.get_vocab():  # another is TRL's to refuse
        tokenizer.eos_token = training.eos_token  # TRL does this too, but after the rows are labelled here
    init = {**source, "attn_implementation": model.attn_implementation, "dtype": model.dtype}
    training.model_init_kwargs = {**init, **(training.model_init_kwargs or {})}
    evaluated = training.eval_strategy != "no"
    with training.main_process_first(desc="the data is prepared"):
        train = _prepared(recipe, recipe.script.dataset_train_split, tokenizer)
        test = _prepared(recipe, recipe.script.dataset_test_split, tokenizer) if evaluated else None
    recipe.data.is_chat = is_conversational(train[0]) or is_conversational_from_value(train[0])
    quantization = get_quantization_config(model)
    return {
        "model": model.model_name_or_path,
        "args": training,
        "train_dataset": train,
        "eval_dataset": test,
        "processing_class": None if _has_images(train) else tokenizer,  # for images TRL loads the model's processor
        "peft_config": get_peft_config(model),
        **({} if quantization is None else {"quantization_config": quantization}),
    }


def make_trainer(recipe: Recipe, keywords: dict[str, Any]) -> Any:
    """The trainer that a recipe asks for, from `trainer_keywords`."""
    if recipe.data.dense:
        from trl import SFTTrainer

        from ..modules.layout import TrainingLayout

        trainer = SFTTrainer(**keywords)
        TrainingLayout(trainer.model)  # on some CPUs the first evaluation would end the learning over a 4-bit base
    else:
        from ..trainer import SparseLoraTrainer

        trainer = SparseLoraTrainer(**keywords, sparse_config=_sparsity(recipe))
    if recipe.training.fp16:
        _widen_adapters(trainer.model)
    if not recipe.training.packing:
        _count_dropped(len(keywords["train_dataset"]), len(trainer.train_dataset))
    return trainer


def _sparsity(recipe: Recipe) -> Any:
    """The configuration that a recipe asks for; None leaves it to the trainer, and to a checkpoint of the run."""
    if not recipe.sparse:
        return None
    from transformers import AutoConfig

    source = recipe.training.model_init_kwargs  # may change the shape
    shape = AutoConfig.from_pretrained(recipe.model.model_name_or_path, **source).get_text_config()
    return configured(recipe.sparse, shape.num_hidden_layers, shape.hidden_size)


def _count_dropped(before: int, after: int) -> None:
    """Say how many rows TRL has left out: those of conversations, which it prepares itself."""
    if after < before:
        logger.warning(f"{before - after} of {before} rows have no label within max_length tokens and are dropped.")


def _widen_adapters(model: Any) -> None:
    """TRL makes the adapters of a quantised model bfloat16, which float16's gradient scaler cannot take."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _note_data(recipe: Recipe) -> None:
    """Write beside the adapter how prompts were made and the base was quantised, for evaluation to do the same."""
    import yaml
    from trl import get_quantization_config

    from ..evaluation.asking import CHAT

    prompt_format = CHAT if recipe.data.is_chat else recipe.data.prompt_format
    notes = {"prompt_format": prompt_format, "dataset": recipe.script.dataset_name}
    quantization = get_quantization_config(recipe.model)
    if quantization is not None:
        told = quantization.to_dict().items()
        notes["quantization"] = {name: value for name, value in told if name.startswith(("load_", "llm_", "bnb_"))}
    path = Path(recipe.training.output_dir) / DATA_FILE
    write_atomically(path, yaml.safe_dump(notes).encode())


def _forget_replaced(folder: Path, is_adapter: bool) -> None:
    """Take away the answers and results of an adapter, or a whole model, that this training has replaced."""
    import json

    from ..evaluation.models import adapter_hash, weights_mark
    from .eval import RESULTS

    key, mark = ("adapter", adapter_hash) if is_adapter else ("weights", weights_mark)
    trained = mark(str(folder))
    for path in (folder / "eval").glob("*.answers.jsonl"):
        with path.open(encoding="utf-8") as file:
            settings = json.loads(file.readline() or "{}")
        if settings.get(key) != trained:
            path.unlink()
    results = folder / "eval" / RESULTS
    told = json.loads(results.read_text(encoding="utf-8")).values() if results.is_file() else ()
    if any(result.get("settings", {}).get(key) != trained for result in told):
        results.unlink()


def evaluate(recipe: Recipe) -> dict[str, float]:
    """Run the recipe's tasks, if it has any, on the adapter that was saved; their scores in per cent.

    What can be of a trained model is let go of first: there may be no room for two.
    """
    import gc
    import json

    import torch

    from .eval import RESULTS
    from .eval import main as evaluate_adapter

    data, folder = recipe.data, Path(recipe.training.output_dir)
    _note_data(recipe)
    _forget_replaced(folder, recipe.model.use_peft)
    if not data.eval_tasks:
        return {}
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    flags = [str(folder)]
    if not recipe.model.use_peft:  # a whole model
        flags = ["--overwrite", "--model", str(folder)]
    flags += ["--task", *data.eval_tasks]
    flags += ["--batch-size", str(recipe.training.per_device_eval_batch_size)]
    flags += ["--data", data.eval_data] if data.eval_data else []
    flags += ["--model-revision", recipe.model.model_revision]
    flags += ["--trust-remote-code"] if recipe.training.trust_remote_code else []
    flags += ["--max-new-tokens", "8", "--limit", "1", "--overwrite"] if data.smoke else []
    evaluate_adapter(flags)
    results = json.loads((folder / "eval" / RESULTS).read_text(encoding="utf-8"))
    return {task: result["score"] for task, result in results.items() if "score" in result}


def _check_tasks(recipe: Recipe) -> None:
    """Say before the training what would go wrong after it."""
    from ..evaluation.harness import PREFIX, check_harness
    from ..evaluation.tasks import find_tasks, load_questions

    check_harness([name.removeprefix(PREFIX) for name in recipe.data.eval_tasks if name.startswith(PREFIX)])
    tasks = find_tasks([name for name in recipe.data.eval_tasks if not name.startswith(PREFIX)])
    if tasks and recipe.data.prompt_format == "text_split":
        raise ValueError(
            f"eval_tasks: text_split cuts running text and has no words to put a question of {tasks[0].name} in. "
            "Leave eval_tasks out, and ask afterwards with sparselora eval --prompt-format."
        )
    for task in tasks:
        if recipe.data.eval_data is not None:
            load_questions(task, recipe.data.eval_data, limit=1)


def prepare(argv: Sequence[str]) -> Recipe:
    """Read recipe and flags; with `--smoke`, make the model and data it then runs on."""
    recipe = parse(argv)
    _check_tasks(recipe)
    if recipe.data.smoke:
        from .smoke import furnish

        furnish(recipe)
    return recipe


def _train(recipe: Recipe) -> bool:
    """Train, save and report; returns whether this is the process that reports."""
    from rich.console import Console

    trainer = make_trainer(recipe, trainer_keywords(recipe))
    start = time.perf_counter()
    result, was_done = run_to_end(trainer, recipe.training.resume_from_checkpoint)
    seconds = time.perf_counter() - start
    trainer.save_model(recipe.training.output_dir)
    if recipe.training.push_to_hub:
        trainer.push_to_hub(dataset_name=recipe.script.dataset_name)
    is_main = trainer.is_world_process_zero()
    if is_main:
        kind = "dense" if recipe.data.dense else "sparse"
        told = f"{result.global_step} steps in {seconds:.1f} s, mean training loss {result.training_loss:.4f}"
        told = f"{result.global_step} steps were taken before and the run is done" if was_done else told
        Console(soft_wrap=True, markup=False, highlight=False).print(
            f"{kind}: {told}, saved to {recipe.training.output_dir}"
        )
    trainer.accelerator.end_training()
    return is_main


def main(argv: Sequence[str]) -> int:
    """Train, save the adapter and say so in one line; evaluate it where the recipe says how.

    Raises:
        FileNotFoundError, ImportError, ValueError: the recipe, the data or the environment is not fit for a run.
    """
    recipe = prepare(argv)
    if _train(recipe):
        evaluate(recipe)
    return 0
