"""Doors to axolotl and LLaMA-Factory, through the interfaces that they publish (axolotl 0.19, LLaMA-Factory 0.9.5).

Neither installs without GPU packages or beside today's transformers, so stand-ins with the same names and signatures
take their places; where axolotl itself can be imported, the plugin is tested with its own base class and manager.
"""

import functools
import importlib
import importlib.util
import runpy
import sys
import types

import pytest
import yaml
from helpers import ROOT, SPARSE, lora_model, run_python
from test_callback import losses, make_trainer, run
from transformers import Trainer

from sparselora_hf import SparseLoraCallback, SparseLoraConfig

SETTINGS = SPARSE.to_dict()
PLUGIN = "sparselora_hf.integrations.axolotl.SparseLoraPlugin"


class BasePlugin:
    """The part of axolotl's base class that the plugin meets."""

    def get_input_args(self):
        return None

    def add_callbacks_pre_trainer(self, cfg, model):
        return []

    def post_trainer_create(self, cfg, trainer):
        pass


class AxolotlTrainer(Trainer):
    """The part of axolotl's trainer that decides what is read of a training step."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        return super().compute_loss(model, inputs, *args, **kwargs)


AxolotlTrainer.compute_loss.__module__ = "axolotl.core.trainers.base"


class DistillingTrainer(AxolotlTrainer):
    """As those of other plugins are, whose loss is made of logits."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        return model(**inputs).logits.logsumexp(-1).square().mean()


def wrap_loss(trainer):
    """As a plugin does that wants to see every loss."""
    own = trainer.compute_loss
    trainer.compute_loss = functools.wraps(own)(lambda *args, **kwargs: own(*args, **kwargs))


def ask_for_orpo(trainer):
    trainer.args.orpo_alpha = 0.1


def heads(model):
    """Rows of every forward's logits from now on."""
    seen = []
    model.register_forward_hook(lambda module, args, output: seen.append(output.logits.shape[:2]))
    return seen


WHOLE, FEW = {(2, 11)}, {(1, 7)}  # two rows of 11 tokens, three of each labelled


@pytest.fixture
def plugin(monkeypatch):
    """The plugin as axolotl makes it from its dotted path, on a base class that stands for axolotl's."""
    names = ("axolotl", "axolotl.integrations", "axolotl.integrations.base")
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[names[-1]].BasePlugin = BasePlugin
    path, name = PLUGIN.rsplit(".", 1)
    monkeypatch.delitem(sys.modules, path, raising=False)
    yield getattr(importlib.import_module(path), name)()
    sys.modules.pop(path, None)


def test_axolotl_plugin_adds_the_callback_by_the_runs_settings(plugin, tmp_path):
    want, _, _ = run(tmp_path, SPARSE)
    model = lora_model()
    callbacks = plugin.add_callbacks_pre_trainer(types.SimpleNamespace(sparselora=SETTINGS), model)
    trainer = make_trainer(tmp_path, model, callbacks)
    trainer.train()
    assert losses(trainer) == losses(want)


@pytest.mark.parametrize(
    ("trainer_class", "change", "rows"),
    [
        (AxolotlTrainer, lambda trainer: None, FEW),
        (type("SubclassedTrainer", (AxolotlTrainer,), {}), lambda trainer: None, FEW),
        (AxolotlTrainer, wrap_loss, WHOLE),
        (AxolotlTrainer, ask_for_orpo, WHOLE),
        (DistillingTrainer, lambda trainer: None, WHOLE),
        (Trainer, lambda trainer: None, WHOLE),
    ],
    ids=["axolotl's trainer", "a subclass", "wrapped by another plugin", "ORPO", "a loss of its own", "no axolotl"],
)
def test_axolotl_plugin_promises_where_the_trainer_takes_the_models_loss(
    plugin, tmp_path, trainer_class, change, rows
):
    settings = {"max_steps": 2, "trainer_class": trainer_class}
    want = make_trainer(tmp_path, lora_model(), [], **settings)
    want.train()
    model, cfg = lora_model(), types.SimpleNamespace(sparselora={})
    seen = heads(model)
    trainer = make_trainer(tmp_path, model, plugin.add_callbacks_pre_trainer(cfg, model), **settings)
    change(trainer)
    plugin.post_trainer_create(cfg, trainer)
    trainer.train()
    assert set(seen) == rows
    assert losses(trainer) == pytest.approx(losses(want), rel=1e-5)


