"""Labels on the tokens of the completion and no others, for the kinds of tokenizer there are."""

import json

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from training import tokenizer as word_tokenizer
from transformers import PreTrainedTokenizerFast

from sparselora_hf.formats import FORMATS
from sparselora_hf.labels import label_examples, tokenize_examples
from sparselora_hf.plan import IGNORE_INDEX

ROWS = [
    {"instruction": "Add 1 and 2.", "output": "The answer is 3.", "answer": "3"},
    {"instruction": "Wie heißt «das»? “quoted” 日本", "output": "Größe 日本語 😀 ok", "answer": "true"},
    {"instruction": "Trailing ", "output": "\n\nThe end", "answer": "solution1"},
    {"instruction": "Numbers", "output": "  12,345.60 $", "answer": "answer4"},
]
FORMS = [("llm_adapters", "output"), ("llm_adapters", "answer"), ("alpaca", "output"), ("evol_instruct", "output")]
TEXTS = [
    "".join(FORMATS[form].build(row, column).values()) for row in ROWS for form, column in FORMS for _ in range(3)
] + ["So The answer is"] * 40  # " The" is to be one token


def finish(inner, trainer, template=None) -> PreTrainedTokenizerFast:
    """Train on the texts, then wrap; with a start token where a template is given."""
    inner.train_from_iterator(TEXTS, trainer)
    if template:
        inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def byte_level(whole: bool) -> PreTrainedTokenizerFast:
    """Byte-level BPE as GPT-2, Llama 3 and Qwen have it; `whole` lets a merge cross words and lines."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not whole)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>", "<pad>"], initial_alphabet=alphabet)
    return finish(inner, trainer, "<s> $A")


def metaspace(kind: str) -> PreTrainedTokenizerFast:
    """Pieces with a mark for the space before a word, as Llama 2 (BPE) and T5, Gemma (Unigram) have them."""
    unigram = kind == "unigram"
    inner = Tokenizer(models.Unigram() if unigram else models.BPE(byte_fallback=True, unk_token="<unk>"))
    if unigram:
        inner.pre_tokenizer = pre_tokenizers.Metaspace()
        inner.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=300, special_tokens=["<s>", "</s>", "<pad>", "<unk>"], unk_token="<unk>"
        )
    else:
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=["<s>", "</s>", "<pad>", "<unk>"])
    return finish(inner, trainer, "<s> $A")


def word_pieces() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordPiece(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    return finish(inner, trainers.WordPieceTrainer(vocab_size=300, special_tokens=["<s>", "</s>", "<pad>", "<unk>"]))


KINDS = {
    "byte-level BPE": lambda: byte_level(whole=False),
    "byte-level BPE across lines": lambda: byte_level(whole=True),
    "metaspace BPE": lambda: metaspace("bpe"),
    "metaspace unigram": lambda: metaspace("unigram"),
    "word pieces": word_pieces,
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    return KINDS[request.param]()


def examples(form: str, column: str) -> dict[str, list[str]]:
    rows = [FORMATS[form].build(row, column) for row in ROWS]
    return {name: [row[name] for row in rows] for name in ("prompt", "completion")}


def letters(tokenizer, ids) -> str:
    """Text of tokens without white space, which decoders may change."""
    return "".join(tokenizer.decode(ids, skip_special_tokens=True).split())


@pytest.mark.parametrize(("form", "column"), FORMS)
def test_labels_are_the_text_of_the_completion(tokenizer, form, column):
    batch = examples(form, column)
    rows = tokenize_examples(batch, tokenizer)
    for prompt, completion, ids, labels in zip(*batch.values(), *rows.values(), strict=True):
        first = next(i for i, label in enumerate(labels) if label != IGNORE_INDEX)
        assert labels == [IGNORE_INDEX] * first + ids[first:]  # one stretch, to the end
        assert ids == [*tokenizer(prompt + completion)["input_ids"], tokenizer.eos_token_id]
        reference = letters(tokenizer, tokenizer(prompt)["input_ids"])
        # nothing of the completion is masked, and the token after it belongs to the completion
        before = letters(tokenizer, ids[:first])
        assert reference.startswith(before)
        whole = "".join((prompt + completion).split())
        if letters(tokenizer, ids) == whole:  # no unknown characters
            rest = letters(tokenizer, ids[first:])
            assert rest.endswith("".join(completion.split()))
            assert before == "".join(prompt.split())[: len(before)]
            assert len(before) == len("".join(prompt.split()))  # prompts end in white space: no letter is in doubt


def test_tokens_do_merge_across_the_boundary():
    """Otherwise the test above would say nothing: here the prompt's own tokens are not the first of the whole text."""
    tokenizer, batch = byte_level(whole=False), examples("llm_adapters", "output")
    text = batch["prompt"][0] + batch["completion"][0]
    alone, whole = tokenizer(batch["prompt"][0])["input_ids"], tokenizer(text)["input_ids"]
    assert alone != whole[: len(alone)]
    labels = tokenize_examples(batch, tokenizer)["labels"][0]
    labelled = [label for label in labels if label != IGNORE_INDEX]
    assert tokenizer.decode(labelled) == " The answer is 3.</s>"


