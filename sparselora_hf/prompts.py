"""Data for training: rows from the hub, a URL or a file, brought into a prompt format.

The formats themselves are in `formats.py`; `text_split`, which cuts running text, is here.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .cache import default_cache_dir
from .formats import FORMATS

__all__ = [
    "PROMPT_FORMATS",
    "READERS",
    "TextWindow",
    "format_examples",
    "load_examples",
    "read_rows",
    "text_split",
]

PROMPT_FORMATS = (*sorted(FORMATS), "text_split")

READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
_URLS = ("http://", "https://")


@dataclasses.dataclass(frozen=True)
class TextWindow:
    """How `text_split` cuts running text.

    Args:
        characters: length of a window.
        prompt_share: share of a window that is prompt.

    Raises:
        ValueError: a window of less than two characters, or a share outside (0, 1).
    """

    characters: int = 1024
    prompt_share: float = 0.75

    def __post_init__(self) -> None:
        if self.characters < 2:
            raise ValueError(f"window_characters: {self.characters} is too short. A window needs 2 or more.")
        if not 0 < self.prompt_share < 1:
            raise ValueError(f"prompt_share: {self.prompt_share} is outside (0, 1). It is a window's share of prompt.")


def text_split(text: str, window: TextWindow) -> list[dict[str, str]]:
    """Cut text into windows, each into a prompt and its continuation; the rest that fills no window is left out.

    The cut moves back to a space where the prompt has one, for it is then a boundary between tokens too.
    """
    rows = []
    for start in range(0, len(text) - window.characters + 1, window.characters):
        piece = text[start : start + window.characters]
        share = max(1, int(window.characters * window.prompt_share))
        space = piece.rfind(" ", 1, share + 1)
        cut = space if space > 0 else share
        rows.append({"prompt": piece[:cut], "completion": piece[cut:]})
    return rows


def _text_batch(batch: Mapping[str, list[str]], window: TextWindow) -> dict[str, list[str]]:
    return _columns([row for text in batch["text"] for row in text_split(text, window)])


def _format_batch(batch: Mapping[str, list[Any]], prompt_format: str, column: str) -> dict[str, list[str]]:
    for name in (*FORMATS[prompt_format].columns, column):
        if None in batch[name]:  # an empty cell of a CSV file, too; as text it would be trained on as "None"
            raise ValueError(f"Prompt format {prompt_format!r} needs {name} in every row, and one has none there.")
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    examples = [FORMATS[prompt_format].build(row, column) for row in rows]
    return _columns([example for example in examples if example is not None])


def _columns(rows: list[dict[str, str]]) -> dict[str, list[str]]:
    return {name: [row[name] for row in rows] for name in ("prompt", "completion")}


def _require(dataset: Any, columns: tuple[str, ...], prompt_format: str) -> None:
    missing = [column for column in columns if column not in dataset.column_names]
    if missing:
        raise ValueError(
            f"Prompt format {prompt_format!r} needs the column {', '.join(missing)}. "
            f"The data has: {', '.join(dataset.column_names)}."
        )


def format_examples(
    dataset: Any, prompt_format: str | None, train_on: str = "output", window: TextWindow | None = None
) -> Any:
    """Turn the rows of a `datasets.Dataset` into `prompt` and `completion`.

    Args:
        dataset: rows with the columns that the format reads.
        prompt_format: one of `PROMPT_FORMATS`; None leaves the rows as they are.
        train_on: column of the completion where the format has a choice: `output` (math) or `answer` (commonsense).
        window: cut of ``text_split``.

    Raises:
        ValueError: an unknown format, a missing column, text too short for a single window, or no row left.
    """
    if prompt_format is None:
        return dataset
    if prompt_format not in PROMPT_FORMATS:
        raise ValueError(f"prompt_format: {prompt_format!r} is not one of {', '.join(PROMPT_FORMATS)}.")
    if prompt_format == "text_split":
        columns, function, settings = ("text",), _text_batch, {"window": window or TextWindow()}
    else:
        form = FORMATS[prompt_format]
        columns = (*form.columns, form.column(train_on))
        function, settings = _format_batch, {"prompt_format": prompt_format, "column": form.column(train_on)}
    _require(dataset, columns, prompt_format)
    rows = dataset.map(
        function,
        batched=True,
        remove_columns=dataset.column_names,
        fn_kwargs=settings,
        desc=f"Prompts ({prompt_format})",
    )
    if len(rows) == 0:
        raise ValueError(
            "The text is shorter than one window. Lower window_characters."
            if prompt_format == "text_split"
            else f"Prompt format {prompt_format!r} left every row out. Choose another."
        )
    return rows


def load_examples(
    name: str,
    split: str = "train",
    prompt_format: str | None = None,
    train_on: str = "output",
    max_examples: int | None = None,
    *,
    config_name: str | None = None,
    window: TextWindow | None = None,
) -> Any:
    """Load rows and format them.

    Args:
        name: see `read_rows`.
        split: split to take; a file has one, `train`, of which ``train[:100]`` takes a part.
        prompt_format: see `format_examples`.
        train_on: see `format_examples`.
        max_examples: keep the first so many rows.
        config_name: configuration of a dataset on the hub.
        window: see `format_examples`.

    Returns:
        A `datasets.Dataset`.

    Raises:
        FileNotFoundError: no such file or dataset.
        ValueError: a file of another kind, or what `format_examples` raises.
    """
    rows = read_rows(name, split, config_name)
    one_each = prompt_format != "text_split" and not (prompt_format in FORMATS and FORMATS[prompt_format].leaves_out)
    if max_examples is not None and one_each:
        rows = rows.take(min(max_examples, len(rows)))
    rows = format_examples(rows, prompt_format, train_on, window)
    return rows if max_examples is None else rows.take(min(max_examples, len(rows)))


def read_rows(name: str, split: str = "train", config_name: str | None = None) -> Any:
    """Rows as they are.

    Args:
        name: a name on the hub, a folder, or a file or its URL: .json, .jsonl, .parquet, .csv, or .txt (a file alone).
        split: see `load_examples`.
        config_name: configuration of a dataset on the hub.

    Raises:
        OSError: no such file or dataset, or no network to fetch it.
        ValueError: a file of another kind, not what its name says, or without rows.
    """
    import datasets

    path = _fetched(name) if name.startswith(_URLS) else Path(name)
    suffix = path.suffix.lower()
    if suffix in READERS and path.is_file():
        try:
            return datasets.load_dataset(READERS[suffix], data_files=str(path), split=split)
        except datasets.exceptions.DatasetGenerationError as error:
            raise ValueError(f"{name}: this {suffix} file cannot be read: {error.__cause__ or error}") from error
        except (ValueError, StopIteration) as error:  # of a file without rows, or of another split than `train`
            raise ValueError(f"{name} has no rows of the split {split!r}. {error}".rstrip()) from error
    if suffix == ".txt" and path.is_file():
        if split != "train":
            raise ValueError(f"{name}: a text file is one row of the split train, there is no {split!r}.")
        return datasets.Dataset.from_dict({"text": [path.read_text(encoding="utf-8")]})
    if path.is_file():
        raise ValueError(f"{name}: files of kind {suffix!r} are not read. Kinds: {', '.join(READERS)}, .txt.")
    if suffix in (*READERS, ".txt"):
        raise FileNotFoundError(f"{name}: there is no such file.")
    return datasets.load_dataset(name, config_name, split=split)


def _fetched(url: str) -> Path:
    """A file from the web, kept in the cache folder."""
    from torch.hub import download_url_to_file

    folder = default_cache_dir() / "data"
    path = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{url.rsplit('/', 1)[-1]}"
    if path.is_file():
        return path
    if path.exists():
        raise OSError(f"{path}, where {url} would be kept, is no file. Delete it.")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        download_url_to_file(url, str(path), progress=logging.is_progress_bar_enabled())
    except OSError as error:
        raise OSError(f"{url} cannot be fetched: {error}. Without a network give a file.") from error
    return path
