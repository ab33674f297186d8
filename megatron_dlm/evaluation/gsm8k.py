"""GSM8K: problems, the number an answer ends with, and whether it is the right one (arXiv:2110.14168)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dlm.evaluation.intervals import wilson
from megatron_dlm.interfaces import InputError
from megatron_dlm.platform.json_lines import read_json_lines

if TYPE_CHECKING:
    from megatron_dlm.evaluation.loaded_model import LoadedModel
    from megatron_dlm.sampling.settings import SamplingConfig

MARK = "####"
"""Marker that precedes the final number of an answer."""
_CLOSING_MARK = re.compile(rf"({MARK}[^\n#]*[^\s#])[^\S\n]*{MARK}[^\S\n]*$", re.MULTILINE)
_NUMBER = re.compile(
    r"""(?P<sign>[-+]?)\s*
    (?:(?P<whole>\d[\d,]*)\s+(?=\d[\d,]*\s*/))?        # of a mixed number: 2 1/2
    (?P<number>
        (?:\d{1,3}(?:[\s']\d{3})+(?!\d)|\d[\d,]*)       # 1 234, 1'234 or 1,234
        (?:\.\d+)?
        |\.\d+
    )
    (?P<exponent>[eE][-+]?\d{1,3}(?![\d.]))?
    (?:\s*/\s*(?P<denominator>\d[\d,]*))?""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class Problem:
    """A question with its answer, one line of the data set."""

    number: int
    """Index of the problem in the file, from 0."""
    question: str
    answer: str
    """Worked solution, which ends with the marked final number."""
    expected: Fraction
    """Final number of the worked solution."""


def read_problems(path: Path) -> list[Problem]:
    """All problems of a file.

    Args:
        path: JSON lines file with the fields question and answer.

    Returns:
        Problems in file order.

    Raises:
        InputError: the file is unreadable, or a line lacks a question, an answer or a final number.
    """
    problems = []
    for number, (where, record) in enumerate(read_json_lines(path, "data")):
        if not (
            isinstance(record, dict) and all(isinstance(record.get(k), str) for k in ("question", "answer"))
        ):
            raise InputError(f"{where}: not an object with the texts question and answer")
        expected = final_number(record["answer"])
        if expected is None:
            raise InputError(f"{where}: the answer has no number behind {MARK}")
        problems.append(Problem(number, record["question"], record["answer"], expected))
    if not problems:
        raise InputError(f"data: {path}: has no problem")
    return problems


def prompts_of(questions: Sequence[str], length: int, loaded: LoadedModel) -> list[list[int]]:
    """Tokens of all questions; each leaves room for an answer.

    Args:
        questions: as the model is to read them.
        length: tokens of question and answer.
        loaded: the model.

    Returns:
        Token ids of each question.

    Raises:
        InputError: a question is as long as `length`.
    """
    prompts = [loaded.tokenizer.ids_of(text) for text in questions]
    for number, tokens in enumerate(prompts):
        if len(tokens) >= length:
            where = f"problem {number}, whose question has {len(tokens)}"
            raise InputError(f"length: {length} tokens leave no answer to {where}")
    return prompts


def answer(
    problems: Sequence[Problem],
    prompts: Sequence[Sequence[int]],
    length: int,
    settings: SamplingConfig,
    loaded: LoadedModel,
    *,
    batch_size: int,
    seed: int,
) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """Answer problems; the answers depend on neither `batch_size` nor the number of processes.

    Args:
        problems: problems to answer.
        prompts: token ids of each.
        length: tokens of question and answer.
        settings: of the sampler; they stop at <eos>.
        loaded: the model; its peers share the problems, and all iterate.
        batch_size: problems answered together by one process.
        seed: random seed of all draws.

    Yields:
        The answers of each batch, with expected and found numbers, and how many tokens were sampled for them.
    """
    from megatron_dlm.evaluation.generation import before_end, sample_all
    from megatron_dlm.sampling.start import start_from

    for batch in sample_all(
        loaded.network,
        loaded.family,
        settings,
        [start_from([list(prompt)], length, loaded.family) for prompt in prompts],
        batch_size=batch_size,
        seed=seed,
        numbers=[problem.number for problem in problems],
        peers=loaded.peers,
    ):
        lines = []
        for place, ids, given in zip(
            batch.places, batch.ids_BL.tolist(), batch.given_BL.tolist(), strict=True
        ):
            problem = problems[place]
            tokens = before_end(ids, given, loaded.vocabulary.eos_token_id)
            response = loaded.tokenizer.decode(tokens[sum(given) :])
            found = final_number(response)
            line = {
                "number": problem.number,
                "question": problem.question,
                "expected": str(problem.expected),
                "response": response,
                "found": None if found is None else str(found),
                "correct": found == problem.expected,
                "unfinished": len(tokens) == length,
            }
            lines.append(line)
        yield lines, batch.tokens


def final_number(text: str) -> Fraction | None:
    """The number behind the last mark, without currency, units, thousands' separators or a full stop.

    Args:
        text: worked answer; a mark that closes a line, as in "#### 18 ####", is ignored.

    Returns:
        Exact value of the number, so that 3.50 is 7/2 and so is 3 1/2; None if there is no mark or no number
        after the mark.
    """
    _, mark, tail = _CLOSING_MARK.sub(r"\1", text).rpartition(MARK)
    line = tail.strip().partition("\n")[0]
    found = _NUMBER.search(line.replace("$", "").replace("\u2212", "-")) if mark else None
    if found is None:
        return None
    number = re.sub(r"[\s',]", "", found["number"]) + (found["exponent"] or "")
    try:
        value = Fraction(number) / Fraction((found["denominator"] or "1").replace(",", ""))
    except ZeroDivisionError:
        return None
    if found["whole"]:
        value += int(found["whole"].replace(",", ""))
    return -value if found["sign"] == "-" else value


def accuracy(correct: Sequence[bool]) -> tuple[float, float, float]:
    """Share of correct answers, with Wilson's 95% interval, which holds at 0 and 1, too.

    Args:
        correct: whether each answer is correct; at least one answer.

    Returns:
        Share of correct answers, lower and upper end of the interval, all in [0, 1].
    """
    successes, count = sum(correct), len(correct)
    return successes / count, *wilson(successes, count)
