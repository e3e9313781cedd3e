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
        def ready(self, work_dir, device="cpu"):
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


def test_an_empty_file_gets_its_header(bench, tmp_path):
    (tmp_path / "rows.csv").touch()
    for number in (1, 2):
        bench.study.append_csv(tmp_path / "rows.csv", [{"number": number}])
    assert (tmp_path / "rows.csv").read_text().split() == ["number", "1", "2"]


def test_a_full_disk_leaves_no_half_row(bench, tmp_path):
    resource = pytest.importorskip("resource", reason="no limits on the size of files here")
    path, row = tmp_path / "rows.csv", {"number": 1, "text": "x" * 400}
    bench.study.append_csv(path, [row])
    before, (soft, hard) = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 700, hard))  # one row more fits, and half of another
    try:
        with pytest.raises(OSError):
            bench.study.append_csv(path, [row, row])
        assert path.read_bytes() == before
        bench.study.append_csv(path, [row])
        with pytest.raises(OSError):
            bench.study.append_csv(path, [row])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text().splitlines() == ["number,text", *[f"1,{'x' * 400}"] * 2]


def test_exact_savings_change_no_held_out_loss(bench, tiny, tmp_path):
    losses = {arm: bench.study.run("tiny", arm, 0, None, tmp_path)["heldout_loss"] for arm in ("dense", "exact")}
    losses["untrained"] = bench.study.run("tiny", "untrained", 0, None, tmp_path)["heldout_loss"]
    assert losses["exact"] == pytest.approx(losses["dense"], abs=2e-5)
    assert losses["untrained"] != pytest.approx(losses["dense"], abs=1e-3)


def test_a_longer_arm_has_more_flops(bench, tiny, tmp_path):
    arm = bench.arms.Arm("test", settings={"start_step": 0})
    shares = [
        bench.study.run("tiny", "name", 0, 2, tmp_path, dataclasses.replace(arm, longer=times)) for times in (1.0, 2.0)
    ]
    assert shares[1]["flops"] == pytest.approx(2 * shares[0]["flops"], abs=2e-4)
    assert shares[1]["flops_sparse"] == shares[0]["flops_sparse"] == shares[0]["flops"]
    assert shares[1]["steps"] == 2


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
    main = bench.arms.select(["main"])
    assert main[0] == "dense"
    assert {"svd@0.9", "static+r32@0.97"} < set(main)
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


def row(arm, seed, loss, **more):
    return {"subject": "s", "steps": "4", "arm": arm, "seed": str(seed), "heldout_loss": str(loss)} | {
        "exact_match": "",
        "flops": "0.5",
        "flops_sparse": "0.4",
        **more,
    }


def test_gaps_are_paired_by_seed(tables, tmp_path):
    rows = [row("dense", seed, loss) for seed, loss in enumerate((1.0, 2.0, 4.0))]
    rows += [row("sparse", seed, loss) for seed, loss in enumerate((1.1, 2.2, 4.3))] + [row("sparse", 9, 50.0)]
    (gap,) = tables.gaps(rows)
    assert gap.mean == pytest.approx(0.2)
    assert gap.half_width == pytest.approx(4.303 * 0.1 / 3**0.5)
    assert gap.percent == pytest.approx(100 * 0.2 / (7 / 3))
    assert gap.seeds == 3
    assert tables.quality_rows(rows, "s", 4)[1] == [["sparse", "+0.2000 ± 0.2484", "+8.57", "50%", "40%", "3"]]
    tables.draw_frontier(rows, {("s", 4): "a panel"}, tmp_path / "gaps.png")
    assert (tmp_path / "gaps.png").read_bytes().startswith(b"\x89PNG")


def test_any_arm_can_be_the_one_compared_with(tables):
    rows = [row(arm, seed, loss + seed) for arm, loss in (("dense", 1.0), ("a", 1.5), ("b", 1.75)) for seed in (0, 1)]
    header, body = tables.quality_rows(rows, "s", 4, ["b"], baseline="a")
    assert header[1] == "gap to a"
    assert body[0][:2] == ["b", "+0.2500 ± 0.0000"]


def test_a_single_seed_has_no_interval(tables):
    rows = [row("dense", 0, 1.0, exact_match="90.0"), row("sparse", 0, 1.01, exact_match="88.5", flops="")]
    (gap,) = tables.gaps(rows)
    assert gap.half_width is None
    assert gap.match == "-1.5"
    assert gap.flops is None


