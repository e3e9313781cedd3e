"""Every recipe in small, one after the other in one process, offline on a CPU; prints the list."""

import contextlib
import importlib.util
import io
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

HERE = Path(__file__).parent


def recipes() -> list[Path]:
    """Every recipe that `sparselora sft` or a script of its folder runs: they build on others, and those do not."""
    return [path for path in sorted(HERE.glob("*/*.yaml")) if path.read_text(encoding="utf-8").startswith("base:")]


def run(recipe: Path, output: Path) -> int:
    """Train, save and evaluate one recipe; GLUE has a script of its own."""
    flags = ["--config", str(recipe), "--smoke", "--output_dir", str(output)]
    script = recipe.parent / "train.py"
    if script.is_file():
        spec = importlib.util.spec_from_file_location(f"{recipe.parent.name}_train", script)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module.main(flags)
    from sparselora_hf.cli.main import main

    return main(["sft", *flags])


def check(output: Path) -> None:
    for wanted in ("adapter_model.safetensors", "sparselora_config.yaml"):
        if not (output / wanted).is_file():
            raise FileNotFoundError(f"{output} has no {wanted}.")
    if not list(output.glob("**/results.json")):
        raise FileNotFoundError(f"{output} has no results.json: nothing was evaluated.")


def main(argv: Sequence[str]) -> int:
    import datasets
    from transformers.utils import logging

    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    folder = Path(argv[0]) if argv else Path(tempfile.mkdtemp())
    console, failed = Console(soft_wrap=True, highlight=False), 0
    for recipe in recipes():
        name, start = f"{recipe.parent.name}/{recipe.stem}", time.perf_counter()
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said):
                code = run(recipe, folder / name)
            if code == 0:
                check(folder / name)
        except Exception:  # one recipe's failure must not hide the others'
            console.print_exception()
            code = 1
        failed += code != 0
        console.print(f"{'ok' if code == 0 else 'FAILED':6} {name:34} {time.perf_counter() - start:5.1f} s")
        if code:
            console.print(said.getvalue(), markup=False)
    console.print(f"{len(recipes()) - failed} recipes ran, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
