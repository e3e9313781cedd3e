import importlib.metadata
import re

import pytest
from helpers import ROOT, SPARSE, assert_untouched, lora_model, snapshot
from packaging.specifiers import SpecifierSet

from sparselora_hf import sparsify, versions
from sparselora_hf.trainer import SparseLoraTrainer


@pytest.fixture
def pretend(monkeypatch):
    """Let a package seem to have another version."""

    def set_version(package, version):
        real = importlib.metadata.version
        monkeypatch.setattr(importlib.metadata, "version", lambda name: version if name == package else real(name))

    versions.check_versions.cache_clear()
    yield set_version
    versions.check_versions.cache_clear()


@pytest.mark.parametrize("package", versions.SUPPORTED)
def test_what_is_installed_is_supported(package):
    versions.check_versions(package)


@pytest.mark.parametrize("package", versions.SUPPORTED)
def test_the_project_declares_the_same_lower_bound(package):
    declared = re.search(rf'"{package}>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert declared.group(1) == versions.SUPPORTED[package].lowest


@pytest.mark.parametrize("package", versions.SUPPORTED)
def test_lowest_set_is_what_is_declared(package):
    pinned = re.search(rf"^{package}==([\d.]+)$", (ROOT / ".ci" / "lowest.txt").read_text(), re.MULTILINE)
    if package == "torch":
        assert pinned is None, "torch comes from cpu.txt: older releases have no CPU build on PyPI"
    else:
        assert pinned.group(1).startswith(versions.SUPPORTED[package].lowest)


@pytest.mark.parametrize("package", versions.SUPPORTED)
def test_the_oldest_python_declared_is_one_that_the_lowest_releases_take(package):
    if not str(versions.installed(package)).startswith(versions.SUPPORTED[package].lowest):
        pytest.skip(f"{package} {versions.installed(package)} is not the lowest release")
    oldest = re.search(r'^requires-python = ">=([\d.]+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert oldest in SpecifierSet(importlib.metadata.metadata(package)["Requires-Python"])


@pytest.mark.parametrize(
    ("package", "version"), [("transformers", "4.57.6"), ("peft", "0.17.1"), ("accelerate", "2.0"), ("torch", "2.5.1")]
)
def test_another_version_is_refused_before_the_model_is_touched(pretend, package, version):
    pretend(package, version)
    model = lora_model()
    before = snapshot(model)
    with pytest.raises(ImportError, match=rf'{package} {version} is not .* Run: pip install "{package}>='):
        sparsify(model, SPARSE)
    assert_untouched(model, before)


def test_trl_is_asked_of_the_trainer_alone(pretend):
    pretend("trl", "1.9.0")
    sparsify(lora_model(), SPARSE).restore()
    with pytest.raises(ImportError, match=r"trl 1\.9\.0 is not supported: SparseLoRA needs trl >= 1\.16 .*and < 2"):
        SparseLoraTrainer(model=lora_model(), sparse_config=SPARSE)


@pytest.mark.parametrize(("version", "warned"), [("0.99.0", True), ("0.21.9", False)])
def test_a_newer_release_is_let_through_with_a_warning(pretend, caplog, version, warned):
    pretend("peft", version)
    versions.check_versions("peft")
    assert ("peft 0.99.0 is newer than the versions tested, up to 0.21" in caplog.text) is warned


def test_a_package_that_is_missing(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ImportError, match=r'trl is not installed\. Run: pip install "trl>='):
        versions.installed("trl")
