"""What a free-text answer says: the number or the choice that a person would read in it.

The protocol is the paper's (z-lab/sparselora, spft/test/main.py, after LLM-Adapters): of an arithmetic answer the last
number counts, to within a thousandth; of a multiple choice the first option that is named. The reference finds both by
patterns that a person would not always agree with: it reads ``16-3`` as 16 and -3, ``1,2,3`` as 123, ``1/2`` as 2,
``m2`` as 2, and the 4 of "one of the 4 options" as option 4. Here these are read as they are meant.
"""

import re
from collections.abc import Sequence

__all__ = ["TOLERANCE", "chosen", "is_number", "last_number", "own_words"]

TOLERANCE = 1e-3

# a model that goes on with a prompt of its own; \s would try every run of empty lines from each of its lines
_NEXT_TURN = re.compile(r"\n[^\S\n]*### ")
_CURRENCY = re.compile(r"\b(?:[A-Z]{3}|Rs\.?)(?=[0-9])")  # of USD3 and Rs.3, which is no power and no .3
# the 2 of m2, cm^2 and CO2, at the end of a sentence too
_POWER = re.compile(r"(?<=[a-zA-Z])(?<![0-9][eE])(?:\^|\*\*)?[23](?![0-9]|[.,][0-9])")
_ITEM = re.compile(r"^[ \t]*-[ \t]+", re.MULTILINE)  # the dash that a list's item starts with
_MIXED = re.compile(r"(?<=[0-9])(?=\\[dt]?frac)")  # between the whole number and the fraction of 1\frac{1}{2}
_FRACTION_COMMAND = re.compile(r"\\[dt]?frac\{(-?[0-9]+)\}\{([0-9]+)\}")
_SIGN = r"(?:(?<![\w).])(?!(?<=[0-9)] )[-\u2212] )(?P<sign>[-\u2212])\s?)?[$€£]?"
_PLAIN = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_NUMBER = re.compile(
    rf"{_SIGN}(?<![0-9.])"
    rf"(?:(?P<whole>[0-9]+) (?=[0-9]+/[0-9]))?"
    rf"(?P<value>(?:{_PLAIN})(?:[eE][-+]?[0-9]+)?)"
    rf"(?: ?/ ?(?P<divisor>[0-9]+(?:\.[0-9]+)?))?"
)
_NEGATION = re.compile(r"(?:\bnot|n't|\bneither|\brather than|\binstead of)\s+(?:the\s+)?")


def own_words(text: str) -> str:
    """An answer without the next prompt that a model may have gone on with; empty lines before it may stay."""
    return _NEXT_TURN.split(text, maxsplit=1)[0]


def last_number(text: str) -> float | None:
    """The last number of a text, None where there is none.

    Commas between thousands, currency signs, units, fractions (``3/4``, ``1 1/2``) and a full stop after it are
    understood. A dash between two numbers is a minus sign of neither, nor is one that starts an item of a list.
    """
    text = _MIXED.sub(" ", _POWER.sub("", _CURRENCY.sub("$", _ITEM.sub("", own_words(text)))))
    text = _FRACTION_COMMAND.sub(r"\1/\2", text)
    matches = list(_NUMBER.finditer(text))
    return _value(matches[-1]) if matches else None


def _value(match: re.Match) -> float:
    value = float(match["value"].replace(",", ""))
    if match["divisor"] is not None and float(match["divisor"]):
        value /= float(match["divisor"])
    value += float(match["whole"] or 0)
    return -value if match["sign"] else value


def is_number(text: str, target: float) -> bool:
    """Whether an answer's last number is the target, to within `TOLERANCE`."""
    number = last_number(text)
    return number is not None and abs(number - target) <= TOLERANCE


def chosen(text: str, options: Sequence[str]) -> str | None:
    """The option that an answer names, None where it names none.

    Args:
        text: the answer.
        options: words in lower case: ``true``, ``false``, or one word with numbers, ``answer1`` to ``answer5``.
    """
    text = own_words(text).lower()
    if not options[0][-1].isdigit():
        return _named(text, {option: option for option in options})
    word = options[0][:-1]
    numbers = {option[len(word) :]: option for option in options}
    digits = "|".join(numbers)
    by_name = rf"\b{word}\s*#?({digits})\b"
    for pattern in (rf"(?:answer|choice|{word})(?:\s+is|:)+\s*\(?({digits})\b", by_name):
        named = _named(text, numbers, pattern)
        if named:
            return named
    rest = re.sub(by_name, " ", text)  # what is named and still here was ruled out
    negated = _negated(rest)
    found = (match for match in re.finditer(r"[0-9]+", rest) if match.start() not in negated)
    alone = {match[0] for match in found if match[0] in numbers}
    return numbers[alone.pop()] if len(alone) == 1 else None


def _negated(text: str) -> set[int]:
    """Where in a text a word is ruled out by what stands before it."""
    return {match.end() for match in _NEGATION.finditer(text)}


def _named(text: str, options: dict[str, str], pattern: str = "") -> str | None:
    """The first option that is named and not ruled out; of two, ruling out one names the other."""
    pattern = pattern or rf"\b({'|'.join(options)})\b"
    negated, ruled_out = _negated(text), []
    for match in re.finditer(pattern, text):
        if match.start() not in negated:
            return options[match[1]]
        ruled_out.append(options[match[1]])
    left = [option for option in options.values() if option not in ruled_out]
    return left[0] if len(left) == 1 else None
