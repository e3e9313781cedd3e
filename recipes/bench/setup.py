"""One set-up for all benchmarks: a random model of a given shape, synthetic batches, a trainer per variant.

Every variant shares the frozen weights and has adapters of its own with the same values; the baseline is
`trl.SFTTrainer` as it comes.
"""

import copy
import dataclasses
import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

from sparselora_hf import SparseLoraConfig, SparseLoraTrainer
from sparselora_hf.shapes import MODEL_SHAPES

PROTOCOLS = {"math": (512, 128), "csr": (512, 3), "code": (1024, 512), "wizard": (2048, 512)}
QUANTIZATIONS = ("none", "nf4", "int8")
VARIANTS = ("sft", "exact", "sparse", "sparse_no_exact")
# with Liger's fused layer kernels, for a GPU
LIGER = {"sft_liger": "sft", "sparse_liger": "sparse"}
# with `cuda_graphs`, for a GPU
GRAPHS = {"exact_graphs": "exact", "sparse_graphs": "sparse"}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


@dataclasses.dataclass(frozen=True)
class Workload:
    """What one step trains on: `batch` rows of `sequence` tokens, the last `output` of each row labelled.

    With `fill` below 1 the rows have different lengths, evenly spread so that their mean is `fill · sequence`,
    and are padded to the longest.
    """

    sequence: int
    output: int
    batch: int
    fill: float = 1.0

    def lengths(self) -> list[int]:
        """Length of each row of a batch."""
        if self.fill == 1.0 or self.batch == 1:
            return [self.sequence] * self.batch
        shortest = max(self.output + 1, round((2 * self.fill - 1) * self.sequence))
        step = (self.sequence - shortest) / (self.batch - 1)
        return [round(shortest + row * step) for row in range(self.batch)]

    def dataset(self, vocab: int, batches: int, seed: int = 0) -> Dataset:
        """Tokenised rows with labels, in batches of the same lengths."""
        generator = torch.Generator().manual_seed(seed)
        rows = []
        for length in self.lengths() * batches:
            ids = torch.randint(3, vocab, (length,), generator=generator).tolist()
            rows.append({"input_ids": ids, "labels": [-100] * (length - self.output) + ids[length - self.output :]})
        return Dataset.from_list(rows)


def model_config(name: str, **overrides) -> PreTrainedConfig:
    """The configuration of a model: a shape by name or the folder of a configuration."""
    if name in MODEL_SHAPES:
        values = {**MODEL_SHAPES[name], **overrides}
        return AutoConfig.for_model(values.pop("model_type"), **values, max_position_embeddings=8192)
    return AutoConfig.from_pretrained(name, **overrides)


def build_model(name: str, device: str, dtype: torch.dtype, seed: int = 0, **overrides) -> PreTrainedModel:
    """A model of `model_config` with random weights, made on the device."""
    config = model_config(name, **overrides)
    torch.manual_seed(seed)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def quantize(model: PreTrainedModel, kind: str, dtype: torch.dtype) -> PreTrainedModel:
    """Replace the linears of the layers by those of bitsandbytes, as `from_pretrained` with a configuration does.

    Args:
        model: the model, changed in place.
        kind: ``nf4`` (with double quantisation) or ``int8``; ``none`` changes nothing.
        dtype: type of products with 4-bit weights.
    """
    if kind == "none":
        return model
    import bitsandbytes as bnb

    for name, linear in list(model.base_model.named_modules()):
        if isinstance(linear, torch.nn.Linear):
            shape, bias = (linear.in_features, linear.out_features), linear.bias is not None
            if kind == "nf4":
                ways = {"compute_dtype": dtype, "compress_statistics": True, "quant_type": "nf4"}
                new = bnb.nn.Linear4bit(*shape, bias, **ways, device=linear.weight.device)
            else:
                new = bnb.nn.Linear8bitLt(*shape, bias, has_fp16_weights=False)
            new.load_state_dict(linear.state_dict())
            model.base_model.set_submodule(name, new.to(linear.weight.device))
    # TRL keeps adapters on a quantised base in bf16 and knows one by this mark
    setattr(model, "is_loaded_in_8bit" if kind == "int8" else "is_loaded_in_4bit", True)
    return model


def share_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the module tree over the same weights."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer that a trainer asks for; the data is tokenised already."""
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")), pad_token="<pad>", eos_token="<eos>"
    )


class InOrder:
    """Mixin for a trainer: rows come in the order of the dataset, so that every batch has the workload's lengths."""

    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class BenchSft(InOrder, SFTTrainer):
    """The baseline."""


class BenchSparse(InOrder, SparseLoraTrainer):
    """Ours."""


def variant_config(variant: str, sparse: SparseLoraConfig) -> SparseLoraConfig:
    """Configuration of one of ours; all start sparse at once, the dense warm-up steps are not what is timed.

    What learns from dense steps gets one, the first of a turn, which is not counted.
    """
    records, variant = variant in GRAPHS, GRAPHS.get(variant, variant)
    if variant == "exact":
        return SparseLoraConfig(start_step=0, cache_dir=sparse.cache_dir, cuda_graphs=records)
    start = int(sparse.needs_statistics)
    return sparse.replace(start_step=start, exact=variant == "sparse", cuda_graphs=records)


def build_trainer(
    variant: str,
    model: PreTrainedModel,
    workload: Workload,
    sparse: SparseLoraConfig,
    steps: int,
    *,
    lora_rank: int = 16,
    dora: bool = False,
    checkpointing: bool = False,
    callbacks: tuple[TrainerCallback, ...] = (),
    **settings,
) -> SFTTrainer:
    """A trainer for `steps` steps of the workload, the same but for the variant."""
    if variant in LIGER:
        variant, settings["use_liger_kernel"] = LIGER[variant], True
    on_cpu = model.device.type == "cpu"
    args = SFTConfig(
        tempfile.mkdtemp(),
        max_steps=steps,
        per_device_train_batch_size=workload.batch,
        max_length=workload.sequence,
        gradient_checkpointing=checkpointing,
        bf16=not on_cpu,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        learning_rate=1e-4,
        report_to="none",
        save_strategy="no",
        logging_steps=10**6,
        disable_tqdm=True,
        **settings,
    )
    kwargs = {
        "args": args,
        "train_dataset": workload.dataset(model.config.vocab_size, steps),
        "processing_class": build_tokenizer(),
        "peft_config": LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules=TARGETS, use_dora=dora),
        "callbacks": list(callbacks),
    }
    if variant == "sft":
        return BenchSft(share_weights(model), **kwargs)
    return BenchSparse(share_weights(model), sparse_config=variant_config(variant, sparse), **kwargs)
