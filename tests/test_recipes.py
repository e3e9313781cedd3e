"""Every recipe says what the paper says, and runs in small."""

import importlib.util
import json
import os
import re
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT

from sparselora_hf import SparseLoraConfig
from sparselora_hf.cli.main import main
from sparselora_hf.cli.recipe import parse, parse_groups, read_recipe
from sparselora_hf.cli.sft import make_trainer, prepare, trainer_keywords
from sparselora_hf.evaluation.tasks import find_tasks
from sparselora_hf.presets import PRESETS
from sparselora_hf.prompts import PROMPT_FORMATS
from sparselora_hf.shapes import MODEL_SHAPES

FOLDER = ROOT / "recipes"

# arXiv 2506.16500, table of training settings: row length, batch, epochs, learning rate. For the first two it has 512,
# the length of its speed runs; the reference's data code cuts rows at 256 (spft/data.py), which is what training sees.
PAPER = {
    "math10k": (256, 8, 3, 3e-4),
    "commonsense170k": (256, 8, 1, 3e-4),
    "codefeedback": (1024, 6, 1, 2e-5),
    "wizardlm": (2048, 2, 1, 2e-5),
    "arc_agi": (4096, 1, 3, 2e-4),
    "glue": (128, 8, 3, 5e-5),
}

# schedules that the paper reports, by recipe
SCHEDULES = {
    "math10k/llama-2-7b": "llama-2-7b-math",
    "math10k/llama-2-13b": "llama-2-13b-math",
    "math10k/llama-3-8b": "llama-3-8b-math",
    "math10k/llama-3-8b-qlora": "llama-3-8b-math",
    "commonsense170k/llama-2-7b": "llama-2-7b-csr",
    "commonsense170k/llama-2-13b": "llama-2-13b-csr",
    "commonsense170k/llama-3-8b": "llama-3-8b-csr",
    "commonsense170k/llama-3-8b-qlora": "llama-3-8b-csr",
    "codefeedback/llama-2-7b": "llama-2-7b-code",
    "codefeedback/llama-3.1-8b": "llama-3.1-8b-code",
    "wizardlm/llama-3.1-8b": "llama-3.1-8b-wizard",
    "arc_agi/llama-3.1-8b": "llama-3.1-8b-arc-agi",
    "glue/llama-3-8b": "llama-3-8b-glue",
}


def load(path):
    """A script of the recipes as a module."""
    name = f"recipe_{path.parent.name}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


smoke = load(FOLDER / "smoke.py")
ALL = {f"{path.parent.name}/{path.stem}": path for path in smoke.recipes()}
TRAINED = {name: path for name, path in ALL.items() if not name.startswith("glue/")}


def test_the_papers_schedules_have_their_recipe_and_the_others_a_modern_model():
    named = {name: read_recipe(path).get("sparselora", {}).get("preset") for name, path in ALL.items()}
    assert {name: preset for name, preset in named.items() if preset} == SCHEDULES
    assert set(SCHEDULES.values()) == set(PRESETS)
    modern = {name.split("/")[0] for name, preset in named.items() if not preset}
    assert modern == set(PAPER)


@pytest.mark.parametrize("name", TRAINED)
def test_recipe(name):
    recipe, values = parse(["--config", str(ALL[name])]), read_recipe(ALL[name])
    training, model, data = recipe.training, recipe.model, recipe.data
    shown = (training.max_length, training.per_device_train_batch_size, training.num_train_epochs)
    assert (*shown, training.learning_rate) == PAPER[name.split("/")[0]]
    assert (training.lr_scheduler_type, training.warmup_steps) == ("cosine", 0.04)
    assert (model.lora_r, model.lora_alpha, model.lora_dropout) == (32, 64, 0)
    assert model.lora_target_modules == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert recipe.sparse == ({"preset": SCHEDULES[name]} if name in SCHEDULES else {})
    assert model.load_in_4bit == name.endswith("-qlora")
    assert data.prompt_format is None or data.prompt_format in PROMPT_FORMATS
    assert find_tasks(data.eval_tasks)
    assert data.smoke_shape in MODEL_SHAPES
    assert training.output_dir == f"runs/{name.replace('/', '-')}"
    assert len(values) > 15