def test_axolotl_plugin_without_its_section_does_nothing(plugin, tmp_path):
    cfg = types.SimpleNamespace(sparselora=None)
    assert plugin.add_callbacks_pre_trainer(cfg, None) == []
    plugin.post_trainer_create(cfg, make_trainer(tmp_path, lora_model(), [], trainer_class=AxolotlTrainer))


def test_axolotl_plugin_refuses_a_wrong_setting(plugin):
    with pytest.raises(ValueError, match="Unknown SparseLoRA setting sparsity"):
        plugin.add_callbacks_pre_trainer(types.SimpleNamespace(sparselora={"sparsity": 0.9}), None)


def test_axolotl_plugin_names_its_section(plugin):
    path, name = plugin.get_input_args().rsplit(".", 1)
    schema = getattr(importlib.import_module(path), name)
    assert schema(sparselora=SETTINGS).sparselora == SETTINGS
    assert schema().sparselora is None
    with pytest.raises(ValueError, match="sparselora"):
        schema(sparselora=0.9)


def test_axolotl_recipe_reads_as_settings(plugin):
    recipe = yaml.safe_load((ROOT / "recipes/axolotl/llama-3-8b.yaml").read_text())
    assert recipe["plugins"] == [PLUGIN]
    (callback,) = plugin.add_callbacks_pre_trainer(types.SimpleNamespace(sparselora=recipe["sparselora"]), None)
    assert isinstance(callback, SparseLoraCallback)


@pytest.mark.skipif(importlib.util.find_spec("axolotl") is None, reason="axolotl is not installed")
def test_axolotls_own_manager_takes_the_plugin():
    code = f"""
from axolotl.integrations.base import BasePlugin, PluginManager
from axolotl.utils.dict import DictDefault
manager = PluginManager.get_instance()
manager.register({PLUGIN!r})
(plugin,) = manager.plugins.values()
callbacks = manager.add_callbacks_pre_trainer(DictDefault({{"sparselora": {{"mlp_sparsity": {{"3-30": 0.9}}}}}}), None)
print(isinstance(plugin, BasePlugin), manager.get_input_args(), [type(callback).__name__ for callback in callbacks])
"""
    want = "True ['sparselora_hf.integrations.axolotl.SparseLoraArgs'] ['SparseLoraCallback']"
    assert run_python(code).splitlines()[-1] == want


@pytest.fixture
def llamafactory(monkeypatch, tmp_path):
    """Trains by LLaMA-Factory's script: `run_exp(args, callbacks)` makes a trainer of the model that it loaded."""
    seen = {}

    def run_exp(args=None, callbacks=None):
        model = lora_model()
        seen["heads"] = heads(model)
        seen["trainer"] = make_trainer(tmp_path / args["output_dir"], model, callbacks)
        seen["trainer"].train()

    names = ("llamafactory", "llamafactory.train", "llamafactory.train.tuner")
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[names[-1]].run_exp = run_exp

    def train(config, **arguments):
        (tmp_path / "run.yaml").write_text(yaml.safe_dump({"output_dir": "out", **arguments}))
        config.to_yaml(tmp_path / "sparse.yaml")
        monkeypatch.setattr(sys, "argv", ["train.py", str(tmp_path / "run.yaml"), str(tmp_path / "sparse.yaml")])
        runpy.run_path(str(ROOT / "recipes/llamafactory/train.py"), run_name="__main__")
        return seen

    return train


def test_llamafactory_recipe_hands_the_callback_over(tmp_path, llamafactory):
    seen = llamafactory(SPARSE)
    want, _, _ = run(tmp_path, SPARSE)
    assert losses(seen["trainer"]) == pytest.approx(losses(want), rel=1e-4)
    assert not any("Sparse" in type(module).__name__ for module in seen["trainer"].model.modules())


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        ({}, FEW),
        ({"stage": "sft", "num_mtp_layers": 0, "use_asft_loss": False}, FEW),
        ({"stage": "dpo"}, WHOLE),
        ({"use_asft_loss": True}, WHOLE),
        ({"num_mtp_layers": 1}, WHOLE),
    ],
    ids=str,
)
def test_llamafactory_recipe_promises_where_the_trainer_takes_the_models_loss(llamafactory, arguments, rows):
    assert set(llamafactory(SparseLoraConfig(), **arguments)["heads"]) == rows
