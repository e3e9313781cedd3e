"""Answers scored as a person reads them."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparselora_hf.evaluation import scoring
from sparselora_hf.evaluation.interval import pass_at_k, wilson
from sparselora_hf.evaluation.scoring import chosen, is_number, last_number

NUMBERS = [
    ("The answer is 72.", 72),
    ("72", 72),
    ("  72\n", 72),
    ("48/2 = 24 clips in May. 48 + 24 = 72 clips. The answer is 72.", 72),
    ("The answer is 18.0", 18),
    ("He makes $18 every day.", 18),
    ("$1,234.50", 1234.5),
    ("The profit is $70,000.", 70000),
    ("1,234,567 people", 1234567),
    ("-5", -5),
    ("It fell to -3.5 degrees.", -3.5),
    ("It is \u22127 outside", -7),
    ("x = -$12", -12),
    ("$-12", -12),
    ("The answer is - 4", -4),
    ("16-3", 3),
    ("16 - 3 = 13", 13),
    ("16 - 3", 3),
    ("10 \u2212 20 people", 20),
    ("1) -5", -5),
    ("- 5 apples", 5),
    ("He has\n  - 3 pears\n- $5", 5),
    ("- -5", -5),
    ("10-20 people", 20),
    ("(5)-2", 2),
    ("3/4", 0.75),
    ("1 / 2 of them", 0.5),
    ("-1/2", -0.5),
    ("1 1/2 hours", 1.5),
    ("-2 1/4", -2.25),
    (r"The answer is \frac{3}{8}", 0.375),
    (r"\boxed{1\frac{1}{2}}", 1.5),
    (r"-2 \dfrac{1}{4}", -2.25),
    (r"-\frac{1}{2}", -0.5),
    (r"\boxed{42}", 42),
    ("7/0", 7),
    ("50%", 50),
    ("25 m2", 25),
    ("25 m^2", 25),
    ("The area is 25 m2.", 25),
    ("9 cm^3, which is all of it.", 9),
    ("x2.5", 2.5),
    ("9.5 cm^3 of CO2", 9.5),
    ("12 square feet", 12),
    ("2.5kg", 2.5),
    ("USD5", 5),
    ("USD3", 3),
    ("-EUR2.", -2),
    ("Rs3 each", 3),
    ("Rs.30", 30),
    ("$3.", 3),
    ("\u20ac3", 3),
    ("9 kg of TiO2", 9),
    (".5", 0.5),
    ("3.14.", 3.14),
    ("1.5e3", 1500),
    ("1,2,3", 3),
    ("1, 2 and 3", 3),
    ("2 cats, 3 dogs, so 5 animals", 5),
    ("18\n\n### Instruction:\nAdd 4 and 5.\n\n### Response:\n9", 18),
    ("... = 18\n#### 18", 18),
    ("eighteen", None),
    ("", None),
    ("no number, $ alone, - . , /", None),
]


@pytest.mark.parametrize(("text", "number"), NUMBERS, ids=[repr(text)[:30] for text, _ in NUMBERS])
def test_the_last_number(text, number):
    assert last_number(text) == (None if number is None else pytest.approx(number))


@given(st.integers(-(10**9), 10**9), st.sampled_from(["{}", "{}.", "is {:,}", "${:,} each", "a 4 then {}\n"]))
def test_any_whole_number(number, form):
    assert last_number(form.format(number)) == number


@pytest.mark.parametrize(
    ("text", "target", "right"),
    [
        ("1.8333", 1.8333333333333335, True),
        ("1.83", 1.8333333333333335, False),
        ("7.9991", 8, True),
        ("7.998", 8, False),
        ("70,000", 70000, True),
        ("70", 70000, False),
        ("5", -5, False),
        ("none", 0, False),
    ],
)
def test_right_to_within_a_thousandth(text, target, right):
    assert is_number(text, target) == right


BOOL = ("true", "false")
ANSWERS = tuple(f"answer{n}" for n in range(1, 6))
SOLUTIONS = ("solution1", "solution2")
ENDINGS = tuple(f"ending{n}" for n in range(1, 5))
CHOICES = [
    ("the correct answer is true", BOOL, "true"),
    ("False.", BOOL, "false"),
    ("true or false? true", BOOL, "true"),
    ("That is not true.", BOOL, "false"),
    ("It isn't false", BOOL, "true"),
    ("untrue", BOOL, None),
    ("yes", BOOL, None),
    ("the correct answer is answer3", ANSWERS, "answer3"),
    ("answer3", ANSWERS, "answer3"),
    ("Answer 3", ANSWERS, "answer3"),
    ("Answer: 3", ANSWERS, "answer3"),
    ("The answer is (2)", ANSWERS, "answer2"),
    ("the correct answer is 2", ANSWERS, "answer2"),
    ("Of the 4 options, answer2 is right", ANSWERS, "answer2"),
    ("Not answer1 but answer2", ANSWERS, "answer2"),
    ("It is not the answer1, answer4 is", ANSWERS, "answer4"),
    ("It is not answer1", ANSWERS, None),
    ("The answer is not 1", ANSWERS, None),
    ("Not answer1, but 3", ANSWERS, "answer3"),
    ("5", ANSWERS, "answer5"),
    ("It has 2 or 3", ANSWERS, None),
    ("answer7", ANSWERS, None),
    ("answer12", ANSWERS, None),
    ("the answer", ANSWERS, None),
    ("", ANSWERS, None),
    ("the correct answer is solution1", SOLUTIONS, "solution1"),
    ("Solution 2: take a test", SOLUTIONS, "solution2"),
    ("It cannot be; not solution1", SOLUTIONS, "solution2"),
    ("ending4", ENDINGS, "ending4"),
    ("the correct answer is ending 3.", ENDINGS, "ending3"),
    ("option2", ("option1", "option2"), "option2"),
    ("answer2\n\n### Instruction:\nanswer1", ANSWERS, "answer2"),
    ("Neither.\n\n### Instruction:\nanswer1", ANSWERS, None),
]


@pytest.mark.parametrize(("text", "options", "choice"), CHOICES, ids=[repr(text)[:30] for text, *_ in CHOICES])
def test_the_choice_that_is_named(text, options, choice):
    assert chosen(text, options) == choice


NEGATIONS = ("not ", "isn't", "neither ", "rather than ", "instead of\t")
WORDS = (*NEGATIONS, " ", "\n", "the ", "answer", "is ", ": ", "1", "3", "true", "x", ".")


@given(st.lists(st.sampled_from(WORDS), max_size=12).map("".join))
def test_what_is_ruled_out_has_a_negation_before_it(text):
    before = re.compile(r"(?:\bnot|n't|\bneither|\brather than|\binstead of)\s+(?:the\s+)?$")
    words = {match.start() for match in re.finditer(r"(?!the)[a-z0-9]+", text)}
    assert words & scoring._negated(text) == {place for place in words if before.search(text[:place])}


def test_a_long_text_of_numbers_takes_no_time():
    start = time.process_time()
    assert chosen("not 3 " + "7 " * 100_000 + "2", ANSWERS) == "answer2"
    assert time.process_time() - start < 5  # each number by itself, with all before it: minutes


def test_many_empty_lines_take_no_time():
    start = time.process_time()
    assert last_number("18" + "\n" * 100_000 + "eighteen") == 18
    assert time.process_time() - start < 5  # the rest of them looked through from each of them: half a minute


@given(
    st.lists(st.sampled_from(("7", "x", " ", "\n", "\r", "\t", "\u00a0", "###", "### ", "#")), max_size=12).map(
        "".join
    )
)
def test_a_next_prompt_starts_a_line(text):
    assert scoring.own_words(text).rstrip() == re.split(r"\n\s*### ", text)[0].rstrip()


def test_wilson_against_the_textbook():
    """Values of Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263 and 0 of 20."""
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=1e-4)
    assert wilson(0, 0) == (0, 1)


@pytest.mark.parametrize(
    ("samples", "correct", "k", "share"), [(4, 1, 2, 0.5), (4, 0, 2, 0), (2, 1, 2, 1), (5, 2, 1, 0.4)]
)
def test_pass_at_k(samples, correct, k, share):
    assert pass_at_k(samples, correct, k) == pytest.approx(share)