@pytest.mark.parametrize("name", [name for name in ALL if name not in TRAINED])
def test_glue_recipe(name):
    values = read_recipe(ALL[name])
    glue = load(FOLDER / "glue" / "train.py")
    shown = (values["max_length"], values["per_device_train_batch_size"], glue.TASKS["cola"].epochs)
    assert (*shown, values["learning_rate"]) == PAPER["glue"]
    assert {task for task, about in glue.TASKS.items() if about.epochs == 5} == {"mrpc", "wnli"}


def test_evaluations_that_are_shown_can_follow_the_trainings_own():
    """Other settings than those that a recipe evaluates with are refused where its answers lie."""
    from sparselora_hf.cli.eval import _parser

    lines = [line for path in FOLDER.glob("*/README.md") for line in path.read_text(encoding="utf-8").splitlines()]
    shown = [re.search(r"sparselora eval (runs/[^#]+)", line) for line in lines]
    assert sum(map(bool, shown)) >= 4
    for flags in (match[1].split() for match in shown if match):
        args = vars(_parser().parse_args(flags))
        usual = vars(_parser().parse_args([flags[0], "--task", *args["task"]]))
        changed = {name for name, value in args.items() if value != usual[name]} - {"data", "run_code"}
        assert not changed or "overwrite" in changed, flags


def test_every_folder_tells_how_it_is_run():
    for name, path in ALL.items():
        text = (path.parent / "README.md").read_text()
        assert f"{path.name}" in text, name
        assert "accelerate launch" in text


# inheritance

REQUIRED = ["--model_name_or_path", "m", "--dataset_name", "d"]


