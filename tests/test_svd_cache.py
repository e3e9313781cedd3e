import multiprocessing
import os
from pathlib import Path

import pytest
import torch
from helpers import assert_ends
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sparselora_hf import svd_cache
from sparselora_hf.cache import default_cache_dir
from sparselora_hf.svd import truncated_svd
from sparselora_hf.svd_cache import SvdCache, fingerprint


@pytest.fixture
def weight():
    return torch.randn(24, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def stored(weight, tmp_path):
    """A cache folder with one file."""
    SvdCache(tmp_path / "cache").factors(weight, 4)
    (file,) = (tmp_path / "cache").rglob("*.safetensors")
    return file


def assert_rebuilt(weight, file: Path) -> None:
    """The file is not believed; what comes back is right, and so is the file afterwards."""
    folder = file.parents[1]
    cache, want = SvdCache(folder), truncated_svd(weight, 4)
    got = cache.factors(weight, 4)
    assert cache.hits == 0
    assert torch.equal(got.down, want.down)
    assert torch.equal(got.up, want.up)
    again = SvdCache(folder)
    assert torch.equal(again.factors(weight, 4).down, want.down)
    assert again.hits == 1


def test_hit(weight, stored, monkeypatch):
    want = truncated_svd(weight, 4)
    monkeypatch.setattr(svd_cache, "truncated_svd", None)  # must not be called
    cache = SvdCache(stored.parents[1])
    factors = cache.factors(weight, 4)
    assert cache.hits == 1
    assert torch.equal(factors.down, want.down)
    assert torch.equal(factors.up, want.up)


@pytest.mark.parametrize(("rank", "seed", "dtype"), [(3, 0, None), (4, 1, None), (4, 0, torch.bfloat16)])
def test_other_rank_seed_or_type_misses(weight, stored, rank, seed, dtype):
    cache = SvdCache(stored.parents[1])
    cache.factors(weight if dtype is None else weight.to(dtype), rank, seed)
    assert cache.hits == 0
    assert len(list(stored.parent.iterdir())) == 2


def damage_nothing_left(file):
    file.write_bytes(b"")


def damage_truncated(file):
    file.write_bytes(file.read_bytes()[:-10])


def damage_header_cut(file):
    file.write_bytes(file.read_bytes()[:30])


def damage_text(file):
    file.write_text("not a safetensors file at all")


def damage_flipped_bit(file):
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(bytes(data))


def damage_foreign(file):
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)


def damage_other_names(file):
    save_file({"weight": torch.zeros(3)}, file)


def damage_other_weight(file):
    other = SvdCache(file.parents[1] / "other")
    other.factors(torch.ones(24, 16), 4)
    (foreign,) = (file.parents[1] / "other").rglob("*.safetensors")
    foreign.replace(file)


def damage_folder(file):
    file.unlink()
    file.mkdir()


DAMAGES = [
    damage_nothing_left,
    damage_truncated,
    damage_header_cut,
    damage_text,
    damage_flipped_bit,
    damage_foreign,
    damage_other_names,
    damage_other_weight,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__.removeprefix("damage_"))
def test_damaged_file_is_rebuilt(weight, stored, damage):
    damage(stored)
    assert_rebuilt(weight, stored)


def test_folder_in_place_of_the_file(weight, stored, caplog):
    """It is no reason to keep no factors of other weights."""
    damage_folder(stored)
    cache = SvdCache(stored.parents[1])
    assert torch.equal(cache.factors(weight, 4).down, truncated_svd(weight, 4).down)
    assert f"{stored} is no file" in caplog.text
    cache.factors(weight + 1, 4)
    assert len([path for path in stored.parent.iterdir() if path.is_file()]) == 1


def test_pipe_in_place_of_the_file(weight, stored):
    stored.unlink()
    os.mkfifo(stored)
    assert_ends(SvdCache(stored.parents[1]).factors, weight, 4)
    assert stored.is_fifo()


def test_cache_that_cannot_be_written(weight, tmp_path):
    """Root may write anywhere: a file stands where the folder should be."""
    (tmp_path / "cache").write_text("in the way")
    cache = SvdCache(tmp_path / "cache")
    for _ in range(2):
        assert torch.equal(cache.factors(weight, 4).down, truncated_svd(weight, 4).down)
    assert cache.hits == 0


def _as_another_user(folder: Path, weight: torch.Tensor) -> None:
    folder.chmod(0)
    if os.getuid() == 0:  # root may read anything
        os.setuid(65534)
    assert torch.equal(SvdCache(folder).factors(weight, 4).down, truncated_svd(weight, 4).down)


def test_cache_of_another_user(weight, stored):
    folder = stored.parents[1]
    process = multiprocessing.get_context("fork").Process(target=_as_another_user, args=(folder, weight))
    process.start()
    process.join()
    folder.chmod(0o700)
    assert process.exitcode == 0


