"""The newest checkpoint that can be resumed."""

import json

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


def test_a_file_of_that_name_is_no_checkpoint(tmp_path, caplog):
    (tmp_path / "checkpoint-7").touch()
    (tmp_path / "checkpoint-8.zip").touch()
    assert newest_checkpoint(tmp_path) is None
    assert not caplog.text
