"""The `sparselora` command: finds the subcommand, loads only that one, and turns user errors into one line."""

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence

from .. import __version__

__all__ = ["COMMANDS", "guarded", "main"]

COMMANDS = {
    "doctor": "check versions, devices and cache, and test that sparsity 0 equals the dense model",
    "estimate": "bound the speed-up of a model and schedule from shapes alone",
    "eval": "answer a benchmark with an adapter and score the answers as the paper does",
    "quickstart": "train a small model twice, dense and sparse, and compare",
    "sft": "supervised fine-tuning with SparseLoRA, from a recipe or flags",
}
TRACEBACK_VARIABLE = "SPARSELORA_TRACEBACK"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sparselora",
        description="LoRA fine-tuning with contextual sparsity.",
        epilog=f"Options of a command: sparselora COMMAND --help. {TRACEBACK_VARIABLE}=1 shows where an error arose.",
    )
    parser.add_argument("--version", action="version", version=f"sparselora_hf {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    return parser


def guarded(command: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Run a command; an error in what the user gave becomes one line and exit code 2, Ctrl-C one line and 130."""
    try:
        return command(argv)
    except KeyboardInterrupt:
        sys.stderr.write("sparselora: interrupted. Nothing is half written: run the same command again.\n")
        return 130
    except (ImportError, OSError, ValueError) as error:
        if os.environ.get(TRACEBACK_VARIABLE) == "1":
            raise
        sys.stderr.write(f"sparselora: error: {' '.join(str(error).split())}\n")
        return 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: arguments after the program's name; None takes those of the process.

    Returns:
        Exit code: 0, the subcommand's own, 2 after an error in what the user gave, or 130 after Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    command = _parser().parse_args(argv[:1]).command
    return guarded(importlib.import_module(f"{__package__}.{command}").main, argv[1:])


if __name__ == "__main__":
    raise SystemExit(main())
