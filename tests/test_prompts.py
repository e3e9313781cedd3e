import hashlib
import json
import os
import tempfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

datasets = pytest.importorskip("datasets")

from sparselora_hf.formats import alpaca, code_feedback, evol_instruct, llm_adapters, question_answer  # noqa: E402
from sparselora_hf.prompts import (  # noqa: E402
    PROMPT_FORMATS,
    TextWindow,
    format_examples,
    load_examples,
    text_split,
)

DATA = Path(os.environ.get("SPARSELORA_DATA", Path(__file__).parents[2] / "shared" / "data"))
ROWS = [
    {"instruction": "Add 1 and 2. ", "input": "", "output": "1 + 2 = 3 The answer is 3.", "answer": "3"},
    {"instruction": "Sort.", "input": "b a", "output": "a b", "answer": "a"},
]


@pytest.fixture
def math_file(tmp_path):
    path = tmp_path / "math.json"
    path.write_text(json.dumps(ROWS))
    return path


def test_alpaca_without_input():
    row = alpaca(ROWS[0])
    assert row["prompt"] == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd 1 and 2.\n\n### Response:\n"
    )
    assert row["completion"] == "1 + 2 = 3 The answer is 3."


def test_alpaca_with_input_and_answer():
    row = alpaca(ROWS[1], train_on="answer")
    assert "paired with an input" in row["prompt"]
    assert row["prompt"].endswith("### Input:\nb a\n\n### Response:\n")
    assert row["completion"] == "a"


def test_alpaca_keeps_braces_of_the_data():
    assert "{x}" in alpaca({"instruction": "Set {x}.", "output": "{y}"})["prompt"]


def test_the_papers_text_byte_for_byte():
    """Typed from z-lab/sparselora, spft/data.py: two spaces end the first line, sixteen start every other."""
    row = llm_adapters({"instruction": " Add. ", "input": "", "output": "1 \n", "answer": "true"})
    indent = "                "
    assert row["prompt"] == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.  \n"
        f"\n{indent}### Instruction:\n{indent} Add. \n{indent}\n{indent}### Response:\n{indent}"
    )
    assert row["completion"] == "1 \n"
    assert llm_adapters({"instruction": "", "answer": "true"}, "answer")["completion"] == "true"


def test_the_papers_text_with_an_input():
    row = llm_adapters(ROWS[1])
    assert row["prompt"].endswith(
        "### Input:\n" + " " * 16 + "b a\n" + " " * 16 + "\n" + " " * 16 + "### Response:\n" + " " * 16
    )


def test_code_feedback_ends_with_the_first_block():
    row = code_feedback({"query": "Sort {x}. ", "answer": "So:\n```python\na\n```\nor\n```\nb\n```"})
    assert row["prompt"].endswith("### Instruction:\nSort {x}. \n\n### Response:\n")
    assert row["completion"] == " So:\n```python\na\n```"
    assert code_feedback({"query": "q", "answer": "no code"}) is None
    assert code_feedback({"query": "q", "answer": "```open"})["completion"] == " ```open```"


@pytest.mark.parametrize(("answer", "kept"), [("Sure.", True), ("I'm SORRY", False), ("As an AI model", False)])
def test_evolved_instructions_leave_refusals_out(answer, kept):
    row = evol_instruct({"instruction": "Sing", "output": answer})
    assert (row is not None) == kept
    if kept:
        assert row == {"prompt": alpaca({"instruction": "Sing", "output": ""})["prompt"], "completion": " Sure."}


def test_rows_that_a_format_leaves_out_do_not_count():
    rows = [{"query": "q", "answer": answer} for answer in ("none", "```a```", "none", "```b```", "```c```")]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "code.json"
        path.write_text(json.dumps(rows))
        kept = load_examples(str(path), "train", "code_feedback", max_examples=2)
        assert list(kept["completion"]) == [" ```a```", " ```b```"]
    with pytest.raises(ValueError, match="left every row out"):
        format_examples(datasets.Dataset.from_list(rows[:1]), "code_feedback")


def test_question_answer():
    row = question_answer({"question": "Why? ", "answer": "So."})
    assert row == {"prompt": "Question: Why?\nAnswer:", "completion": " So."}


def test_text_split_loses_nothing_inside_windows_and_cuts_at_spaces():
    text = "one two three four five six seven eight nine ten " * 4
    rows = text_split(text, TextWindow(characters=40, prompt_share=0.75))
    assert "".join(row["prompt"] + row["completion"] for row in rows) == text[: 40 * len(rows)]
    assert all(row["completion"].startswith(" ") for row in rows)
    assert all(22 <= len(row["prompt"]) <= 30 for row in rows)


def test_text_split_without_spaces_cuts_at_the_share():
    assert [len(row["prompt"]) for row in text_split("x" * 25, TextWindow(10, 0.75))] == [7, 7]


@pytest.mark.parametrize(("arguments", "field"), [((1,), "window_characters"), ((10, 1.0), "prompt_share")])
def test_text_window_errors(arguments, field):
    with pytest.raises(ValueError, match=field):
        TextWindow(*arguments)


def test_format_leaves_only_prompt_and_completion():
    rows = format_examples(datasets.Dataset.from_list(ROWS), "alpaca")
    assert set(rows.column_names) == {"prompt", "completion"}