def write(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


def test_a_recipe_wins_over_those_it_builds_on(tmp_path):
    folder = write(
        tmp_path,
        common="seed: 1\nlora_r: 4\nsparselora: {rank: 4, seed: 2}\n",
        model="base: common.yaml\nlora_r: 8\n",
        data="dataset_name: d\nseed: 3\n",
        recipe="base: [model.yaml, data.yaml]\nlora_alpha: 5\nsparselora: {rank: 6}\n",
    )
    assert read_recipe(folder / "recipe.yaml") == {
        "seed": 3,
        "lora_r": 8,
        "dataset_name": "d",
        "lora_alpha": 5,
        "sparselora": {"rank": 6, "seed": 2},
    }


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"recipe": "base: other.yaml\n", "other": "base: recipe.yaml\n"}, "builds on itself"),
        ({"recipe": "base: x/../recipe.yaml\n"}, "builds on itself"),
        ({"recipe": "- a\n- b\n"}, "expected `name: value` lines, found list"),
        ({"recipe": "learning_rat: 1\n"}, "keys that nothing reads: learning_rat"),
        ({"recipe": "train_on: anwser\n"}, "train_on: 'anwser' is not one of answer, output"),
        ({"recipe": "base: 5\n"}, "base is a file or a list of files, found 5"),
        ({"recipe": "base: [5]\n"}, r"base is a file or a list of files, found \[5\]"),
        ({"recipe": "on: true\n"}, "the key True is no name"),
        ({"recipe": "env: CUDA\n"}, "env as `NAME: value` lines, found 'CUDA'"),
        ({"recipe": "output_dir: 2024-01-01\n"}, "another type than its setting"),
        ({"recipe": "sparselora: [rank]\nsmoke: true\n"}, r"SparseLoRA settings as `name: value` lines, found \["),
    ],
    ids=["circle", "itself", "list", "typo", "choice", "base", "bases", "key", "environment", "date", "section"],
)
def test_recipe_errors(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        parse(["--config", str(write(tmp_path, **files) / "recipe.yaml"), *REQUIRED])


def test_sections_may_be_left_empty(tmp_path):
    path = write(tmp_path, recipe="base:\nenv:\nsparselora:\n") / "recipe.yaml"
    assert parse(["--config", str(path), *REQUIRED]).sparse == {}
    assert parse(["--config", str(path), *REQUIRED, "--smoke"]).sparse == {"start_step": 2, "dense_if_slower": False}


def test_data_may_be_a_mixture(tmp_path):
    path = write(tmp_path, recipe="model_name_or_path: m\ndatasets: [{path: a}, {path: b}]\n") / "recipe.yaml"
    assert [each.path for each in parse(["--config", str(path)]).mixture.datasets] == ["a", "b"]


def test_a_recipe_may_come_last_and_have_any_name(tmp_path):
    path = write(tmp_path, **{"lr=1": "learning_rate: 1.0\n"}) / "lr=1.yaml"
    assert parse([*REQUIRED, f"--config={path}"]).training.learning_rate == 1.0


def test_a_single_task_needs_no_list(tmp_path):
    text = "model_name_or_path: m\ndataset_name: d\neval_tasks: gsm8k\n"
    assert parse(["--config", str(write(tmp_path, recipe=text) / "recipe.yaml")]).data.eval_tasks == ["gsm8k"]


def test_a_missing_base_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        read_recipe(write(tmp_path, recipe="base: none.yaml\n") / "recipe.yaml")


def test_environment_of_a_recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("RECIPE_SAYS", "4")
    path = write(tmp_path, recipe="env: {RECIPE_SAYS: 5}\nmodel_name_or_path: m\ndataset_name: d\n") / "recipe.yaml"
    parse(["--config", str(path)])
    assert os.environ["RECIPE_SAYS"] == "5"


# in small


@pytest.mark.parametrize("name", ["math10k/llama-3-8b", "commonsense170k/qwen3-8b"])
def test_smoke_trains_saves_and_evaluates(tmp_path, capsys, name):
    pytest.importorskip("trl")
    assert smoke.run(ALL[name], tmp_path) == 0
    smoke.check(tmp_path)
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert list(results) == [task.name for task in find_tasks(read_recipe(ALL[name])["eval_tasks"])]
    assert all(figures["settings"]["prompt_format"] == "llm_adapters" for figures in results.values())
    saved = SparseLoraConfig.from_yaml(tmp_path)
    assert saved.is_sparse
    if name in SCHEDULES:
        assert saved.mlp_sparsity == SparseLoraConfig.from_preset(SCHEDULES[name]).mlp_sparsity
    assert "sparse: 4 steps" in capsys.readouterr().out


def test_smoke_wins_over_the_recipe_and_flags_over_smoke():
    recipe = parse(["--config", str(ALL["wizardlm/llama-3.1-8b"]), "--smoke", "--max_steps", "2"])
    assert (recipe.training.max_steps, recipe.data.max_examples, recipe.model.model_name_or_path) == (2, 16, None)
    assert recipe.training.output_dir == "runs/wizardlm-llama-3.1-8b-smoke"
    assert recipe.sparse["start_step"] == 2


@pytest.mark.parametrize("flag", [["--smoke", "true"], ["--smoke=true"], []], ids=["word", "equals", "recipe"])
def test_smoke_however_it_is_asked_for(tmp_path, flag):
    text = f"base: {ALL['wizardlm/llama-3.1-8b']}\nsparselora: {{start_step: 9}}\n" + ("" if flag else "smoke: true\n")
    recipe = parse(["--config", str(write(tmp_path, recipe=text) / "recipe.yaml"), *flag])
    assert (recipe.data.smoke, recipe.training.max_steps, recipe.model.model_name_or_path) == (True, 4, None)
    assert recipe.sparse["start_step"] == 2


def test_smoke_that_is_switched_off():
    recipe = parse(["--config", str(ALL["wizardlm/llama-3.1-8b"]), "--smoke", "false"])
    assert recipe.model.model_name_or_path == "meta-llama/Llama-3.1-8B"
    assert not recipe.data.smoke


@pytest.mark.parametrize(
    ("length", "kept", "says"),
    [(60, 2, ["1 of 3 rows have no label within max_length tokens and are dropped."]), (1024, 3, [])],
    ids=["one", "none"],
)
def test_conversations_without_a_label_are_counted(tmp_path, monkeypatch, length, kept, says):
    """TRL prepares conversations itself, and drops those that max_length leaves without a label without a word."""
    said = []
    monkeypatch.setattr("sparselora_hf.cli.sft.logger.warning", said.append)
    rows = [
        {"prompt": [{"role": "user", "content": "a" * n}], "completion": [{"role": "assistant", "content": "b"}]}
        for n in (1, 2, 500)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    flags = ["--config", str(ALL["arc_agi/llama-3.1-8b"]), "--smoke", "--dataset_name", str(path)]
    recipe = prepare([*flags, "--output_dir", str(tmp_path / "out"), "--max_length", str(length), "--dense"])
    trainer = make_trainer(recipe, trainer_keywords(recipe))
    assert (len(trainer.train_dataset), said) == (kept, says)


def test_smoke_of_rows_that_it_cannot_make(tmp_path, capsys):
    recipe = write(tmp_path, recipe=f"prompt_format: text_split\noutput_dir: {tmp_path}\nsmoke_shape: llama-3-8b\n")
    assert (
        main(["sft", "--config", str(recipe / "recipe.yaml"), "--smoke", "--output_dir", str(tmp_path / "out")]) == 2
    )
    assert "makes no rows of prompt format 'text_split'" in capsys.readouterr().err


def test_smoke_of_glue(tmp_path, capsys):
    pytest.importorskip("trl")
    assert smoke.run(ALL["glue/qwen3-8b"], tmp_path) == 0
    smoke.check(tmp_path)
    result = json.loads((tmp_path / "results.json").read_text())
    assert (result["task"], result["total"]) == ("rte", 16)
    assert result["interval"][0] < result["score"] < result["interval"][1]


@pytest.fixture(scope="module")
def glue():
    return load(FOLDER / "glue" / "train.py")


@pytest.fixture
def glue_trainer(glue, tmp_path):
    """The trainer of GLUE's script in small, with more flags."""
    trl, transformers = pytest.importorskip("trl"), pytest.importorskip("transformers")

    def made(*flags):
        argv = ["--config", str(ALL["glue/qwen3-8b"]), "--smoke", "--output_dir", str(tmp_path), *flags]
        groups = (glue.GlueArguments, transformers.TrainingArguments, trl.ModelConfig)
        return glue.make_trainer(*parse_groups(argv, groups, "glue"))[0]

    return made


def test_head_and_adapters_of_glue_follow_the_seed(glue_trainer):
    drawn = []
    for seed in ("1", "1", "2"):
        trained = {name: p for name, p in glue_trainer("--seed", seed).model.named_parameters() if p.requires_grad}
        drawn.append([p for name, p in trained.items() if "lora_A" in name or "score" in name])
    assert all(map(torch.equal, drawn[0], drawn[1]))
    assert not any(map(torch.equal, drawn[0], drawn[2]))


def test_the_head_of_glue_learns_in_float32(glue_trainer):
    model = glue_trainer("--dtype", "bfloat16", "--bf16", "true").model
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model.base_model.model.model.embed_tokens.weight.dtype == torch.bfloat16


def test_glue_loads_the_model_that_flags_name(glue_trainer, monkeypatch):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    pytest.importorskip("bitsandbytes")
    revisions = []
    for auto in (AutoModelForSequenceClassification, AutoTokenizer):
        load = auto.from_pretrained

        def noted(*args, load=load, **keywords):
            revisions.append(keywords["revision"])
            return load(*args, **keywords)

        monkeypatch.setattr(auto, "from_pretrained", noted)
    trainer = glue_trainer("--model_revision", "v2", "--load_in_4bit", "--max_steps", "3")
    assert revisions == ["v2", "v2"]
    kinds = {type(module).__name__ for module in trainer.model.modules()}
    assert "Linear4bit" in kinds
    assert trainer.model.base_model.model.score.weight.is_floating_point()
    trainer.train()


def test_glue_goes_on_from_its_newest_checkpoint(glue, tmp_path, capsys):
    flags = ["--config", str(ALL["glue/qwen3-8b"]), "--smoke", "--output_dir", str(tmp_path)]
    flags += ["--save_strategy", "steps", "--save_steps", "2"]
    assert glue.main([*flags, "--max_steps", "2"]) == 0
    assert glue.main([*flags, "--max_steps", "4", "--resume_from_checkpoint", "true"]) == 0
    assert (tmp_path / "checkpoint-4").is_dir()
    capsys.readouterr()
    assert glue.main([*flags, "--max_steps", "2", "--resume_from_checkpoint", "true"]) == 0
    assert "the run was done before" in capsys.readouterr().out
    assert not (tmp_path / "checkpoint-5").exists()


def test_epochs_of_glue(glue_trainer):
    assert glue_trainer("--task_name", "mrpc").args.num_train_epochs == 5
    assert glue_trainer("--task_name", "mrpc", "--epochs", "1").args.num_train_epochs == 1
    with pytest.raises(ValueError, match="num_train_epochs: here the task decides"):
        glue_trainer("--num_train_epochs", "1")


def test_glue_trains_on_a_row_at_least(glue_trainer):
    with pytest.raises(ValueError, match="max_examples: 0 is below 1"):
        glue_trainer("--max_examples", "0")


def test_glue_without_adapters_or_a_model(glue, glue_trainer, tmp_path):
    with pytest.raises(ValueError, match="use_peft: GLUE trains LoRA adapters"):
        glue_trainer("--use_peft", "false")
    with pytest.raises(ValueError, match="Name a model"):
        glue.main(["--output_dir", str(tmp_path)])


def test_glue_metrics_of_known_cases(glue):
    """Worked out by hand: 2 true positives, 1 false positive, 1 false negative, 1 true negative."""
    told, labels = np.array([1, 1, 1, 0, 0]), np.array([1, 1, 0, 1, 0])
    assert glue.accuracy(told, labels) == pytest.approx(3 / 5)
    assert glue.f1(told, labels) == pytest.approx(2 / 3)
    assert glue.pearson(told, labels) == pytest.approx((2 * 1 - 1 * 1) / 6)  # Matthews: /sqrt(3 * 3 * 2 * 2)
    assert glue.pearson(told * 0, labels) == 0
    assert glue.spearman(np.array([1.0, 5.0, 5.0, 100.0]), np.array([1.0, 2.0, 2.0, 3.0])) == pytest.approx(1)
    assert glue.spearman(np.array([1, 2, 3, 4]), np.array([1, 3, 2, 4])) == pytest.approx(0.8)


def test_glue_data_without_a_column(glue, tmp_path):
    (tmp_path / "rte").mkdir()
    (tmp_path / "rte" / "train.jsonl").write_text('{"sentence1": "a", "label": 0}\n')
    with pytest.raises(ValueError, match=r"rte needs the column sentence2\. The data has: sentence1, label"):
        glue.read(glue.GlueArguments(data_folder=str(tmp_path)), glue.TASKS["rte"], "train")


def test_arc_data(tmp_path):
    pair = {"input": [[1, 0]], "output": [[0, 1]]}
    (tmp_path / "tasks").mkdir()
    for name in ("b", "a"):
        text = json.dumps({"train": [pair] * 3, "test": [pair] * 2})
        (tmp_path / "tasks" / f"{name}.json").write_text(text)
    make = load(FOLDER / "arc_agi" / "make_data.py")
    assert make.main([str(tmp_path / "tasks"), "--output", str(tmp_path / "out"), "--copies", "4"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]
    questions = [json.loads(line) for line in (tmp_path / "out" / "arc_agi.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 4 * 3
    assert [question["name"] for question in questions] == ["a", "b"]
    with pytest.raises(FileNotFoundError, match="holds no task"):
        make.main([str(tmp_path / "out" / "none")])
    for text, message in (('{"test": []}', "b.json is no task"), ("[1, 2", "b.json is no JSON")):
        (tmp_path / "tasks" / "b.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            make.main([str(tmp_path / "tasks"), "--output", str(tmp_path / "out")])
