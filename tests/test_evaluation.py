"""`sparselora eval` from questions to results, with tiny models that know nothing."""

import copy
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
import types

import pytest
import torch
from datasets import Dataset
from helpers import ROOT, add_lora, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from zoo import VISION, vision_model

from sparselora_hf.cli.main import main
from sparselora_hf.cli.recipe import parse
from sparselora_hf.cli.sft import _note_data
from sparselora_hf.evaluation.answers import AnswerFile
from sparselora_hf.evaluation.asking import Asker
from sparselora_hf.evaluation.exports import run_evalplus, solution
from sparselora_hf.evaluation.generate import Generator, Sampling
from sparselora_hf.evaluation.models import QLORA, adapter_hash, load_model
from sparselora_hf.evaluation.run import score
from sparselora_hf.evaluation.tasks import GROUPS, TASKS, Question, find_tasks, load_questions
from sparselora_hf.formats import FORMATS

LETTERS = " abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"[: 61 - 3]


@pytest.fixture(scope="module")
def tokenizer():
    """One token a character, the rest unknown."""
    ids = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{letter: 3 + i for i, letter in enumerate(LETTERS)}}
    inner = Tokenizer(models.WordLevel(ids, unk_token=" "))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    template = "{% for m in messages %}{{ m.role + m.content }}{% endfor %}{% if add_generation_prompt %}A{% endif %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", chat_template=template
    )


def save_adapter(folder, base, **options):
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(tiny_model(layers=2, **options), lora)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer):
    """A base model, an adapter of it and a row of every task, in folders."""
    folder = tmp_path_factory.mktemp("world")
    base = folder / "base"
    tiny_model(layers=2, max_position_embeddings=4096).save_pretrained(base)
    tokenizer.save_pretrained(base)
    save_adapter(folder / "adapter", base)
    data = folder / "data"
    data.mkdir()
    for name, task in TASKS.items():
        (data / f"{name}.json").write_text(json.dumps([dict(task.example)] * 3))
    rows = [{"question": f"Add {n} and {'1' * n}.", "answer": f"So\n#### {n}"} for n in range(1, 11)]
    (data / "gsm8k.json").write_text(json.dumps(rows))
    return folder


def run(world, *flags: str) -> int:
    short = () if "--max-new-tokens" in flags else ("--max-new-tokens", "4")
    return main(["eval", str(world / "adapter"), "--data", str(world / "data"), "--batch-size", "2", *short, *flags])


def error_of(capsys, call) -> str:
    """Run what must fail on what the user gave; returns its one line."""
    capsys.readouterr()
    assert call() == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sparselora: error: ")]
    return line


# tasks


def test_every_task_reads_its_own_example(world):
    for task in TASKS.values():
        (question, *_) = load_questions(task, str(world / "data"), limit=1)
        assert question.turns
        assert (question.target is None) == (task.right is None)
        assert len(load_questions(task, str(world / "data"), limit=99)) == (10 if task.name == "gsm8k" else 3)


def test_a_puzzle_asks_for_each_of_its_grids():
    row = TASKS["arc_agi"].example
    first, second = TASKS["arc_agi"].read(0, {**row, "test": row["test"] + row["train"][:1]})
    assert first.key != second.key


def test_groups_and_aliases():
    assert [task.name for task in find_tasks(["math"])] == ["gsm8k", "svamp", "mawps"]
    assert len(GROUPS["commonsense"]) == 8
    assert [task.name for task in find_tasks(["siqa", "ARC-Easy"])] == ["social_i_qa", "arc_easy"]


@pytest.mark.parametrize(
    ("name", "answer", "right"),
    [
        ("gsm8k", "The answer is 7.", True),
        ("gsm8k", "The answer is 8.", False),
        ("boolq", "the correct answer is true", True),
        ("piqa", "solution2", False),
        ("arc_agi", "The output grid for the test input grid is:\n\n```\nBlack Blue\n```", True),
        ("arc_agi", "Blue Black", False),
        ("arc_agi", "I do not know", False),
    ],
)
def test_right_and_wrong(name, answer, right):
    (question,) = TASKS[name].read(0, TASKS[name].example)
    assert TASKS[name].right(answer, question.target) == right


@pytest.mark.parametrize(
    "file", ["gsm8k_test.jsonl", "SVAMP.json", "mawps.json", "boolq.json", "piqa.json", "ARC-Easy.json"]
)
def test_real_questions_answer_themselves(data_dir, file):
    """The task's own answer, as a trained model writes it, is right; that of the next question mostly is not."""
    name = {"gsm8k_test.jsonl": "gsm8k", "ARC-Easy.json": "arc_easy"}.get(file, file[:-5].lower())
    task = TASKS[name]
    questions = load_questions(task, str(data_dir / "test"), limit=100)
    told = [str(question.row["answer"]) for question in questions]
    assert len(questions) == 100
    assert all(task.right(f"the correct answer is {text}", q.target) for text, q in zip(told, questions, strict=True))
    others = [task.right(text, q.target) for text, q in zip(told[1:] + told[:1], questions, strict=True)]
    assert sum(others) < 75


@pytest.mark.parametrize(
    ("data", "split"),
    [("rows.json", "train"), ("ROWS.JSON", "train"), ("org/gsm8k", "test"), ("org/gsm8k-v1.5", "test")],
)
def test_the_hub_is_asked_for_the_test_split(monkeypatch, data, split):
    asked = []
    rows = Dataset.from_list([{"question": "Why?", "answer": "5"}])
    monkeypatch.setattr("sparselora_hf.prompts.read_rows", lambda *arguments: asked.append(arguments) or rows)
    assert load_questions(TASKS["gsm8k"], data)[0].target == 5
    assert asked == [(data, split)]