def test_missing_column_is_named_with_those_there_are():
    rows = datasets.Dataset.from_list([{"question": "q", "answer": "a"}])
    with pytest.raises(ValueError, match=r"'alpaca' needs the column instruction, output.*has: question, answer"):
        format_examples(rows, "alpaca")


def test_unknown_format():
    with pytest.raises(ValueError, match=", ".join(PROMPT_FORMATS)):
        format_examples(datasets.Dataset.from_list(ROWS), "chat")


def test_load_json(math_file):
    rows = load_examples(str(math_file), "train", "alpaca", train_on="answer", max_examples=5)
    assert list(rows["completion"]) == ["3", "a"]


def test_load_takes_the_first_rows_and_slices_splits(math_file):
    assert len(load_examples(str(math_file), "train", "alpaca", max_examples=1)) == 1
    assert load_examples(str(math_file), "train[1:]")[0]["answer"] == "a"


def test_load_csv_and_jsonl(tmp_path):
    (tmp_path / "a.csv").write_text("question,answer\nwhy,so\n")
    (tmp_path / "a.jsonl").write_text('{"question": "why", "answer": "so"}\n')
    for name in ("a.csv", "a.jsonl"):
        rows = load_examples(str(tmp_path / name), prompt_format="question_answer")
        assert rows[0] == {"prompt": "Question: why\nAnswer:", "completion": " so"}


def test_load_text(tmp_path):
    (tmp_path / "a.txt").write_text("word " * 100)
    rows = load_examples(str(tmp_path / "a.txt"), "train", "text_split", max_examples=3, window=TextWindow(50))
    assert len(rows) == 3


def test_a_text_has_no_held_out_part(tmp_path):
    """Taken for the whole text, it would be evaluated on what it is trained on."""
    (tmp_path / "a.txt").write_text("word " * 100)
    for split in ("test", "train[80%:]"):
        with pytest.raises(ValueError, match="a text file is one row of the split train"):
            load_examples(str(tmp_path / "a.txt"), split, "text_split")


def test_short_text_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("word")
    with pytest.raises(ValueError, match="shorter than one window"):
        load_examples(str(tmp_path / "a.txt"), "train", "text_split")


@pytest.mark.parametrize(("name", "text"), [("a.jsonl", ""), ("a.json", "[]"), ("a.csv", "instruction,output\n")])
def test_a_file_without_rows_is_named(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name} has no rows of the split 'train'"):
        load_examples(str(tmp_path / name), prompt_format="alpaca")


def test_another_split_of_a_file_is_named(math_file):
    with pytest.raises(ValueError, match=r"math\.json has no rows of the split 'test'.*\['train'\]"):
        load_examples(str(math_file), "test")


def test_a_file_from_the_web_is_fetched_once(math_file):
    handler = partial(SimpleHTTPRequestHandler, directory=str(math_file.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/math.json"
        assert len(load_examples(url, "train", "alpaca")) == 2
        with pytest.raises(OSError, match=r"none\.json cannot be fetched: HTTP Error 404"):
            load_examples(url.replace("math", "none"))
        server.shutdown()
    assert len(load_examples(url, "train", "alpaca")) == 2
    with pytest.raises(OSError, match="cannot be fetched"):
        load_examples(url.replace("math", "other"))


def test_what_is_no_file_is_not_taken_for_one_from_the_web(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSELORA_CACHE", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", lambda *args, **settings: None)
    url = "http://127.0.0.1/math.json"
    with pytest.raises(FileNotFoundError):
        load_examples(url)
    (tmp_path / "data" / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-math.json").mkdir()
    with pytest.raises(OSError, match=r"-math\.json, where http://127\.0\.0\.1/math\.json would be kept, is no file"):
        load_examples(url)


def test_an_empty_cell_is_no_answer(tmp_path):
    (tmp_path / "a.csv").write_text("instruction,output\nwhy,so\nwhat,\n")
    with pytest.raises(ValueError, match="'alpaca' needs output in every row"):
        load_examples(str(tmp_path / "a.csv"), prompt_format="alpaca")


def test_a_file_that_is_not_what_its_name_says(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match=r"a\.json: this \.json file cannot be read: JSON parse error"):
        load_examples(str(tmp_path / "a.json"))


def test_load_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_examples(str(tmp_path / "missing.json"))
    (tmp_path / "a.xlsx").write_text("")
    with pytest.raises(ValueError, match=r"'.xlsx' are not read"):
        load_examples(str(tmp_path / "a.xlsx"))


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data folder SPARSELORA_DATA is not here")
@pytest.mark.parametrize(
    ("file", "prompt_format", "train_on"),
    [
        ("train/math_10k_rebuilt.json", "alpaca", "output"),
        ("train/math_10k_rebuilt.json", "llm_adapters", "output"),
        ("train/commonsense_17k.json", "llm_adapters", "answer"),
        ("train/code_alpaca_5k.json", "evol_instruct", "output"),
        ("test/SVAMP.json", "alpaca", "answer"),
        ("train/gsm8k_train.jsonl", "question_answer", "output"),
        ("text/tinystories_lowercase_4MB.txt", "text_split", "output"),
    ],
)
def test_real_data(file, prompt_format, train_on):
    rows = load_examples(str(DATA / file), "train", prompt_format, train_on, max_examples=20)
    assert len(rows) == 20
    assert all(row["prompt"] and row["completion"] for row in rows)