def test_exact_match_has_an_interval_over_seeds(tables):
    rows = [row("dense", seed, 1.0, exact_match="90.0") for seed in (0, 1)]
    rows += [row("sparse", seed, 1.0, exact_match=match) for seed, match in enumerate(("90.0", "89.0"))]
    assert tables.gaps(rows)[0].match == "-0.5 ± 6.4"  # 12.706 * 0.7071 / 2 ** 0.5


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import accuracy_table

    return accuracy_table


def test_shares_of_energy(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCH))
    import accuracy_table
    import estimators

    tiny_model().save_pretrained(tmp_path / "models" / "tiny")
    ids = torch.randint(3, 61, (8, 16), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(estimators, "DATA", tmp_path)
    monkeypatch.setattr(estimators, "CONTEXT", 12)
    monkeypatch.setattr(estimators, "OUTPUT_ROWS", {"4 output rows": 4})
    monkeypatch.setattr(estimators, "chunks", lambda *arguments: ids)
    names = ("oracle", "random", "static", "output", "svd", "svd_whitened")
    settings = {name: {"criterion": name, "rank": 4} for name in names}
    monkeypatch.setattr(estimators, "ESTIMATORS", settings)
    rows = list(estimators.rows_of("tiny", "stories", [0.5, 0.9], batches=2, batch=4))
    assert len(rows) == 3 * 3 * 2 * (len(settings) + 2)
    shares = {
        name: [r["share"] for r in rows if r["estimator"] == name and r["part"] == "mlp"]
        for name in (*settings, "output, 4 output rows", "4 output rows alone", "best fixed set")
    }
    assert min(r["share"] for r in rows if r["estimator"] == "oracle") == 1.0
    assert max(shares["random"]) < 1.0
    assert sum(shares["random"]) < sum(shares["4 output rows alone"]) < sum(shares["oracle"])
    assert sum(shares["random"]) < sum(shares["output, 4 output rows"]) < sum(shares["oracle"])
    assert sum(shares["best fixed set"]) > sum(shares["static"]) > sum(shares["random"])
    header, body = accuracy_table.estimator_rows([{**r, "sparsity": str(r["sparsity"])} for r in rows], "mlp")
    assert header == ["estimator", "tiny, stories, 0.9"]
    assert body[0] == ["oracle", "1.00 (1.00)"]


def test_greedy_search_spares_the_sensitive_layer(bench):
    import accuracy_schedule

    sensitivity = (6.0, 1.0, 2.0, 1.0)

    def trial(schedule):
        loss = 1.0 + sum(weight * sparsity**2 for weight, sparsity in zip(sensitivity, schedule, strict=True))
        return loss, 1 - sum(schedule) / 4

    found = [schedule for schedule, _, _ in accuracy_schedule.search(trial, 4, target=0.6)]
    assert found[0] == (0.0, 0.5, 0.0, 0.0)
    assert found[-1] == (0.0, 0.97, 0.75, 0.0)
    assert list(accuracy_schedule.search(trial, 4, target=0.0))[-1][0] == (0.97, 0.97, 0.97, 0.0)


def test_trials_of_a_search_are_not_run_twice(bench, tiny, tmp_path):
    import accuracy_schedule

    settings = {"subject": "tiny", "criterion": "static", "stand_in": 4, "seed": 0, "steps": 2, "work_dir": tmp_path}
    args = types.SimpleNamespace(csv=tmp_path / "trials.csv", **settings)
    first = accuracy_schedule.trials(args)((0.5, 0.0, 0.0))
    assert first == accuracy_schedule.trials(args)((0.5, 0.0, 0.0))
    assert [row["arm"] for row in rows_of(args.csv)] == ["static+r4 0.5/0/0"]
    assert 0 < first[1] < 1


def test_losses_of_sparse_forwards(bench, tiny, tmp_path, monkeypatch):
    import accuracy_forward

    monkeypatch.setattr(accuracy_forward, "SUBJECTS", {"tiny": tiny})
    table = tmp_path / "forward.csv"
    arms = ["dense", "exact", "static+r8@0.9", "svd attention@0.75", "svd attention@0.75, reference mapping"]
    argv = ["--subjects", "tiny", "--batches", "1", "--csv", str(table), "--work-dir", str(tmp_path)]
    accuracy_forward.main([*argv, "--arms", *arms, "svd@0.9, output tokens too"])
    losses = {row["arm"]: float(row["heldout_loss"]) for row in rows_of(table)}
    assert list(losses) == arms
    assert losses["exact"] == pytest.approx(losses["dense"], abs=2e-5)
    assert len({round(loss, 4) for loss in losses.values()}) == 4
    accuracy_forward.main([*argv, "--arms", *arms])
    assert len(rows_of(table)) == len(arms)