# asking


def test_questions_are_asked_in_the_words_of_the_training(tokenizer):
    for name, form in FORMATS.items():
        row = {"instruction": "Why?", "question": "Why?", "query": "Why?", "input": "", "output": "a", "answer": "```"}
        assert Asker(name, tokenizer).prompt(["Why?"], []) == form.build(row, form.completion[0])["prompt"]


def test_a_second_turn_follows_the_first_answer(tokenizer):
    first = FORMATS["alpaca"].ask("One?")
    assert Asker("alpaca", tokenizer).prompt(["One?", "Two?"], ["1"]) == f"{first}1\n\n{FORMATS['alpaca'].ask('Two?')}"
    assert Asker("chat", tokenizer).prompt(["One?", "Two?"], ["1"]) == "userOne?assistant1userTwo?A"
    system = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    assert Asker("chat", tokenizer).prompt([system], []) == "systemSuserUA"


def test_asking_errors(tokenizer):
    with pytest.raises(ValueError, match="'poem' is not one of"):
        Asker("poem", tokenizer)
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>")
    with pytest.raises(ValueError, match="no chat template"):
        Asker("chat", bare)


# generating


def test_padding_changes_no_answer(tokenizer):
    model = tiny_model(layers=2).eval()
    generator = Generator(model, tokenizer, Sampling(6))
    prompts = ["one", "a longer one", "the longest of them all"]
    together = generator.answer(prompts, 0)
    assert together == [generator.answer([prompt], 0)[0] for prompt in prompts]
    assert tokenizer.padding_side == "right"  # the user's tokenizer is left as it was


def test_greedy_whatever_the_models_own_settings_say(tokenizer):
    model = tiny_model(layers=2).eval()
    want = Generator(model, tokenizer, Sampling(6)).answer(["one two"], 0)
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=50)
    assert Generator(model, tokenizer, Sampling(6)).answer(["one two"], 1) == want
    model.generation_config.update(repetition_penalty=50.0, no_repeat_ngram_size=1, num_beams=3)
    assert Generator(model, tokenizer, Sampling(6)).answer(["one two"], 1) == want


@pytest.mark.parametrize("sampling", [Sampling(6), Sampling(6, 2, 1.0)], ids=["greedy", "drawn"])
@pytest.mark.parametrize(
    "own",
    [
        {"return_dict_in_generate": True},
        {"prompt_lookup_num_tokens": 3},
        {"forced_eos_token_id": 2},
        {"suppress_tokens": list(range(3, 40))},
        {"guidance_scale": 3.0},
        {"exponential_decay_length_penalty": (1, 50.0)},
        {"min_p": 0.9, "typical_p": 0.1},
        {"max_time": 0.0},
    ],
    ids=lambda own: next(iter(own)),
)
def test_the_models_own_settings_change_no_answer(tokenizer, own, sampling):
    model = tiny_model(layers=2).eval()
    want = Generator(model, tokenizer, sampling).answer(["one two"], 0)
    model.generation_config.update(**own)
    settings = model.generation_config
    assert Generator(model, tokenizer, sampling).answer(["one two"], 0) == want
    assert model.generation_config is settings


def test_an_answer_ends_where_training_ended_it(tokenizer):
    """The tokenizer's end token holds, and those that the model's own settings name."""
    model = tiny_model(layers=2).eval()
    ((whole,),) = Generator(model, tokenizer, Sampling(6)).answer(["one two"], 0)
    ended = copy.deepcopy(tokenizer)
    ended.eos_token = whole[3]
    ((answer,),) = Generator(model, ended, Sampling(6)).answer(["one two"], 0)
    assert answer == whole[: whole.index(whole[3]) + 1] != whole
    model.generation_config.eos_token_id = [2, *tokenizer(whole[3])["input_ids"]]
    assert Generator(model, tokenizer, Sampling(6)).answer(["one two"], 0) == [[whole[: whole.index(whole[3]) + 1]]]


def test_an_answer_ends_at_a_string_of_the_models_own(tokenizer):
    model = tiny_model(layers=2).eval()
    ((whole,),) = Generator(model, tokenizer, Sampling(6)).answer(["one two"], 0)
    model.generation_config.stop_strings = [whole[:3]]
    assert Generator(model, tokenizer, Sampling(6)).answer(["one two"], 0) == [[whole[:3]]]


def test_a_tokenizer_without_tokens_to_pad_or_end_with(tokenizer):
    model = tiny_model(layers=2).eval()
    want = Generator(model, tokenizer, Sampling(6)).answer(["one", "a longer one"], 0)
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    assert Generator(model, bare, Sampling(6)).answer(["one", "a longer one"], 0) == want


def test_no_prompt_ends_in_an_end_token(tokenizer):
    ending = copy.deepcopy(tokenizer)
    ids = {"special_tokens": [("<bos>", 1), ("<eos>", 2)]}
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", **ids)
    model = tiny_model(layers=2).eval()
    assert ending("one")["input_ids"][-1] == 2
    assert Generator(model, ending, Sampling(6))._encode(["one"])["input_ids"][0, -1] == tokenizer("e")["input_ids"][0]


def test_a_prompt_that_starts_with_a_start_token_gets_no_other(tokenizer):
    """As chat templates write it."""
    starting = copy.deepcopy(tokenizer)
    starting.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    one, two = Generator(tiny_model(layers=2), starting, Sampling(1))._rows(["<bos>one", "one"])
    assert one == two == starting("one")["input_ids"]


