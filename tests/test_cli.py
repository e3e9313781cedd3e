import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sparselora_hf.cli import doctor, settings
from sparselora_hf.cli.main import COMMANDS, main
from sparselora_hf.config import SparseLoraConfig

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("SPARSELORA_DATA", ROOT.parent / "shared" / "data"))
RECIPES = ROOT / "recipes" / "math10k"
MODEL, MATH = DATA / "models" / "stories260K", DATA / "train" / "math_10k_rebuilt.json"

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the shared data folder SPARSELORA_DATA is not here")
REQUIRED = ["--model_name_or_path", "model", "--dataset_name", "data"]


def error_of(capsys, *argv: str) -> str:
    """Run a command that must fail on what the user gave; returns its one line."""
    capsys.readouterr()
    assert main(argv) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sparselora: error: ")]
    assert len(lines) == 1
    return lines[0]


# main


def test_help_lists_all_commands_and_loads_nothing_heavy():
    code = (
        "import sys\n"
        "from sparselora_hf.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'trl', 'yaml', 'rich'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(command in result.stdout for command in COMMANDS)


@pytest.mark.parametrize("argv", [[], ["train"]], ids=["none", "unknown"])
def test_unknown_command_exits_with_2(argv):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2


def test_errors_are_one_line_and_a_traceback_on_request(capsys, monkeypatch):
    assert "mlp_sparsity: sparsity 2 is outside" in error_of(capsys, "estimate", "llama-3-8b", "--mlp-sparsity", "2")
    monkeypatch.setenv("SPARSELORA_TRACEBACK", "1")
    with pytest.raises(ValueError, match="outside"):
        main(["estimate", "llama-3-8b", "--mlp_sparsity", "2"])


# settings


def test_settings_read_values_as_yaml():
    values = {"preset": "llama-3-8b-math", "mlp_sparsity": "{3-30: 0.9}", "start_step": "10", "exact": "false"}
    given = settings.sparse_settings({**values, "sparse_seed": "7", "end_step": "100", "rank": None})
    config = settings.configured(given, 32, 4096)
    assert config.mlp_sparsity == {"3-30": 0.9}
    assert (config.start_step, config.exact, config.seed, config.rank) == (10, (), 7, 8)
    assert config.attention_sparsity == SparseLoraConfig.from_preset("llama-3-8b-math").attention_sparsity


def test_settings_that_a_recipe_has_read_already():
    want = SparseLoraConfig(attention_sparsity=0.5, start_step=0, exact=False)
    given = settings.sparse_settings({"attention_sparsity": 0.5, "start_step": 0, "exact": False})
    assert settings.configured(given, 8, 64) == want


def test_what_is_not_given_is_no_setting():
    assert settings.sparse_settings({"preset": None, "mlp_sparsity": None, "seed": 3}) == {}
    assert settings.configured({}, 8, 64) == SparseLoraConfig.default(8, 64)


@pytest.mark.parametrize("given", [{"start_step": "0.1"}, {"dense_if_slower": "false", "sparse_seed": "1"}], ids=str)
def test_settings_without_a_schedule_change_the_models_default(given):
    parsed = settings.sparse_settings(given)
    assert settings.configured(parsed, 8, 64) == SparseLoraConfig.default(8, 64).replace(**parsed)
    exact = settings.sparse_settings({**given, "mlp_sparsity": "0"})
    assert settings.configured(exact, 8, 64) == SparseLoraConfig(**parsed)


def test_prefixes_are_needed_and_suffice():
    trl = pytest.importorskip("trl")
    taken = set()
    for group in (trl.ScriptArguments, trl.SFTConfig, trl.ModelConfig, trl.DatasetMixtureConfig):
        taken |= {field.name for field in dataclasses.fields(group)}
    fields = {field.name for field in dataclasses.fields(SparseLoraConfig)}
    assert fields & taken == set(settings.CLASHING)
    assert not taken & {settings.argument_name(field) for field in fields}


# estimate


def test_estimate_json_of_a_known_shape(capsys):
    assert main(["estimate", "llama-3-8b", "--preset", "llama-3-8b-math", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["steps"]["dense"]["bound"] == 1.0
    assert 2.2 < result["steps"]["sparse"]["bound"] < 2.4
    assert 1.0 < result["run_bound"] < result["steps"]["sparse"]["bound"]
    assert len(result["layers"]) == 32
    assert (result["layers"][3]["mlp_keep"], result["layers"][3]["attention_keep"]) == (144, None)
    assert result["memory_bytes"]["sparse_activations"] < result["memory_bytes"]["dense_activations"]


def test_estimate_counts_the_rows_that_a_criterion_scores(capsys):
    def scores(*settings):
        assert main(["estimate", "llama-3-8b", "--preset", "llama-3-8b-math", "--json", *settings]) == 0
        return json.loads(capsys.readouterr().out)["steps"]["sparse"]["groups"]["estimator"]

    context = 8 * (512 - 129)
    gate_up, inputs = 2 * 4096 * 14336, 4096 * (4096 + 2 * 1024)  # of the 28 and 14 layers that are sparse
    assert scores("--criterion", "oracle") == 2 * context * (28 * gate_up + 14 * inputs)
    assert scores("--criterion", "sampled") == pytest.approx(scores("--criterion", "oracle") * 64 / context)
    assert scores("--score_tokens", "8") == scores("--criterion", "svd_mean") == scores() * 8 / context
    assert scores("--criterion", "output") == 0


def test_estimate_prints_tables(capsys):
    assert main(["estimate", "tiny-229m", "--mlp_sparsity", "0.9", "--batch", "2", "--checkpointing"]) == 0
    output = capsys.readouterr().out
    assert "Linear layers" in output
    assert "bound" in output


def test_estimate_flags_win_over_a_settings_file(capsys, tmp_path):
    path = SparseLoraConfig(mlp_sparsity=0.5, rank=4, start_step=3, end_step=9).to_yaml(tmp_path)
    for given in (path, tmp_path):  # the file, or the folder that it is in
        assert main(["estimate", "tiny-229m", "--sparse-config", str(given), "--mlp_sparsity", "0.75", "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert (result["config"]["mlp_sparsity"], result["config"]["rank"], result["run_bound"]) == (0.75, 4, None)


def test_estimate_of_a_configuration_file_without_weights(capsys, tmp_path):
    from transformers import LlamaConfig

    LlamaConfig(num_hidden_layers=2).save_pretrained(tmp_path)
    for name in (tmp_path, tmp_path / "config.json"):
        assert main(["estimate", str(name), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["model"]["layers"] == 2


def test_estimate_says_what_it_takes_an_unknown_type_for(capsys, tmp_path, monkeypatch):
    from transformers import BertConfig, LlamaConfig
    from transformers.utils import logging

    told = []
    monkeypatch.setattr(logging.get_logger("sparselora_hf.cli.estimate"), "warning", told.append)
    for config, count in ((LlamaConfig(num_hidden_layers=2), 0), (BertConfig(num_hidden_layers=2), 1)):
        config.save_pretrained(tmp_path)
        assert main(["estimate", str(tmp_path), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["model"]["mlp_matrices"] == 3
        assert len(told) == count
    assert "'bert'" in told[0] and "a gated MLP" in told[0]


def test_estimate_errors(capsys, tmp_path):
    assert "layer 33 does not exist" in error_of(capsys, "estimate", "llama-3-8b", "--mlp_sparsity", "{33: 0.9}")
    assert "There is no preset 'x'" in error_of(capsys, "estimate", "llama-3-8b", "--preset", "x")
    assert "Shapes: llama-2-7b" in error_of(capsys, "estimate", str(tmp_path / "nothing"))
    (tmp_path / "typo.yaml").write_text("mlp_sparsty: 0.9\n")
    path = str(tmp_path / "typo.yaml")
    assert "mlp_sparsty" in error_of(capsys, "estimate", "llama-3-8b", "--sparse-config", path)
    (tmp_path / "typo.yaml").write_text("mlp_sparsity: {")
    assert "typo.yaml is no YAML" in error_of(capsys, "estimate", "llama-3-8b", "--sparse-config", path)


# sft: parsing


@pytest.fixture
def parse():
    pytest.importorskip("trl")
    from sparselora_hf.cli.sft import parse

    return parse


@pytest.mark.parametrize("name", ["llama-3-8b", "llama-2-7b", "llama-2-13b"])
def test_recipes_say_what_the_paper_says(parse, name):
    recipe = parse(["--config", str(RECIPES / f"{name}.yaml")])
    assert recipe.sparse == {"preset": f"{name}-math"}
    assert (recipe.model.use_peft, recipe.model.lora_r, recipe.model.lora_alpha) == (True, 32, 64)
    assert (recipe.training.per_device_train_batch_size, recipe.training.num_train_epochs) == (8, 3)
    assert (recipe.training.learning_rate, recipe.training.warmup_steps) == (3e-4, 0.04)
    assert recipe.training.max_length == 256


def test_flags_win_over_the_recipe(parse):
    recipe = parse(
        [f"--config={RECIPES / 'llama-3-8b.yaml'}", "--lora_r", "4", "--mlp_sparsity", "0.5", "--seed", "1"]
    )
    assert (recipe.model.lora_r, recipe.sparse["mlp_sparsity"]) == (4, 0.5)
    assert (recipe.training.seed, "seed" in recipe.sparse) == (1, False)


def test_flat_keys_and_section_mean_the_same(parse, tmp_path):
    head = "model_name_or_path: m\ndataset_name: d\n"
    (tmp_path / "flat.yaml").write_text(head + "mlp_sparsity: {3-5: 0.9}\nsparse_seed: 4\nexact: [padding]\n")
    section = "sparselora:\n  mlp_sparsity: {3-5: 0.9}\n  seed: 4\n  exact: [padding]\n"
    (tmp_path / "section.yaml").write_text(head + section)
    flat, nested = (parse(["--config", str(tmp_path / name)]).sparse for name in ("flat.yaml", "section.yaml"))
    assert flat == nested == {"mlp_sparsity": {"3-5": 0.9}, "seed": 4, "exact": ["padding"]}


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ("q_proj", ["q_proj"]),
        ("[q_proj]", ["q_proj"]),
        ("[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("all-linear", "all-linear"),
        (".*q_proj", ".*q_proj"),
    ],
    ids=str,
)
def test_a_module_alone_is_a_name(parse, tmp_path, given, want):
    (tmp_path / "recipe.yaml").write_text(f"lora_target_modules: {given}\n")
    assert parse([*REQUIRED, "--config", str(tmp_path / "recipe.yaml")]).model.lora_target_modules == want


def test_without_settings_the_trainer_decides(parse):
    assert parse(REQUIRED).sparse == {}


def test_cpu_trains_in_fp32_unless_told(parse):
    import torch

    if torch.accelerator.is_available():
        pytest.skip("an accelerator is here: TRL's own defaults hold")
    assert (parse(REQUIRED).training.use_cpu, parse(REQUIRED).training.bf16) == (True, False)
    assert parse([*REQUIRED, "--bf16", "true"]).training.bf16


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "Name a model"),
        (["--config"], "--config needs the path"),
        (["--config", "missing.yaml"], "missing.yaml"),
        (["--config", "a.yaml", "--config=b.yaml"], "--config is given twice"),
        (REQUIRED[:2], "Name the data"),
        ([*REQUIRED, "--output_dir", __file__], f"output_dir: {__file__} is a file"),
        ([*REQUIRED, "--use_peft", "false"], "SparseLoRA trains LoRA adapters"),
        ([*REQUIRED, "--dataset_streaming"], "Streamed data"),
        ([*REQUIRED, "--streaming"], "Streamed data"),
        ([*REQUIRED, "--mlp_sparsty", "0.9"], "mlp_sparsty"),
        ([*REQUIRED, "--mlp_sparsity", "high"], "must be a number"),
        ([*REQUIRED, "--mlp_sparsity", "{"], "cannot be read as YAML"),
        ([*REQUIRED, "--train_on", "both"], "invalid choice"),
        ([*REQUIRED, "--max_steps", "many"], "invalid int value"),
        ([*REQUIRED, "--max_steps", "0"], "max_steps: a run of 0 steps"),
        ([*REQUIRED, "--max_examples", "0"], "max_examples: 0 is below 1"),
        ([*REQUIRED, "--max_example", "3"], "--max_example"),
    ],
)
def test_sft_errors(capsys, flags, message):
    pytest.importorskip("trl")
    assert message in error_of(capsys, "sft", *flags)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_steps: 0\n", "a run of 0 steps"),
        ("learning_rat: 1\n", "learning_rat"),
        ("sparselora: {rnk: 8}\n", "rnk"),
        ("a: [\n", "no YAML"),
    ],
    ids=["no steps", "key", "section key", "syntax"],
)
def test_recipe_errors(capsys, tmp_path, text, message):
    pytest.importorskip("trl")
    (tmp_path / "recipe.yaml").write_text(text)
    assert message in error_of(capsys, "sft", *REQUIRED, "--config", str(tmp_path / "recipe.yaml"))


def test_no_whole_model_is_trained_into_the_folder_of_an_adapter(parse, capsys, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    flags = [*REQUIRED, "--output_dir", str(tmp_path), "--dense"]
    assert f"{tmp_path} holds an adapter" in error_of(capsys, "sft", *flags, "--use_peft", "false")
    assert parse(flags).model.use_peft  # another adapter may take its place


# sft and doctor: runs


def smoke(folder: Path, *flags: str) -> list[str]:
    """The recipe in small on a real checkpoint and real rows; the checkpoint has five layers."""
    settings = {
        "model_name_or_path": MODEL,
        "dataset_name": MATH,
        "output_dir": folder,
        "mlp_sparsity": "{1-3: 0.75}",
        "attention_sparsity": "{2-3: 0.5}",
        "start_step": 1,
        "max_steps": 3,
        "max_examples": 8,
        "max_length": 512,
        "cache_dir": folder / "svd",
    }
    named = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    return ["sft", "--config", str(RECIPES / "llama-3-8b.yaml"), "--smoke", *named, *flags]


@pytest.fixture
def one_thread():
    """A model this small spends its time waiting for threads where other processes use the cores."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@needs_data
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_smoke_recipe_trains_and_saves_an_adapter(capsys, tmp_path, kind):
    pytest.importorskip("trl")
    pytest.importorskip("sparselora_hf.trainer")
    assert main(smoke(tmp_path, *(["--dense"] if kind == "dense" else []))) == 0
    assert f"{kind}: 3 steps in" in capsys.readouterr().out
    assert (tmp_path / "adapter_model.safetensors").is_file()


@needs_data
@pytest.mark.usefixtures("one_thread")
def test_a_setting_alone_changes_the_default_of_the_model_that_is_loaded(tmp_path):
    pytest.importorskip("sparselora_hf.trainer")
    flags = ["--model_name_or_path", str(MODEL), "--dataset_name", str(MATH), "--prompt_format", "llm_adapters"]
    flags += ["--output_dir", str(tmp_path), "--max_steps", "1", "--max_examples", "8", "--max_length", "512"]
    flags += ["--start_step", "0.1", "--dense_if_slower", "false"]
    assert main(["sft", *flags, "--report_to", "none", "--model_init_kwargs", '{"num_hidden_layers": 4}']) == 0
    default = SparseLoraConfig.default(4, 64)
    assert default != SparseLoraConfig.default(5, 64)
    assert SparseLoraConfig.from_yaml(tmp_path) == default.replace(start_step=0.1, dense_if_slower=False)


@needs_data
@pytest.mark.usefixtures("one_thread")
def test_a_run_goes_on_from_its_newest_checkpoint(capsys, tmp_path):
    pytest.importorskip("sparselora_hf.trainer")
    flags = ["--save_strategy", "steps", "--save_steps", "2", "--logging_steps", "1"]
    assert main(smoke(tmp_path, *flags)) == 0
    shutil.rmtree(tmp_path / "checkpoint-3", ignore_errors=True)
    capsys.readouterr()
    assert main(smoke(tmp_path, *flags, "--max_steps", "4", "--resume_from_checkpoint", "true")) == 0
    assert "sparse: 4 steps in" in capsys.readouterr().out
    states = (tmp_path / f"checkpoint-{step}" / "trainer_state.json" for step in (2, 4))
    logs = [json.loads(state.read_text(encoding="utf-8"))["log_history"] for state in states]
    earlier, losses = ([log["loss"] for log in part if "loss" in log] for part in logs)
    assert (len(earlier), len(losses)) == (2, 4)
    assert losses[:2] == earlier


@needs_data
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", ["sparse", "dense"])
@pytest.mark.parametrize("length", ["--max_steps 3", "--max_steps -1 --num_train_epochs 0.75"])
def test_a_run_that_is_done_takes_no_step_more(capsys, tmp_path, kind, length):
    pytest.importorskip("sparselora_hf.trainer")
    flags = ["--save_strategy", "steps", "--save_steps", "1", "--lr_scheduler_type", "constant", *length.split()]
    flags += ["--dense"] if kind == "dense" else []
    assert main(smoke(tmp_path, *flags)) == 0
    assert f"{kind}: 3 steps in" in capsys.readouterr().out
    adapter = (tmp_path / "adapter_model.safetensors").read_bytes()
    assert main(smoke(tmp_path, *flags, "--resume_from_checkpoint", "true")) == 0
    assert f"{kind}: 3 steps were taken before and the run is done, saved" in capsys.readouterr().out
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == adapter
    assert not (tmp_path / "checkpoint-4").exists()


@pytest.mark.parametrize(
    ("given", "want"), [("true", True), ("True", True), ("false", None), (None, None), ("folder", "folder")]
)
def test_where_a_run_goes_on_from(given, want):
    from sparselora_hf.cli.resume import resumed

    assert resumed(given) is want


@needs_data
def test_rows_that_trl_cannot_read_are_an_error(capsys, tmp_path):
    pytest.importorskip("trl")
    argv = [
        *REQUIRED[:1],
        str(MODEL),
        "--dataset_name",
        str(MATH),
        "--output_dir",
        str(tmp_path),
        "--max_examples",
        "2",
    ]
    assert "Pick a --prompt_format" in error_of(capsys, "sft", *argv)


@pytest.fixture
def rows_of(parse, tmp_path):
    """Tokenizer and rows that a run with flags would train on."""
    from sparselora_hf.cli.sft import trainer_keywords

    def prepared(*flags):
        named = ["--model_name_or_path", str(MODEL), "--dataset_name", str(MATH), "--output_dir", str(tmp_path)]
        keywords = trainer_keywords(parse([*named, "--prompt_format", "llm_adapters", *flags]))
        return keywords["processing_class"], keywords["train_dataset"]["input_ids"]

    return prepared


@needs_data
def test_rows_end_in_the_token_that_a_flag_names(rows_of):
    tokenizer, rows = rows_of("--eos_token", "<s>", "--max_examples", "3")
    assert {row[-1] for row in rows} == {tokenizer.convert_tokens_to_ids("<s>")}


@needs_data
def test_long_rows_are_left_out_under_packing_too(rows_of):
    flags = ("--long_rows", "drop", "--max_length", "400", "--max_examples", "50")
    rows = rows_of(*flags)[1]
    assert len(rows) == 50  # of those that are left
    assert rows_of(*flags, "--packing")[1] == rows


@needs_data
def test_packing_is_given_rows_whole(rows_of):
    flags = ("--max_length", "400", "--max_examples", "50")
    assert max(map(len, rows_of(*flags, "--packing")[1])) > 400 == max(map(len, rows_of(*flags)[1]))


@needs_data
def test_rows_whose_prompts_are_learned_too_are_left_to_trl(rows_of):
    with pytest.raises(ValueError, match="'input_ids' doesn't exist"):
        rows_of("--completion_only_loss", "false", "--max_examples", "3")


@needs_data
@pytest.mark.parametrize("column", ["image", "images"])
def test_images_stay_with_their_prompts(parse, tmp_path, column):
    """Without a processing class TRL loads the model's processor, whose collator takes both."""
    from sparselora_hf.cli.sft import trainer_keywords

    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({column: "a.png", "prompt": "<image> What is it?", "completion": "A cat."}) + "\n")
    flags = ["--model_name_or_path", str(MODEL), "--dataset_name", str(path), "--output_dir", str(tmp_path / "out")]
    keywords = trainer_keywords(parse(flags))
    assert set(keywords["train_dataset"].column_names) == {column, "prompt", "completion"}
    assert keywords["processing_class"] is None


@needs_data
def test_long_conversations_cannot_be_left_out(capsys, tmp_path):
    pytest.importorskip("trl")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}) + "\n")
    flags = ["--model_name_or_path", str(MODEL), "--dataset_name", str(path), "--output_dir", str(tmp_path / "out")]
    assert "long_rows: TRL prepares these rows" in error_of(capsys, "sft", *flags, "--long_rows", "drop")


