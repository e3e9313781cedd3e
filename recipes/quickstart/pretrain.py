"""Trains the quickstart's small Llama from scratch on the text world and saves it as a Hugging Face folder.

    python recipes/quickstart/pretrain.py --output-dir sparselora_hf/assets/quickstart-llama

One CPU core needs about a quarter of an hour. The run has three stages (see
`sparselora_hf.world.pretraining_text`): lists said several times, small scenes, the whole world. Every token is
predicted, but the words of a scene are drawn by chance and teach little, so what stands between a question mark and
the next full stop weighs ten times as much.
"""

import argparse
import math
import random
import time
from pathlib import Path

import torch
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sparselora_hf.world import PRETRAINING_SKILLS, build_tokenizer, pretraining_questions, pretraining_text

STAGE_STARTS = (230, 900)  # steps at which stages 1 and 2 of the text begin
OTHER_WEIGHT = 0.1  # of the loss of tokens outside answers
EVALUATION_SEED = 1_000_003


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Builds the untrained model: 3 layers, 192 wide, 2048 MLP channels, 4 query and 2 key heads of 48."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=2048,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=48,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        tie_word_embeddings=True,
        attn_implementation="eager",  # several times faster backward than sdpa on a CPU at this size
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def wire_looking_back(model: LlamaForCausalLM, offsets: tuple[int, ...] = (1, 2, 1, 3), spread: float = 0.08) -> None:
    """Starts four heads of the first layer as heads that look a few tokens back, in place.

    Finding "what followed this word before" takes one head that looks at the word before and another that compares;
    neither is of use alone, and waiting for both by chance takes most of a short run. Channel 0 of every embedding is
    made the same large constant, so keys are one fixed vector and each query is that vector turned by RoPE through its
    offset. The queries and keys of the other layers start larger than usual, so that they compare words at once.

    Args:
        model: an untrained model.
        offsets: how many tokens back each of the first query heads looks, two query heads to a key head.
        spread: standard deviation of the queries' and keys' weights in the later layers.
    """
    config = model.config
    half, pairs = config.head_dim // 2, 4
    embedding = model.model.embed_tokens.weight
    embedding[:, 0] = 3.0 * config.initializer_range
    constant = 3.0 / math.sqrt(1 + 3.0**2 / config.hidden_size)  # what channel 0 is after the first norm
    size = math.sqrt(22.0) / constant
    angles = config.rope_parameters["rope_theta"] ** (-torch.arange(pairs) / half)
    first = model.model.layers[0].self_attn
    for head, offset in enumerate(offsets):
        query = first.q_proj.weight[head * config.head_dim : (head + 1) * config.head_dim]
        query.zero_()
        query[:pairs, 0] = size * torch.cos(offset * angles)
        query[half : half + pairs, 0] = -size * torch.sin(offset * angles)
        key = head // 2 * config.head_dim
        first.k_proj.weight[key : key + pairs, 0] = size
    for layer in model.model.layers[1:]:
        layer.self_attn.q_proj.weight.normal_(0.0, spread)
        layer.self_attn.k_proj.weight.normal_(0.0, spread)