def test_samples_differ_and_repeat_with_their_seed(tokenizer):
    generator = Generator(tiny_model(layers=2).eval(), tokenizer, Sampling(8, samples=3, temperature=2.0, top_p=1.0))
    (first,) = generator.answer(["one two"], 5)
    assert len(set(first)) > 1
    assert generator.answer(["one two"], 5) == [first]
    assert generator.answer(["one two"], 6) != [first]
    other = Generator(generator.model, tokenizer, dataclasses.replace(generator.sampling, seed=1))
    assert other.answer(["one two"], 4) == [first]


def test_batches_hold_prompts_of_like_length_once(tokenizer):
    generator = Generator(None, tokenizer, Sampling(1))
    assert generator.batches(["a", "ccc", "bb", "d"], 2) == [[1, 2], [0, 3]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"new_tokens": 0}, "new_tokens"),
        ({"new_tokens": 1, "samples": 2}, "Set --temp"),
        ({"new_tokens": 1, "temperature": -1.0}, "temperature: -1.0"),
        ({"new_tokens": 1, "temperature": float("nan")}, "temperature: nan"),
    ],
)
def test_sampling_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**arguments)


# answers on disk


def test_a_line_cut_short_is_answered_again(tmp_path):
    path = tmp_path / "answers.jsonl"
    AnswerFile(path, {"seed": 0}).add({1: ["a"], 0: ["ü\n"]})
    with path.open("a") as file:
        file.write('{"question": 2, "answ')
    again = AnswerFile(path, {"seed": 0})
    assert again.answers == {1: ["a"], 0: ["ü\n"]}
    again.add({2: ["c"]})
    assert AnswerFile(path, {"seed": 0}).answers == {0: ["ü\n"], 1: ["a"], 2: ["c"]}
    assert AnswerFile(path, {"seed": 1}, overwrite=True).answers == {}


def test_other_settings_are_refused(tmp_path):
    AnswerFile(tmp_path / "answers.jsonl", {"seed": 0, "batch": 2}).add({0: ["a"]})
    with pytest.raises(ValueError, match=r"seed = 0, now it is 1. Add --overwrite"):
        AnswerFile(tmp_path / "answers.jsonl", {"seed": 1, "batch": 2})
    with pytest.raises(ValueError, match=r"batch = 2, now it is None"):
        AnswerFile(tmp_path / "answers.jsonl", {"seed": 0})


@pytest.mark.parametrize(
    ("flags", "batches"), [((), 3), (("--samples", "2", "--temperature", "1"), 1)], ids=["greedy", "drawn"]
)
def test_ended_half_way_and_started_again_is_as_if_never_ended(world, tmp_path, monkeypatch, flags, batches):
    flags = ("--task", "gsm8k", *flags)
    assert run(world, *flags, "--output", str(tmp_path / "whole")) == 0
    answer = Generator.answer

    def ends(self, prompts, seed):
        if seed >= batches:
            raise KeyboardInterrupt
        return answer(self, prompts, seed)

    monkeypatch.setattr(Generator, "answer", ends)
    assert run(world, *flags, "--output", str(tmp_path / "half")) == 130
    path = tmp_path / "half" / "gsm8k.answers.jsonl"
    path.write_text(path.read_text()[:-7])  # the kill came while a line was written
    asked = []
    monkeypatch.setattr(Generator, "answer", lambda self, p, seed: asked.append(seed) or answer(self, p, seed))
    assert run(world, *flags, "--output", str(tmp_path / "half")) == 0
    assert asked == list(range(batches - 1, 5))
    for name in ("results.json", "gsm8k.scored.jsonl"):
        assert (tmp_path / "half" / name).read_text() == (tmp_path / "whole" / name).read_text()


