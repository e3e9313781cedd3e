"""The model under evaluation: a base model with an adapter that belongs to it."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils import logging

__all__ = ["QLORA", "adapter_hash", "base_of", "load_model", "weights_mark"]

logger = logging.get_logger(__name__)

# as QLoRA trains (arXiv 2305.14314)
QLORA = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
}


def base_of(adapter: str) -> str:
    """Name of the model that an adapter was trained on.

    Raises:
        OSError: no adapter of that name can be reached.
        ValueError: the adapter does not say.
    """
    from peft import PeftConfig

    try:
        base = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    except (OSError, ValueError) as error:
        # PEFT puts adapters of other names than `default` into folders of their own
        inner = sorted(str(path.parent) for path in Path(adapter).glob("*/adapter_config.json"))
        if inner:
            remedy = f"those in it are {', '.join(inner)}"
        elif (Path(adapter) / "config.json").is_file():
            remedy = f"the folder holds a whole model, which --model {adapter} names"
        else:
            remedy = "no such folder, or none that can be reached"
        raise OSError(f"There is no adapter {adapter}: {remedy}.") from error
    if not base:
        raise ValueError(f"The adapter {adapter} does not name its base model. Name it: --model NAME.")
    return base


def adapter_hash(adapter: str | None) -> str | None:
    """Hash of a local adapter's weights, for noticing that it was trained anew."""
    path = Path(adapter or "") / "adapter_model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if adapter and path.is_file() else None


def weights_mark(base: str) -> str | None:
    """Short hash of the names, sizes and times of a folder's weight files, for noticing that they were changed.

    None of a name on the hub. The weights themselves are not read: that would take as long as loading them.
    """
    files = [path for end in ("safetensors", "bin") for path in sorted(Path(base).glob(f"*.{end}"))]
    told = [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16] if told else None


def load_model(
    base: str,
    adapter: str | None,
    dtype: str = "auto",
    quantization: Mapping[str, Any] | None = None,
    revision: str = "main",
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Model, with its adapter, and tokenizer.

    Args:
        base: name or folder of the base model.
        adapter: name or folder of the adapter; None takes the base alone.
        dtype: type of the weights; ``auto`` is the checkpoint's, float32 without an accelerator.
        quantization: settings of `BitsAndBytesConfig`; None loads the base as its checkpoint is.
        revision: branch, tag or commit of a base on the hub.
        trust_remote_code: run code that comes with the base.

    Raises:
        OSError: base or tokenizer cannot be reached.
        ValueError: the adapter is of another base model, or `dtype` is no type.
    """
    import torch
    from transformers import AutoTokenizer, BitsAndBytesConfig

    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"dtype: {dtype!r} is neither auto nor a type of torch, as bfloat16 is.")
    on_cpu = not torch.accelerator.is_available()
    dtype = "float32" if on_cpu and dtype == "auto" else dtype
    source = {"revision": revision, "trust_remote_code": trust_remote_code}
    extra = {"quantization_config": BitsAndBytesConfig(**quantization)} if quantization else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(_tokenizer_of(base, adapter), **source)
        model = _kind_of(base, source).from_pretrained(
            base, dtype=dtype, device_map="cpu" if on_cpu else "auto", **source, **extra
        )
    except OSError as error:
        raise OSError(
            f"The model {base} cannot be loaded ({type(error).__name__}): no such folder, or no network to fetch it. "
            "Name a folder: --model PATH."
        ) from error
    return (model if adapter is None else _with_adapter(model, base, adapter)).eval(), tokenizer


def _kind_of(base: str, source: dict[str, Any]) -> Any:
    """Auto class of a base: the one whose model its checkpoint names, which is what TRL trains.

    Most vision-language models, whose language tower answers, are no causal model's; of some there are both.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING as CAUSAL
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING as WITH_IMAGES
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(base, **source)
    kind, named = type(config), config.architectures or ()
    is_whole = kind in WITH_IMAGES and (kind not in CAUSAL or WITH_IMAGES[kind].__name__ in named)
    return AutoModelForImageTextToText if is_whole else AutoModelForCausalLM


def _tokenizer_of(base: str, adapter: str | None) -> str:
    """Where the tokenizer is: a training saves its own, with the chat template and end token that it was told."""
    return adapter if adapter and (Path(adapter) / "tokenizer_config.json").is_file() else base


def _with_adapter(model: Any, base: str, adapter: str) -> Any:
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    trained_on = base_of(adapter)
    try:
        weights = load_peft_weights(adapter, device="cpu")
        _resize(model, weights)
        wrapped = PeftModel.from_pretrained(model, adapter)
        strangers = set(weights) ^ set(get_peft_model_state_dict(wrapped))
    except (RuntimeError, ValueError):  # other widths, or no module of that name
        strangers = {"widths or names of modules differ"}
    if strangers:
        raise ValueError(
            f"The adapter {adapter} was trained on {trained_on} and does not fit {base} ({min(strangers)}). "
            "Name its own base model: --model NAME."
        )
    if Path(trained_on).name != Path(base).name:
        logger.warning(f"The adapter {adapter} was trained on {trained_on}; it is evaluated on {base}.")
    return wrapped


def _resize(model: Any, weights: Mapping[str, Any]) -> None:
    """Give the model as many embeddings as a training with tokens of its own has saved with its adapter."""
    embedding = model.get_input_embeddings()
    (start,) = (f"base_model.model.{name}." for name, module in model.named_modules() if module is embedding)
    rows = {len(weight) for name, weight in weights.items() if name.startswith(start) and name.endswith("weight")}
    if rows and rows != {embedding.num_embeddings}:
        model.resize_token_embeddings(max(rows))