def test_a_token_that_holds_both_is_the_completions():
    inner = Tokenizer(models.WordLevel({"<unk>": 0, "ab": 1, "c": 2, "</s>": 3}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    rows = tokenize_examples({"prompt": ["c a"], "completion": ["b c"]}, tokenizer)
    assert rows == {"input_ids": [[2, 1, 2, 3]], "labels": [[IGNORE_INDEX, 1, 2, 3]]}


def test_the_end_is_labelled_where_the_tokenizer_itself_writes_it():
    plain, ending = byte_level(whole=False), byte_level(whole=False)
    ids = {"special_tokens": [("<s>", 0), ("</s>", 1)]}
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", **ids)
    rows = examples("alpaca", "output")
    assert tokenize_examples(rows, ending) == tokenize_examples(rows, plain)


def test_the_end_may_be_token_0():
    """As in GPT-NeoX's vocabulary, and SmolLM's."""
    inner = Tokenizer(models.WordLevel({"</s>": 0, "a": 1, "b": 2}))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    rows = tokenize_examples({"prompt": ["a"], "completion": [" b"]}, tokenizer)
    assert rows == {"input_ids": [[1, 2, 0]], "labels": [[IGNORE_INDEX, 2, 0]]}


def word_rows(*lengths: int) -> Dataset:
    return Dataset.from_list([{"prompt": " ".join(["w5"] * n), "completion": " w7"} for n in lengths])


def test_rows_without_a_label_are_dropped_and_counted():
    rows = word_rows(2, 3, 4, 5)
    kept, dropped = label_examples(rows, word_tokenizer(), max_length=4)
    assert (len(kept), dropped) == (2, 2)
    assert kept[1] == {"input_ids": [5, 5, 5, 7], "labels": [IGNORE_INDEX] * 3 + [7]}  # no room for the end of text
    assert label_examples(rows, word_tokenizer(), None)[1] == 0
    with pytest.raises(ValueError, match="Every prompt fills max_length = 2"):
        label_examples(rows, word_tokenizer(), max_length=2)


def test_more_rows_asked_for_than_there_are():
    kept, dropped = label_examples(word_rows(2, 3), word_tokenizer(), 8, max_examples=10)
    assert (len(kept), dropped) == (2, 0)


def test_long_rows_can_be_left_out_and_the_rest_counted():
    kept, dropped = label_examples(word_rows(2, 9, 3, 4), word_tokenizer(), 5, "drop", max_examples=2)
    assert ([len(ids) for ids in kept["input_ids"]], dropped) == ([4, 5], 2)
    with pytest.raises(ValueError, match=r"Every row is longer than max_length = 3 .* Raise max_length"):
        label_examples(word_rows(2), word_tokenizer(), 3, "drop")
    with pytest.raises(ValueError, match="'keep' is not one of cut, drop"):
        label_examples(word_rows(2), word_tokenizer(), 5, "keep")


def test_the_second_time_comes_from_the_cache(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"prompt": "w5 w6", "completion": " w7"}]))

    def run() -> list[str]:
        rows = Dataset.from_json(str(path), cache_dir=str(tmp_path / "cache"))
        kept, _ = label_examples(rows, word_tokenizer(), 8)
        return [file["filename"] for file in kept.cache_files]

    first = run()
    assert first
    assert first == run()


@pytest.mark.parametrize(
    ("file", "column"), [("math_10k_rebuilt.json", "output"), ("commonsense_17k.json", "answer")], ids=["math", "csr"]
)
def test_real_rows_with_a_real_tokenizer(data_dir, file, column):
    """Answers come back whole from the labels alone, prompts from the rest."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(data_dir / "models" / "stories260K"))
    rows = json.loads((data_dir / "train" / file).read_text())[:50]
    batch = {name: [] for name in ("prompt", "completion")}
    for row in rows:
        for name, text in FORMATS["llm_adapters"].build(row, column).items():
            batch[name].append(text)
    result = tokenize_examples(batch, tokenizer)
    assert len(result["labels"]) == 50
    for prompt, completion, ids, labels in zip(*batch.values(), *result.values(), strict=True):
        kept = [label for label in labels if label != IGNORE_INDEX]
        assert letters(tokenizer, kept) == "".join(completion.split())
        assert letters(tokenizer, ids[: len(ids) - len(kept)]) == "".join(prompt.split())