@pytest.mark.slow
def test_killed_and_started_again_ends_with_the_same_result(world, tmp_path):
    command = [sys.executable, "-m", "sparselora_hf.cli.main", "eval", str(world / "adapter"), "--task", "gsm8k"]
    command += ["--data", str(world / "data"), "--batch-size", "1", "--max-new-tokens", "200", "--output"]
    assert (
        run(world, "--task", "gsm8k", "--batch-size", "1", "--max-new-tokens", "200", "--output", str(tmp_path / "a"))
        == 0
    )
    path = tmp_path / "b" / "gsm8k.answers.jsonl"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, str(tmp_path / "b")], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (path.is_file() and path.read_text().count("\n") > 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert path.read_text().count("\n") < 11
    assert (
        run(world, "--task", "gsm8k", "--batch-size", "1", "--max-new-tokens", "200", "--output", str(tmp_path / "b"))
        == 0
    )
    assert (tmp_path / "a" / "results.json").read_text() == (tmp_path / "b" / "results.json").read_text()


# the command


def test_results_and_what_they_depend_on(world, tmp_path, capsys):
    assert run(world, "--task", "gsm8k", "boolq", "--seed", "7", "--output", str(tmp_path)) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == ["gsm8k", "boolq"]
    figures = results["gsm8k"]
    assert (figures["total"], figures["correct"]) == (10, round(figures["score"] / 10))
    assert figures["interval"][0] <= figures["score"] <= figures["interval"][1]
    want = {"prompt_format": "llm_adapters", "batch_size": 2, "new_tokens": 4, "seed": 7, "samples": 1}
    assert figures["settings"].items() >= want.items()
    assert len(figures["settings"]["questions"]) == 16
    assert len((tmp_path / "gsm8k.scored.jsonl").read_text().splitlines()) == 10
    assert "of 10" in capsys.readouterr().out


def test_results_are_written_whole_or_not_at_all(world, tmp_path, monkeypatch):
    assert run(world, "--task", "mawps", "--output", str(tmp_path)) == 0
    before = (tmp_path / "results.json").read_text()
    replace = os.replace

    def ended(source, target):
        if str(target).endswith("results.json"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", ended)
    assert run(world, "--task", "boolq", "--output", str(tmp_path)) == 130
    assert (tmp_path / "results.json").read_text() == before


def test_pass_at_k(world, tmp_path):
    flags = ("--samples", "3", "--temperature", "1", "--output", str(tmp_path))
    assert run(world, "--task", "arc_agi", *flags) == 0
    figures = json.loads((tmp_path / "results.json").read_text())["arc_agi"]
    assert [figures[f"pass@{k}"] for k in (1, 2, 3)] == [0, 0, 0]
    assert figures["settings"]["prompt_format"] == "chat"


def test_figures_by_hand(tmp_path):
    """Of three questions with two answers each the first has one right answer, the last has two."""
    questions = [Question(n, ["?"], 5, {}) for n in range(3)]
    file = AnswerFile(tmp_path / "answers.jsonl", {})
    file.add({0: ["5", "4"], 1: ["3", "4"], 2: ["5", "5"]})
    figures = score(TASKS["gsm8k"], questions, file, tmp_path / "scored.jsonl")
    assert figures["pass@1"] == 50
    assert figures["score"] == figures["pass@2"] == 66.67
    assert (figures["correct"], figures["total"]) == (2, 3)
    assert {name for name in figures if "@" in name} == {"pass@1", "pass@2"}


def test_the_format_noted_beside_the_adapter_is_used(world, tmp_path):
    folder = tmp_path / "adapter"
    save_adapter(folder, world / "base")
    (folder / "sparselora_data.yaml").write_text("prompt_format: alpaca\n")
    argv = [
        "eval",
        str(folder),
        "--task",
        "gsm8k",
        "--data",
        str(world / "data"),
        "--limit",
        "1",
        "--max-new-tokens",
        "1",
    ]
    assert main(argv) == 0
    assert json.loads((folder / "eval" / "results.json").read_text())["gsm8k"]["settings"]["prompt_format"] == "alpaca"


def test_a_model_without_adapter(world, tmp_path):
    argv = ["eval", "--model", str(world / "base"), "--task", "mawps", "--data", str(world / "data" / "mawps.json")]
    assert main([*argv, "--output", str(tmp_path), "--max-new-tokens", "2"]) == 0
    assert json.loads((tmp_path / "results.json").read_text())["mawps"]["adapter"] is None


def test_a_name_on_the_hub_gets_no_folder_of_that_name(world, tmp_path, monkeypatch):
    """A folder ``org/tiny`` here would be taken for the model from the next run on."""
    monkeypatch.chdir(tmp_path)
    local = str(world / "base")
    monkeypatch.setattr("sparselora_hf.evaluation.models.load_model", lambda base, *rest: load_model(local, *rest))
    argv = ["eval", "--model", "org/tiny", "--task", "mawps", "--data", str(world / "data")]
    assert main([*argv, "--max-new-tokens", "2"]) == 0
    assert (tmp_path / "eval" / "org" / "tiny" / "results.json").is_file()
    assert not (tmp_path / "org").exists()


def test_mt_bench_in_fastchats_form(world, tmp_path):
    assert run(world, "--task", "mt_bench", "--run-code", "--output", str(tmp_path)) == 0  # there is none to run
    lines = [json.loads(line) for line in (tmp_path / "mt_bench.jsonl").read_text().splitlines()]
    assert {"question_id", "answer_id", "model_id", "choices", "tstamp"} == set(lines[0])
    assert (lines[0]["question_id"], lines[0]["model_id"], len(lines[0]["choices"][0]["turns"])) == (81, "adapter", 2)


def test_conversations_of_other_lengths_end_where_they_do(world, tmp_path):
    row = dict(TASKS["mt_bench"].example)
    rows = [row | {"question_id": n, "turns": row["turns"][:n]} for n in (1, 2)]
    (tmp_path / "mt_bench.json").write_text(json.dumps(rows))
    assert run(world, "--task", "mt_bench", "--output", str(tmp_path), "--data", str(tmp_path)) == 0
    lines = [json.loads(line) for line in (tmp_path / "mt_bench.jsonl").read_text().splitlines()]
    assert {line["question_id"]: len(line["choices"][0]["turns"]) for line in lines} == {1: 1, 2: 2}


def test_humaneval_in_evalplus_form_and_nothing_is_run(world, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("code was run"))
    assert run(world, "--task", "humaneval", "--output", str(tmp_path)) == 0
    (line, *_) = (tmp_path / "humaneval.jsonl").read_text().splitlines()
    assert set(json.loads(line)) == {"task_id", "solution"}


CODE = {"entry_point": "f", "prompt": 'import math\n\n\ndef f(x):\n    """Twice."""\n'}


@pytest.mark.parametrize(
    "answer",
    [
        "```python\ndef f(x):\n    return 2 * x\n```\nThat is all. f(1)",
        "Sure:\n\n```\ndef f(x):\n    return 2 * x\n```",
        "def f(x):\n    return 2 * x",
        "    return 2 * x",
        "```python\n    return 2 * x\n```",
    ],
    ids=["block", "words first", "bare", "body", "body in a block"],
)
def test_solutions_are_whole_programs(answer):
    names: dict = {}
    exec(solution(CODE, answer), names)
    assert names["f"](4) == 8
    assert "math" in names


def test_verdicts_of_evalplus(tmp_path, monkeypatch):
    samples = tmp_path / "humaneval.jsonl"
    verdicts = tmp_path / "humaneval_eval_results.json"
    verdicts.write_text("{}")  # of an earlier run
    tasks = {"HumanEval/0": ["pp", "ff"], "HumanEval/1": ["pf"], "HumanEval/2": ["fp"]}  # HumanEval's, HumanEval+'s
    verdict = {"p": "pass", "f": "fail"}
    told = {
        name: [{"base_status": verdict[base], "plus_status": verdict[plus]} for base, plus in samples_of]
        for name, samples_of in tasks.items()
    }

    write = subprocess.run

    def evalplus(command, **kwargs):
        assert command[1:] == ["-m", "evalplus.evaluate", "--dataset", "humaneval", "--samples", str(samples)]
        assert not verdicts.exists()
        verdicts.write_text(json.dumps({"eval": told}))
        # generated code may write what is no text past evalplus's guard
        return write([sys.executable, "-c", "import os; os.write(1, b'\\xff'); os.write(2, b'\\xfe')"], **kwargs)

    monkeypatch.setattr(subprocess, "run", evalplus)
    figures = run_evalplus(samples)
    assert (figures["score"], figures["plus_score"], figures["total"]) == (50, 16.67, 3)


@pytest.mark.parametrize("verdict", [True, False], ids=["judged", "not judged"])
def test_evalplus_ends_though_generated_code_does_not(tmp_path, monkeypatch, verdict):
    """Code that writes without end past evalplus, and leaves a process behind: neither waited for nor kept."""
    samples, left = tmp_path / "humaneval.jsonl", tmp_path / "left"
    told = json.dumps({"eval": {"HumanEval/0": [{"base_status": "pass", "plus_status": "pass"}]}})
    program = [
        "import os, pathlib, sys",
        "for _ in range(200): os.write(1, b'x' * 2**20)",
        "process = os.posix_spawn('/bin/sleep', ['sleep', '60'], os.environ)",
        f"pathlib.Path({str(left)!r}).write_text(str(process))",
        f"pathlib.Path({str(tmp_path / 'humaneval_eval_results.json')!r}).write_text({told!r})" if verdict else "",
        "sys.exit('what went wrong')",
    ]
    real = subprocess.run
    monkeypatch.setattr(
        subprocess, "run", lambda command, **how: real([sys.executable, "-c", "\n".join(program)], **how)
    )
    start, tracks = time.monotonic(), tracemalloc.is_tracing()
    tracemalloc.start()
    try:
        if verdict:
            assert run_evalplus(samples)["score"] == 100
        else:
            with pytest.raises(OSError, match=r"no verdicts on .*: what went wrong$"):
                run_evalplus(samples)
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    finally:
        if not tracks:
            tracemalloc.stop()
        os.kill(int(left.read_text()), signal.SIGKILL)
    assert time.monotonic() - start < 50


@pytest.mark.parametrize(
    ("there", "flags", "message"),
    [(True, ("--limit", "2"), "judges HumanEval whole"), (None, (), "pip install evalplus")],
    ids=["limit", "not installed"],
)
def test_code_that_could_not_be_judged_is_not_generated(world, tmp_path, capsys, monkeypatch, there, flags, message):
    monkeypatch.setattr("sparselora_hf.evaluation.exports.find_spec", lambda name: there)
    out = tmp_path / "out"
    call = lambda: run(world, "--task", "humaneval", "--run-code", *flags, "--output", str(out))  # noqa: E731
    assert message in error_of(capsys, call)
    assert not out.exists()


@pytest.mark.parametrize("text", ["prompt_format: [alp", "alpaca"], ids=["no YAML", "no settings"])
def test_damaged_notes_of_a_training_are_named(world, tmp_path, capsys, text):
    adapter = shutil.copytree(world / "adapter", tmp_path / "adapter")
    (adapter / "sparselora_data.yaml").write_text(text)
    call = lambda: main(["eval", str(adapter), "--data", str(world / "data"), "--task", "boolq"])  # noqa: E731
    assert "sparselora_data.yaml" in error_of(capsys, call)


def test_notes_of_a_training_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """Half of them, or none, would be another prompt format."""
    recipe = parse(["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", str(tmp_path)])
    _note_data(recipe)
    before = (tmp_path / "sparselora_data.yaml").read_bytes()
    monkeypatch.setattr(os, "fsync", lambda *_: 1 / 0)
    recipe.data.prompt_format = "alpaca"
    with pytest.raises(ZeroDivisionError):
        _note_data(recipe)
    assert (tmp_path / "sparselora_data.yaml").read_bytes() == before


def test_lm_eval_has_the_rest(world, tmp_path, monkeypatch, capsys):
    calls = {}
    monkeypatch.setattr("transformers.BitsAndBytesConfig", lambda **keywords: calls.update(quantised=keywords))

    class TaskManager:
        def match_tasks(self, names):
            return [name for name in names if name in ("hellaswag", "both")]

    class HFLM:
        def __init__(self, pretrained, **keywords):
            calls.update(keywords, pretrained=pretrained)

    def simple_evaluate(model, **keywords):
        calls.update(keywords, model=model)
        names = ["one", "two"] if keywords["tasks"] == ["both"] else ["hellaswag"]
        return {"results": {name: {"acc,none": 0.25, "alias": name} for name in names}}

    names = {"": simple_evaluate, ".tasks": TaskManager, ".models": None, ".models.huggingface": HFLM}
    for name, what in names.items():
        module = types.ModuleType(f"lm_eval{name}")
        vars(module).update({what.__name__: what} if what else {})
        monkeypatch.setitem(sys.modules, f"lm_eval{name}", module)
    flags = ("--limit", "3", "--load-in-4bit", "--batch-size", "4", "--output", str(tmp_path))
    assert run(world, "--task", "lm_eval:hellaswag", *flags) == 0
    assert (calls["tasks"], calls["limit"], calls["batch_size"]) == (["hellaswag"], 3, 4)
    assert calls["quantised"] == QLORA
    assert isinstance(calls["pretrained"], PeftModel)
    assert len(calls["tokenizer"]) == len(LETTERS) + 3
    assert "lm_eval:hellaswag acc,none 0.25" in capsys.readouterr().out
    result = json.loads((tmp_path / "results.json").read_text())["lm_eval:hellaswag"]
    assert (result["acc,none"], result["settings"]["limit"], result["adapter"]) == (0.25, 3, str(world / "adapter"))
    assert result["settings"]["adapter"] == adapter_hash(str(world / "adapter"))
    assert run(world, "--task", "lm_eval:both", "--output", str(tmp_path / "tag")) == 0  # a tag has no figures itself
    assert list(json.loads((tmp_path / "tag" / "results.json").read_text())) == ["lm_eval:one", "lm_eval:two"]
    call = lambda: run(world, "--task", "boolq", "lm_eval:none", "--output", str(tmp_path / "none"))  # noqa: E731
    assert "no task 'none'" in error_of(capsys, call)
    assert not (tmp_path / "none").exists()  # before a question of another task is asked


def test_a_second_training_into_the_same_folder_is_evaluated_anew(world, tmp_path):
    pytest.importorskip("trl")
    from sparselora_hf.cli import sft

    def evaluated(*tasks):
        flags = ["--model_name_or_path", str(world / "base"), "--dataset_name", "rows", "--output_dir", str(tmp_path)]
        return sft.evaluate(sft.parse([*flags, "--eval_data", str(world / "data"), "--eval_tasks", *tasks]))

    save_adapter(tmp_path, world / "base")
    results = tmp_path / "eval" / "results.json"
    results.parent.mkdir()
    results.write_text(json.dumps({"lm_eval:x": {"score": 1.0, "settings": {"adapter": "an earlier one's"}}}))
    assert set(evaluated("boolq", "piqa")) == {"boolq", "piqa"}
    first = json.loads((tmp_path / "eval" / "results.json").read_text())
    weights = load_file(tmp_path / "adapter_model.safetensors")
    save_file({name: -weight for name, weight in weights.items()}, tmp_path / "adapter_model.safetensors")
    assert set(evaluated("boolq")) == {"boolq"}  # what the first adapter answered is no result of this one
    second = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert second["boolq"]["settings"]["adapter"] != first["boolq"]["settings"]["adapter"]


def test_a_model_that_was_changed_in_place_is_noticed(world, tmp_path, capsys):
    shutil.copytree(world / "base", tmp_path / "base")
    call = ["eval", "--model", str(tmp_path / "base"), "--task", "boolq", "--data", str(world / "data")]
    call += ["--max-new-tokens", "4", "--output", str(tmp_path / "out")]
    assert main(call) == 0
    assert main(call) == 0
    tiny_model(layers=2, seed=5, max_position_embeddings=4096).save_pretrained(tmp_path / "base")
    assert "holds answers given with weights = " in error_of(capsys, lambda: main(call))


def test_a_whole_model_is_evaluated_after_its_training(world, tmp_path):
    pytest.importorskip("trl")
    from sparselora_hf.cli import sft

    shutil.copytree(world / "base", tmp_path / "out")
    flags = ["--model_name_or_path", str(world / "base"), "--dataset_name", "rows", "--prompt_format", "alpaca"]
    flags += ["--output_dir", str(tmp_path / "out"), "--eval_data", str(world / "data"), "--eval_tasks", "boolq"]
    recipe = sft.parse([*flags, "--dense", "--use_peft", "false"])
    assert sft.evaluate(recipe) == {"boolq": 0.0}
    answers = tmp_path / "out" / "eval" / "boolq.answers.jsonl"
    settings, *_ = answers.read_text().splitlines()
    told = [json.dumps({"question": number, "answers": ["true"]}) for number in range(3)]
    answers.write_text("\n".join([settings, *told, ""]))  # as the model before a second training may have answered
    assert sft.evaluate(recipe) == {"boolq": 0.0}
    settings = json.loads((tmp_path / "out" / "eval" / "results.json").read_text())["boolq"]["settings"]
    assert (settings["model"], settings["prompt_format"]) == (str(tmp_path / "out"), "alpaca")
    recipe.data.eval_tasks = ["piqa"]
    assert set(sft.evaluate(recipe)) == {"boolq", "piqa"}  # of one model
    tiny_model(layers=2, seed=5, max_position_embeddings=4096).save_pretrained(tmp_path / "out")
    assert set(sft.evaluate(recipe)) == {"piqa"}  # boolq is of the model before
    assert not answers.exists()


def test_the_evaluation_loads_the_base_as_the_training_did(world, tmp_path, monkeypatch):
    pytest.importorskip("trl")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sparselora_hf.cli import sft

    told = []
    for auto in (AutoModelForCausalLM, AutoTokenizer):
        load = auto.from_pretrained

        def noted(*args, load=load, **keywords):
            told.append((keywords["revision"], keywords["trust_remote_code"]))
            return load(*args, **keywords)

        monkeypatch.setattr(auto, "from_pretrained", noted)
    save_adapter(tmp_path, world / "base")
    flags = ["--model_name_or_path", str(world / "base"), "--dataset_name", "rows", "--output_dir", str(tmp_path)]
    flags += ["--model_revision", "v2", "--trust_remote_code", "--eval_data", str(world / "data")]
    sft.evaluate(sft.parse([*flags, "--eval_tasks", "boolq"]))
    assert told == [("v2", True), ("v2", True)]
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert results["boolq"]["settings"]["model_revision"] == "v2"


@pytest.mark.parametrize(
    "flags",
    [
        ("--load_in_4bit", "--bnb_4bit_quant_type", "fp4"),
        ("--load_in_8bit",),
        ("--load_in_4bit", "--dtype", "bfloat16"),
    ],
    ids=["fp4", "int8", "nf4"],
)
def test_the_evaluation_quantises_the_base_as_the_training_did(world, tmp_path, monkeypatch, tokenizer, flags):
    pytest.importorskip("trl")
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM
    from trl import get_quantization_config

    from sparselora_hf.cli import sft

    told, load = [], AutoModelForCausalLM.from_pretrained
    noted = lambda *args, **keywords: told.append(keywords["quantization_config"]) or load(*args, **keywords)  # noqa: E731
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", noted)
    wide = {"intermediate_size": 128, "max_position_embeddings": 4096}  # on a CPU whole blocks of 64
    tiny_model(layers=2, **wide).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", tmp_path / "base", **wide)
    argv = ["--model_name_or_path", str(tmp_path / "base"), "--dataset_name", "rows", "--output_dir", adapter, *flags]
    recipe = sft.parse([*argv, "--eval_data", str(world / "data"), "--eval_tasks", "boolq"])
    sft.evaluate(recipe)
    assert run(tmp_path, "--task", "boolq", "--data", str(world / "data"), "--overwrite") == 0  # from the notes
    want = get_quantization_config(recipe.model).to_dict()
    assert [given.to_dict() for given in told] == [want, want]


@pytest.mark.parametrize(
    ("row", "prompt_format"),
    [
        ({"messages": [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "1"}]}, "chat"),
        ({"conversations": [{"from": "human", "value": "One?"}, {"from": "gpt", "value": "1"}]}, "chat"),
        ({"prompt": "One?", "completion": "1"}, "llm_adapters"),
    ],
    ids=["messages", "ShareGPT", "text"],
)
def test_what_was_trained_as_a_chat_is_asked_as_one(world, tmp_path, row, prompt_format):
    pytest.importorskip("trl")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(f"{json.dumps(row)}\n" * 4)
    argv = ["sft", "--model_name_or_path", str(world / "base"), "--dataset_name", str(rows), "--max_steps", "1"]
    argv += ["--output_dir", str(tmp_path / "out"), "--save_strategy", "no", "--report_to", "none", "--dense"]
    assert main([*argv, "--eval_tasks", "boolq", "--eval_data", str(world / "data")]) == 0
    results = json.loads((tmp_path / "out" / "eval" / "results.json").read_text())
    assert results["boolq"]["settings"]["prompt_format"] == prompt_format


def test_prompts_that_fill_the_window_are_counted(world, tmp_path, caplog, tokenizer):
    prompts = [FORMATS["llm_adapters"].ask(f"Add {n} and {'1' * n}.") for n in range(1, 11)]
    window = sorted(len(tokenizer(prompt)["input_ids"]) for prompt in prompts)[6]
    tiny_model(layers=2, max_position_embeddings=window).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    flags = ("--task", "gsm8k", "--model", str(tmp_path / "base"), "--output", str(tmp_path / "out"))
    assert run(world, *flags) == 0
    assert f"4 of 10 prompts fill the model's window of {window} tokens" in caplog.text
    caplog.clear()
    assert run(world, "--task", "gsm8k", "--output", str(tmp_path / "whole")) == 0
    assert "window" not in caplog.text


# errors


def test_an_unknown_task(world, capsys):
    assert "There is no task 'gsm9k'. Tasks: gsm8k, svamp" in error_of(capsys, lambda: run(world, "--task", "gsm9k"))


def test_nothing_to_evaluate(capsys):
    assert "Name an adapter" in error_of(capsys, lambda: main(["eval", "--task", "gsm8k"]))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("mt_bench", "--samples", "2", "--temperature", "1"), "in the conversations of mt_bench every turn has one"),
        (("gsm8k", "--dtype", "float31"), "dtype: 'float31' is neither auto nor a type"),
    ],
    ids=["samples", "dtype"],
)
def test_settings_that_cannot_be(world, tmp_path, capsys, flags, message):
    assert message in error_of(capsys, lambda: run(world, "--output", str(tmp_path / "out"), "--task", *flags))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tests", [[], [{"input": [[0]]}]], ids=["none", "no output"])