@needs_data
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--model_name_or_path", "no/such-model"), "no/such-model"),
        (("--dataset_name", "no/such-data"), "no/such-data"),
        (("--dataset_name", "https://127.0.0.1:9/rows.json"), "https://127.0.0.1:9/rows.json"),
        (("--prompt_format", "question_answer"), "needs the column question"),
        (("--truncation_mode", "keep_end"), "truncation_mode: 'keep_end' is for rows that TRL prepares"),
        (("--eval_tasks", "gsm9k"), "There is no task 'gsm9k'"),
        (("--eval_tasks", "gsm8k", "--prompt_format", "text_split"), "eval_tasks: text_split cuts running text"),
        (("--smoke_shape", "x", "--model_name_or_path", str(MODEL), "--long_rows", "keep"), "long_rows"),
    ],
    ids=["model", "data", "address", "column", "end", "task", "format", "rows"],
)
def test_what_cannot_be_had_is_one_line(capsys, tmp_path, offline, flags, message):
    """No network, a missing column, a wrong task."""
    pytest.importorskip("trl")
    assert message in error_of(capsys, *smoke(tmp_path), *flags)


@needs_data
def test_questions_that_are_not_there_are_said_before_the_training(capsys, tmp_path):
    pytest.importorskip("trl")
    flags = smoke(tmp_path, "--eval_tasks", "boolq", "--eval_data", str(DATA / "text"))
    assert "holds no data of boolq" in error_of(capsys, *flags)
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_doctor_passes_here(capsys):
    pytest.importorskip("peft")
    pytest.importorskip("sparselora_hf.attach")
    assert main(["doctor"]) == 0
    assert "self-test" in capsys.readouterr().out


