"""Which number an answer ends with, and whether it is the right one."""

import json
from fractions import Fraction

import pytest

from megatron_dlm.evaluation.gsm8k import accuracy, final_number, read_problems
from megatron_dlm.interfaces import InputError
from tests.helpers.paths import DATA


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so it is 6\n#### 18", 18),
        ("#### 1,234,567", 1234567),
        ("#### $18.50", Fraction(37, 2)),
        ("#### $ 1,000", 1000),
        ("#### -5", -5),
        ("#### \u22125", -5),
        ("#### -$5", -5),
        ("#### 18 dollars", 18),
        ("#### 18 dollars and 7 more", 18),
        ("#### 3.50", Fraction(7, 2)),
        ("#### .5", Fraction(1, 2)),
        ("#### 1/2", Fraction(1, 2)),
        ("#### 75%", 75),
        ("#### 18.", 18),
        ("####18", 18),
        ("#### 7\n#### 8", 8),
        ("#### 8\nand then some 9", 8),
        ("#### about 12 hours", 12),
        ("#### 2 1/2", Fraction(5, 2)),
        ("#### - 2 1/2", Fraction(-5, 2)),
        ("#### 3 / 4 of it", Fraction(3, 4)),
        ("#### 1 234", 1234),
        ("#### 1\u202f234\u00a0567.5", Fraction(2469135, 2)),
        ("#### 12'000", 12000),
        ("#### 18 5 7", 18),
        ("#### 18 2024", 18),
        ("#### - 5", -5),
        ("#### -$ 5", -5),
        ("#### = -5", -5),
        ("#### 1e3", 1000),
        ("#### 1.5E-1", Fraction(3, 20)),
        ("#### 5 eggs", 5),
        ("#### 12e", 12),
        ("#### 18 ####", 18),
        ("#### 18 ####\nthat is all", 18),
        ("####18####", 18),
        ("#### 7 #### 8", 8),
        ("#### 7 #### 8 ####", 8),
        ("#### ####", None),
        ("the answer is 18", None),
        ("#### none", None),
        ("####", None),
        ("", None),
        ("#### 1/0", None),
        ("#### 7\n#### ", None),
    ],
)
def test_final_numbers(text, expected):
    assert final_number(text) == expected


def test_right_and_wrong_answers():
    assert final_number("#### 1,000.0") == final_number("#### $1000") == Fraction(1000)
    assert Fraction(1000) not in (final_number("#### 100"), final_number("1000"), final_number("#### -1000"))


def test_accuracy_has_an_interval_at_its_ends_too():
    assert accuracy([False] * 20)[:2] == (0.0, 0.0) and 0.1 < accuracy([False] * 20)[2] < 0.2
    share, low, high = accuracy([True] * 66 + [False] * 34)
    assert share == 0.66 and low == pytest.approx(0.563, abs=1e-3) and high == pytest.approx(0.746, abs=1e-3)


def test_the_public_test_set_is_read_whole():
    path = DATA / "gsm8k" / "test.jsonl"
    if not path.is_file():
        pytest.skip(f"no GSM8K at {path}")
    problems = read_problems(path)
    assert len(problems) == 1319 and problems[0].expected == 18
    assert all(final_number(problem.answer) == problem.expected for problem in problems)
    assert all(problem.expected.denominator == 1 for problem in problems)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", ":2: not JSON"),
        ("[]", ":2: not an object with the texts question and answer"),
        (json.dumps({"question": "a"}), ":2: not an object"),
        (json.dumps({"question": "a", "answer": "18"}), ":2: the answer has no number behind ####"),
        ("[" * 100_000, ":2: not JSON"),
        ("\n\n{", ":4: not JSON"),
    ],
)
def test_damaged_files_are_refused(tmp_path, line, words):
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps({"question": "a", "answer": "#### 1"}) + "\n" + line + "\n")
    with pytest.raises(InputError, match=words):
        read_problems(path)
    path.write_text("\n")
    with pytest.raises(InputError, match="has no problem"):
        read_problems(path)
    with pytest.raises(InputError, match="No such file"):
        read_problems(tmp_path / "no.jsonl")


def test_a_line_may_hold_what_ends_lines_elsewhere(tmp_path):
    path = tmp_path / "problems.jsonl"
    record = {"question": "a\u2028b\x85c", "answer": "#### 1"}
    path.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_problems(path)[0].question == record["question"]