def test_a_puzzle_without_its_solution(world, tmp_path, capsys, tests):
    (tmp_path / "arc_agi.json").write_text(json.dumps([{"train": [], "test": tests}]))
    call = lambda: run(world, "--task", "arc_agi", "--data", str(tmp_path), "--output", str(tmp_path))  # noqa: E731
    assert "has no test, or one without its output" in error_of(capsys, call)


def test_no_such_adapter(capsys, tmp_path):
    line = error_of(capsys, lambda: main(["eval", str(tmp_path), "--task", "gsm8k"]))
    assert f"There is no adapter {tmp_path}: no such folder" in line


def test_a_whole_model_is_no_adapter(world, capsys):
    line = error_of(capsys, lambda: main(["eval", str(world / "base"), "--task", "gsm8k"]))
    assert f"holds a whole model, which --model {world / 'base'} names" in line


def test_adapters_in_folders_of_their_own_are_named(capsys, tmp_path):
    """PEFT saves an adapter of another name than `default` into a folder of that name."""
    get_peft_model(tiny_model(layers=2), LoraConfig(target_modules=["q_proj"]), "math").save_pretrained(tmp_path)
    line = error_of(capsys, lambda: main(["eval", str(tmp_path), "--task", "gsm8k"]))
    assert f"those in it are {tmp_path / 'math'}." in line


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"instruction": "q"}], "gsm8k needs the column answer. "),
        ([{"answer": "1"}], "needs the column instruction or question"),
        ([{"question": "q", "answer": "many"}], "the answer 'many' is no number"),
    ],
    ids=["answer", "question", "number"],
)
def test_data_that_is_not_fit(world, tmp_path, capsys, rows, message):
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert message in error_of(capsys, lambda: run(world, "--task", "gsm8k", "--data", str(tmp_path / "rows.json")))


