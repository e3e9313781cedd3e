"""The accuracy study in small: rows are appended and not run twice, and what it changes is changed."""

import csv
import dataclasses
import types

import pytest
import torch
from helpers import ROOT, tiny_model
from training import tokenizer

from sparselora_hf.channels import HeadLayout
from sparselora_hf.plan import TokenPlan

BENCH = ROOT / "recipes" / "bench"


@pytest.fixture
def bench(monkeypatch):
    """The study's modules."""
    monkeypatch.syspath_prepend(str(BENCH))
    import accuracy
    import accuracy_ablations
    import accuracy_arms
    import accuracy_subjects

    return types.SimpleNamespace(
        ablations=accuracy_ablations, arms=accuracy_arms, study=accuracy, subjects=accuracy_subjects
    )


@pytest.fixture
def tiny(bench, monkeypatch):
    """A subject without data of its own: a random model and random tokens."""

    class Tiny(bench.subjects.TextSubject):
        def ready(self, work_dir):
            pass

        def model(self, work_dir):
            return tiny_model()

        def tokenizer(self, work_dir):
            return tokenizer()

        def task(self, seed, rows):
            ids = torch.randint(3, 61, (rows + 4, self.length), generator=torch.Generator().manual_seed(seed))
            return bench.subjects.Task(self._rows(ids[:rows]), self._rows(ids[rows:]))

    subject = Tiny("none", length=16, batch=4, steps=3, learning_rate=1e-2)
    monkeypatch.setattr(bench.study, "SUBJECTS", {"tiny": subject})
    return subject


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_study_goes_on_where_it_stopped(bench, tiny, tmp_path):
    table = tmp_path / "study.csv"
    argv = ["--subjects", "tiny", "--csv", str(table), "--work-dir", str(tmp_path)]
    bench.study.main([*argv, "--arms", "dense", "--seeds", "0"])
    first = rows_of(table)
    bench.study.main([*argv, "--arms", "dense", "static+r8@0.9", "--seeds", "0"])
    both = rows_of(table)
    assert [row["arm"] for row in both] == ["dense", "static+r8@0.9"]
    assert both[0] == first[0]
    assert float(both[1]["flops_sparse"]) < float(both[1]["flops"]) < float(both[0]["flops"]) == 1.0


def test_exact_savings_change_no_held_out_loss(bench, tiny, tmp_path):
    losses = {arm: bench.study.run("tiny", arm, 0, None, tmp_path)["heldout_loss"] for arm in ("dense", "exact")}
    losses["untrained"] = bench.study.run("tiny", "untrained", 0, None, tmp_path)["heldout_loss"]
    assert losses["exact"] == pytest.approx(losses["dense"], abs=2e-5)
    assert losses["untrained"] != pytest.approx(losses["dense"], abs=1e-3)


def test_each_change_changes_the_training(bench, tiny, tmp_path, monkeypatch):
    plain = bench.arms.Arm("test", attention=0.75, settings={"start_step": 0})
    arms = {name: dataclasses.replace(plain, study=name) for name in (None, *bench.ablations.STUDY)}
    monkeypatch.setattr(bench.study, "ARMS", arms)
    losses = {arm: bench.study.run("tiny", arm, 0, 2, tmp_path)["heldout_loss"] for arm in arms}
    assert len(set(losses.values())) == len(losses), losses


def test_every_arm_is_a_configuration(bench):
    for name, arm in bench.arms.ARMS.items():
        config = bench.arms.config_of(arm, 8)
        mlp, _ = config.layer_sparsity(8)
        chosen = list(bench.arms.SPANS[arm.span](8))
        assert sum(mlp) / len(chosen) == pytest.approx(arm.mlp, abs=1e-3), name


def test_groups_and_names_choose_arms(bench):
    assert bench.arms.select(["warmup", "dense"])[-1] == "dense"
    assert "svd@0.9" in bench.arms.select(["main"])
    with pytest.raises(ValueError, match="no such thing"):
        bench.arms.select(["no such thing"])


def test_the_reference_maps_other_channels_under_grouped_queries(bench):
    ours, theirs = HeadLayout(8, 4, 4), bench.ablations.ReferenceLayout(8, 4, 4)
    index = torch.tensor([1, 6, 11])
    assert theirs.expand(index).tolist() == [2, 3, 12, 13, 22, 23]
    assert ours.expand(index).tolist() != theirs.expand(index).tolist()
    layouts = bench.ablations.ReferenceLayout(4, 4, 4), HeadLayout(4, 4, 4)
    single, same = (layout.expand(torch.arange(16)).tolist() for layout in layouts)
    assert single == same


def test_other_rows_as_context_make_a_whole_plan(bench):
    labels = torch.tensor([[-100, -100, -100, 5, 6], [-100, -100, 7, -100, -100]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    plan = TokenPlan.from_batch(labels, mask)
    swapped = bench.ablations.with_context(plan, plan.output)
    assert swapped.output.tolist() == plan.context.tolist()
    assert sorted([*swapped.context.tolist(), *swapped.rest.tolist()]) == list(range(10))
    assert swapped.sequence.tolist() == [0, 0, 0, 1, 1]
    assert swapped.loss_in_context
    again = bench.ablations.with_context(swapped, plan.context)
    assert again.sequence.tolist() == plan.sequence.tolist()
    assert again.rest.tolist() == plan.rest.tolist()