def test_nothing_is_left_when_writing_fails(weight, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(svd_cache.os, "replace", fail)
    cache = SvdCache(tmp_path)
    assert torch.equal(cache.factors(weight, 4).up, truncated_svd(weight, 4).up)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_interrupted_write_leaves_no_half_file(weight, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(svd_cache.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        SvdCache(tmp_path).factors(weight, 4)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_file_deleted_at_the_last_moment(weight, tmp_path, monkeypatch):
    """Another process empties the cache while the file is being opened: safetensors opens it twice."""

    def vanished(path, **_):
        raise RuntimeError(f"unable to open file <{path}> in read-only mode: No such file or directory (2)")

    SvdCache(tmp_path).factors(weight, 4)
    monkeypatch.setattr(svd_cache, "safe_open", vanished)
    got = SvdCache(tmp_path).factors(weight, 4)
    assert torch.equal(got.down, truncated_svd(weight, 4).down)


def _write_often(folder: str) -> None:
    torch.set_num_threads(1)
    weight = torch.arange(384.0).view(24, 16).sin()
    cache = SvdCache(folder)
    cache._read = lambda *_: None  # writes every time
    for _ in range(30):
        cache.factors(weight, 4)


def test_two_processes_never_meet_half_a_file(tmp_path, caplog):
    other = multiprocessing.get_context("fork").Process(target=_write_often, args=(str(tmp_path),))
    other.start()
    weight = torch.arange(384.0).view(24, 16).sin()
    want = truncated_svd(weight, 4)
    reader = SvdCache(tmp_path)
    while other.is_alive():
        assert torch.equal(reader.factors(weight, 4).down, want.down)
    other.join()
    assert other.exitcode == 0
    assert reader.hits > 0
    assert "damaged" not in caplog.text


@pytest.mark.parametrize(
    ("variables", "want"),
    [
        ({"SPARSELORA_CACHE": "/a"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/sparselora"),
        ({"HOME": "/c"}, "/c/.cache/sparselora"),
        ({"HOME": "/c", "SPARSELORA_CACHE": "", "XDG_CACHE_HOME": ""}, "/c/.cache/sparselora"),
    ],
    ids=["own", "xdg", "home", "empty"],
)
def test_default_cache_dir(variables, want, monkeypatch):
    for name in ("SPARSELORA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert default_cache_dir() == Path(want)


def test_a_user_without_a_home_has_a_cache(monkeypatch, tmp_path):
    for name in ("SPARSELORA_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # what it does for a user that has no entry
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert default_cache_dir() == tmp_path / "sparselora"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8])
@given(width=st.sampled_from([5, 6, 8]), row=st.integers(0, 4), column=st.integers(0, 4), data=st.data())
@settings(max_examples=60, deadline=None)
def test_fingerprint_tells_any_change_or_swap(dtype, width, row, column, data):
    weight = (torch.arange(5 * width).view(5, width) * 3 % 41 - 20).to(dtype)  # all different
    before = fingerprint(weight)
    changed = weight.clone()
    changed[row, column] += 1
    assert fingerprint(changed) != before
    r, c = data.draw(
        st.tuples(st.integers(0, 4), st.integers(0, width - 1)).filter(lambda place: place != (row, column))
    )
    swapped = weight.clone()
    swapped[row, column], swapped[r, c] = weight[r, c], weight[row, column]
    assert fingerprint(swapped) != before


def test_fingerprint_knows_sign_shape_and_layout():
    weight = torch.randn(6, 4)
    negative = weight.clone()
    negative[2, 3] *= -1
    prints = {fingerprint(w) for w in (weight, negative, weight.view(4, 6), weight.t().contiguous(), weight.double())}
    assert len(prints) == 5
    assert fingerprint(weight) == fingerprint(weight.t().contiguous().t())


def test_fingerprint_tells_rows_apart_that_lie_far_apart():
    weight = torch.randn(130, 8, generator=torch.Generator().manual_seed(0))
    order = torch.arange(130)
    order[[3, 100]] = order[[100, 3]]
    assert (
        len({fingerprint(weight), fingerprint(weight[order]), fingerprint(weight[:129]), fingerprint(weight * 2)}) == 4
    )


def test_a_single_row_has_a_fingerprint_whatever_its_stride():
    row = torch.arange(8.0)[:, None].t()
    assert row.stride() == (1, 1)
    assert fingerprint(row) == fingerprint(row.clone(memory_format=torch.contiguous_format).reshape(1, 8))
    assert fingerprint(row) != fingerprint(row.flip(1))


def test_rank_1_is_cached(tmp_path):
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    made, read = (SvdCache(str(tmp_path)).factors(weight, 1) for _ in range(2))
    assert made.down.shape == (1, 8)
    assert torch.equal(made.down, read.down)
    assert torch.equal(made.up, read.up)