def test_an_answer_that_is_no_choice(world, tmp_path, capsys):
    (tmp_path / "piqa.json").write_text(json.dumps([{"instruction": "q", "answer": "3"}]))
    call = lambda: run(world, "--task", "piqa", "--data", str(tmp_path))  # noqa: E731
    assert "'3' is not one of solution1, solution2" in error_of(capsys, call)
    assert "holds no data of boolq" in error_of(capsys, lambda: run(world, "--task", "boolq", "--data", str(tmp_path)))


@pytest.mark.parametrize(
    "options", [{"intermediate_size": 48, "hidden_size": 32, "head_dim": 4}, {"layers": 3}], ids=["narrower", "deeper"]
)
def test_an_adapter_of_another_model(world, tmp_path, capsys, tokenizer, options):
    other = tmp_path / "other"
    tiny_model(**({"layers": 2} | options)).save_pretrained(other)
    tokenizer.save_pretrained(other)
    line = error_of(capsys, lambda: run(world, "--task", "gsm8k", "--model", str(other), "--output", str(tmp_path)))
    assert f"was trained on {world / 'base'} and does not fit {other}" in line


def test_no_network(world, tmp_path, capsys, monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("host unreachable,\ntwo lines of it")

    monkeypatch.setattr("torch.hub.download_url_to_file", unreachable)
    argv = ["eval", str(world / "adapter"), "--task", "gsm8k", "--output", str(tmp_path)]
    assert "gsm8k/test.json, cannot be reached (OSError). Without a network" in error_of(capsys, lambda: main(argv))


def test_no_network_for_the_model(world, capsys, offline, tmp_path):
    line = error_of(
        capsys, lambda: run(world, "--task", "gsm8k", "--model", "no/such-model", "--output", str(tmp_path))
    )
    assert "The model no/such-model cannot be loaded" in line


def test_the_tokenizer_is_the_trainings_own(world, tmp_path, tokenizer):
    adapter = save_adapter(tmp_path, world / "base")
    assert load_model(str(world / "base"), adapter)[1].chat_template == tokenizer.chat_template
    trained = copy.deepcopy(tokenizer)
    trained.chat_template = "{{ messages[0].content }}"
    trained.save_pretrained(tmp_path)
    assert load_model(str(world / "base"), adapter)[1].chat_template == trained.chat_template


def test_a_type_that_is_named_holds_on_a_cpu_too(world):
    assert load_model(str(world / "base"), None, "bfloat16")[0].dtype == torch.bfloat16


def test_the_adapter_is_applied(world):
    plain, _ = load_model(str(world / "base"), None)
    tuned, _ = load_model(str(world / "base"), str(world / "adapter"))
    ids = torch.tensor([[5, 6, 7]])
    assert not tuned.training
    assert not torch.allclose(plain(ids).logits, tuned(ids).logits)


@pytest.mark.parametrize("options", [{}, {"trainable_token_indices": [61]}], ids=["fixed", "trained"])
def test_tokens_that_the_training_added(world, tmp_path, options):
    model = tiny_model(layers=2, max_position_embeddings=4096)
    size = model.config.vocab_size
    model.resize_token_embeddings(size + 2)
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False, **options)
    model = get_peft_model(model, lora)
    model.peft_config["default"].base_model_name_or_path = str(world / "base")
    model.save_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, size, size + 1]])
    want = model.eval()(input_ids=ids).logits
    torch.testing.assert_close(load_model(str(world / "base"), str(tmp_path))[0](input_ids=ids).logits, want)


@pytest.mark.parametrize("name", VISION)
def test_a_vision_language_model_answers_in_text(name, world, tmp_path, tokenizer):
    """Whole, as it was trained: the adapter's names are those of its language tower."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model = vision_model(name)
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    model = add_lora(model, r".*(language_model|text_model)\.layers.*_proj")
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(adapter)
    ids = torch.tensor([[5, 6, 7]])
    want = model.eval()(input_ids=ids).logits
    torch.testing.assert_close(load_model(str(base), str(adapter))[0](input_ids=ids).logits, want)
    flags = ("--task", "boolq", "--max-new-tokens", "2", "--limit", "2", "--data", str(world / "data"))
    assert main(["eval", str(adapter), *flags]) == 0