def batches(tokenizer: PreTrainedTokenizerFast, seed: int, block: int, tokens: int, stage: int) -> list[torch.Tensor]:
    """Packs 512 new documents into batches of documents of like length.

    Documents do not share a row: people come back with other belongings in the next one, which would be mistaken.

    Args:
        tokenizer: opens each document with `<bos>`.
        seed: seed of the run.
        block: number of the block of documents, other ones each time.
        tokens: most tokens in a batch, padding included.
        stage: see `pretraining_text`.

    Returns:
        Token ids in random order of batches, each `(documents, tokens of the longest)` int64.
    """
    texts = pretraining_text(seed * 100_000 + block, 512, stage)
    rows = sorted(([*ids, tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"]), key=len)
    grouped = []
    while rows:
        width, group = len(rows[-1]), []
        while rows and len(group) < tokens // width:
            group.append(rows.pop())
        grouped.append(torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in group]))
    random.Random(block).shuffle(grouped)
    return grouped


def answer_mask(ids: torch.Tensor, opening: int, closing: int) -> torch.Tensor:
    """Marks the tokens after an `opening` up to and with the next `closing`.

    Args:
        ids: token ids, `(rows, tokens)`.
        opening: id of the question mark.
        closing: id of the full stop.

    Returns:
        Boolean mask, `(rows, tokens)`.
    """
    place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    before = functional.pad(ids, (1, 0), value=closing)[:, :-1]
    last_opening = torch.where(before == opening, place, -1).cummax(1).values
    last_closing = torch.where(before == closing, place, -1).cummax(1).values
    return last_opening > last_closing


def rate_at(done: float, peak: float, warmup: float = 0.04) -> float:
    """Returns the learning rate after the share `done` of the run: linear warm-up, then cosine to a fiftieth."""
    if done < warmup:
        return peak * (done + 1e-3) / warmup
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, (done - warmup) / (1 - warmup)))))


def exact_match(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, skill: str, n: int = 100) -> float:
    """Returns the share of `n` new questions of a skill that greedy generation answers word for word."""
    asked = pretraining_questions(EVALUATION_SEED, n, skill)
    batch = tokenizer([q["prompt"] for q in asked], return_tensors="pt", padding=True, padding_side="left")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    said = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    right = [q["completion"].removesuffix(" .").strip() for q in asked]
    return sum(s.split(" .")[0].strip() == r for s, r in zip(said, right, strict=True)) / n


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> int:
    """Trains in place until the steps or the minutes are spent; returns the number of steps taken."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.02)
    opening, closing = tokenizer.convert_tokens_to_ids(["?", "."])
    waiting: list[torch.Tensor] = []
    block, mean, start = 0, 0.0, time.monotonic()
    for step in range(args.steps):
        minutes = (time.monotonic() - start) / 60
        if args.minutes and minutes >= args.minutes:
            return step
        done = max(step / args.steps, minutes / args.minutes if args.minutes else 0.0)
        optimizer.param_groups[0]["lr"] = rate_at(done, args.lr)
        if step in STAGE_STARTS or not waiting:
            stage = sum(step >= begin for begin in STAGE_STARTS)
            waiting = batches(tokenizer, args.seed, block, args.tokens, stage)
            block += 1
        ids = waiting.pop().to(model.device)
        logits = model(input_ids=ids).logits[:, :-1]
        wanted = ids[:, 1:]
        loss = functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view_as(wanted)
        answers = answer_mask(ids, opening, closing)[:, 1:]
        weight = torch.where(answers, 1.0, OTHER_WEIGHT) * (wanted != tokenizer.pad_token_id)
        ((loss * weight).sum() / weight.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mean += (loss.detach()[answers].mean().item() - mean) / min(step + 1, 30)
        if step % 50 == 0:
            print(f"step {step:5d}  loss on answers {mean:.4f}  minutes {minutes:.1f}", flush=True)
    return args.steps


def main() -> None:
    """Reads the options, trains, saves and reports the exact match per skill."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=0.0, help="stop after so many minutes (0: only the steps)")
    parser.add_argument("--tokens", type=int, default=1024, help="most tokens in a batch")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    wire_looking_back(model)
    print(f"{model.num_parameters()} parameters, {len(tokenizer)} tokens in the vocabulary")
    steps = train(model, tokenizer, args)

    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=8,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    print(f"{steps} steps; {(args.output_dir / 'model.safetensors').stat().st_size} bytes in {args.output_dir}")
    model = model.float().eval()
    for skill in PRETRAINING_SKILLS:
        print(f"{skill:10s} {exact_match(model, tokenizer, skill):.2f}")


if __name__ == "__main__":
    main()