def test_doctor_fails_when_the_numbers_differ(capsys, monkeypatch):
    doctor = pytest.importorskip("sparselora_hf.cli.doctor")
    monkeypatch.setattr(doctor, "parity", lambda device: doctor.Parity(1e-3, 1e-3, 1e-2))
    assert main(["doctor"]) == 1
    assert "FAILED" in capsys.readouterr().out


# help


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.startswith("sparselora_hf ")


def test_help_of_a_setting_is_its_docstring(capsys):
    with pytest.raises(SystemExit):
        main(["estimate", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "fraction of MLP channels dropped for context tokens" in text
    assert all(len(settings._help(field.name)) > len(field.name) + 8 for field in dataclasses.fields(SparseLoraConfig))


def test_help_of_a_training_lists_what_it_takes(capsys):
    pytest.importorskip("trl")
    with pytest.raises(SystemExit):
        main(["sft", "--help"])
    text = capsys.readouterr().out
    assert all(flag in text for flag in ("--learning_rate", "--lora_r", "--max_examples", "--mlp_sparsity"))


@pytest.mark.parametrize("argv", [("estimate", "llama-3-8b", "--batch", "0"), ("quickstart", "--steps", "-1")])
def test_counts_are_positive(capsys, argv):
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    assert "must be a whole number of at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(("major", "says"), [(7, "no bfloat16: set fp16"), (9, "bfloat16")])
def test_doctor_tells_the_half_type(major, says):
    assert f"card, 16 GiB, sm_{major}5, {says}" in doctor._describe("card", 16 * 2**30, major, 5)


@pytest.mark.parametrize("inside", ["", "cache"])
def test_doctor_tells_where_a_cache_cannot_be(tmp_path, monkeypatch, inside):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPARSELORA_CACHE", str(tmp_path / "file" / inside))
    assert "not writable" in doctor._cache()


def test_doctor_names_versions_that_are_not_supported(monkeypatch):
    monkeypatch.setattr(doctor, "SUPPORTED", {"peft": None})
    monkeypatch.setattr(doctor, "check_versions", lambda package: (_ for _ in ()).throw(ImportError("Run: pip")))
    assert doctor._version("peft").endswith(", not supported. Run: pip")
    assert doctor._version("no-such-package") == "not installed"
