"""Doors to axolotl and LLaMA-Factory, through the interfaces that they publish (axolotl 0.19, LLaMA-Factory 0.9.5).

Neither installs without GPU packages or beside today's transformers, so stand-ins with the same names and signatures
take their places; where axolotl itself can be imported, the plugin is tested with its own base class and manager.
"""

import importlib
import importlib.util
import runpy
import sys
import types

import pytest
import yaml
from helpers import ROOT, SPARSE, lora_model, run_python
from test_callback import losses, make_trainer, run

from sparselora_hf import SparseLoraCallback

SETTINGS = SPARSE.to_dict()
PLUGIN = "sparselora_hf.integrations.axolotl.SparseLoraPlugin"


class BasePlugin:
    """The part of axolotl's base class that the plugin meets."""

    def get_input_args(self):
        return None

    def add_callbacks_pre_trainer(self, cfg, model):
        return []


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


def test_axolotl_plugin_without_its_section_does_nothing(plugin):
    assert plugin.add_callbacks_pre_trainer(types.SimpleNamespace(sparselora=None), None) == []


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


def test_llamafactory_recipe_hands_the_callback_over(tmp_path, monkeypatch):
    """`run_exp(args, callbacks)` makes a trainer of the model that it loaded, and trains."""
    seen = {}

    def run_exp(args=None, callbacks=None):
        seen["trainer"] = make_trainer(tmp_path / args["output_dir"], lora_model(), callbacks)
        seen["trainer"].train()

    names = ("llamafactory", "llamafactory.train", "llamafactory.train.tuner")
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[names[-1]].run_exp = run_exp
    (tmp_path / "run.yaml").write_text("output_dir: out\n")
    SPARSE.to_yaml(tmp_path / "sparse.yaml")
    monkeypatch.setattr(sys, "argv", ["train.py", str(tmp_path / "run.yaml"), str(tmp_path / "sparse.yaml")])
    runpy.run_path(str(ROOT / "recipes/llamafactory/train.py"), run_name="__main__")
    want, _, _ = run(tmp_path, SPARSE)
    assert losses(seen["trainer"]) == losses(want)
    assert not any("Sparse" in type(module).__name__ for module in seen["trainer"].model.modules())
