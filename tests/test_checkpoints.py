"""The newest checkpoint that can be resumed."""

import json

import pytest

from sparselora_hf.checkpoints import newest_checkpoint


def checkpoint(folder, step: int, state: str) -> str:
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    (path / "trainer_state.json").write_text(state)
    return str(path)


def test_steps_are_numbers_and_no_words(tmp_path):
    whole = json.dumps({"global_step": 1})
    newest = [checkpoint(tmp_path, step, whole) for step in (9, 100, 20)][1]
    assert newest_checkpoint(tmp_path) == newest


@pytest.mark.parametrize("state", ["", '{"global_step": 1', "{}", None], ids=str)
def test_one_that_was_not_written_to_its_end_is_passed_over(tmp_path, state, caplog):
    whole = checkpoint(tmp_path, 1, json.dumps({"global_step": 1}))
    half = checkpoint(tmp_path, 2, state or "")
    if state is None:
        (tmp_path / "checkpoint-2" / "trainer_state.json").unlink()
    assert newest_checkpoint(tmp_path) == whole
    assert f"{half} was not written to its end" in caplog.text


def test_what_has_almost_its_name_is_no_checkpoint(tmp_path, caplog):
    (tmp_path / "checkpoint-7").touch()
    (tmp_path / "checkpoint-8.old").mkdir()
    assert newest_checkpoint(tmp_path) is None
    assert not caplog.text
