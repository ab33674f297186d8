"""Word problems in GSM8K's format: a question, worked steps with annotations, and `#### ` before the number.

python examples/small-scale-study/arithmetic.py OUTPUT

Writes train.jsonl, held-out.jsonl and test.jsonl with columns question and answer. Each problem is there
once, numbers that are put together in one way are in one file only, and every annotation such as <<7+5=12>>
is computed again.
"""

from __future__ import annotations

import hashlib
import json
import operator
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path

COUNTS = {"train": 20_000, "held-out": 500, "test": 500}
SHARES = {"test": 1, "held-out": 1, "train": 18}
"""How many of 20 ways of putting numbers together go to each file."""
NAMES = ("Anna", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana", "Ivo", "June")
THINGS = ("apples", "books", "coins", "eggs", "keys", "pens", "shells", "stamps")
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def bought(name: str, things: str, first: int, second: int) -> tuple[str, str]:
    """One sum."""
    question = f"{name} has {first} {things} and buys {second} more. How many {things} does {name} have?"
    return question, _solution(f"{name} has {_step(first, '+', second)} {things}.", first + second)


def given(name: str, things: str, first: int, second: int) -> tuple[str, str]:
    """One difference."""
    question = f"{name} has {first + second} {things} and gives {second} away. How many {things} are left?"
    return question, _solution(f"{name} has {_step(first + second, '-', second)} {things} left.", first)


def boxes(name: str, things: str, first: int, second: int) -> tuple[str, str]:
    """One product."""
    question = f"{name} has {first} boxes with {second} {things} each. How many {things} does {name} have?"
    return question, _solution(f"{name} has {_step(first, '*', second)} {things}.", first * second)


def boxes_and_more(name: str, things: str, first: int, second: int, third: int) -> tuple[str, str]:
    """A product, then a sum."""
    question = (
        f"{name} has {first} boxes with {second} {things} each and finds {third} more. "
        f"How many {things} are there?"
    )
    # A text has 128 tokens: the recipes' length.
    steps = f"{_step(first, '*', second)} {things}. {_step(first * second, '+', third)} {things}."
    return question, _solution(steps, first * second + third)


KINDS: dict[Callable[..., tuple[str, str]], tuple[range, ...]] = {
    bought: (range(2, 60), range(2, 40)),
    given: (range(2, 60), range(2, 40)),
    boxes: (range(2, 13), range(2, 13)),
    boxes_and_more: (range(2, 10), range(2, 10), range(2, 31)),
}
"""Kinds of problems, and their numbers."""


def _step(first: int, sign: str, second: int) -> str:
    result = OPERATIONS[sign](first, second)
    return f"{first} {sign} {second} = <<{first}{sign}{second}={result}>>{result}"


def _solution(steps: str, result: int) -> str:
    return f"{steps}\n#### {result}"


def is_right(answer: str) -> bool:
    """Whether every annotation is computed rightly, and the last one is the number behind ####."""
    steps = re.findall(r"<<(\d+)([-+*])(\d+)=(\d+)>>", answer)
    right = all(OPERATIONS[sign](int(a), int(b)) == int(result) for a, sign, b, result in steps)
    return bool(steps) and right and answer.endswith(f"\n#### {steps[-1][3]}")


def file_of(kind: str, numbers: tuple[int, ...]) -> str:
    """The file of all problems of a kind with these numbers."""
    digest = hashlib.sha256(f"{kind} {numbers}".encode()).digest()
    names = [name for name, share in SHARES.items() for _ in range(share)]
    return names[int.from_bytes(digest[:4], "big") % len(names)]


def main() -> None:
    """Generate, verify, write, count."""
    if len(sys.argv) != 2:
        sys.exit((__doc__ or "").strip())
    output = Path(sys.argv[1])
    output.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    found: dict[str, dict[str, str]] = {name: {} for name in COUNTS}
    while any(len(found[name]) < count for name, count in COUNTS.items()):
        kind = rng.choice(list(KINDS))
        numbers = tuple(rng.choice(choices) for choices in KINDS[kind])
        question, answer = kind(rng.choice(NAMES), rng.choice(THINGS), *numbers)
        if not is_right(answer):
            sys.exit(f"arithmetic.py: error: {question!r} is answered {answer!r}")
        name = file_of(kind.__name__, numbers)
        if len(found[name]) < COUNTS[name]:
            found[name][question] = answer
    for name, answers in found.items():
        with (output / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for question, answer in answers.items():
                file.write(json.dumps({"question": question, "answer": answer}) + "\n")
        print(f"{output / name}.jsonl: {len(answers):,} problems")


if __name__ == "__main__":
    main()
