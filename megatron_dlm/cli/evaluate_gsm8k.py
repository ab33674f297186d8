"""`megatron-dlm evaluate gsm8k MODEL`."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from megatron_dlm.cli.arguments import ModelArgument, bad_values, parse_with_model
from megatron_dlm.interfaces import InputError
from megatron_dlm.sampling.settings import SamplingConfig

if TYPE_CHECKING:
    from megatron_dlm.evaluation.gsm8k import Problem
    from megatron_dlm.evaluation.loaded_model import LoadedModel

ANSWERS, SETTINGS, RESULT = "answers.jsonl", "settings.json", "result.json"
PLACE = "{question}"


@dataclass(frozen=True, kw_only=True)
class Gsm8kConfig(ModelArgument):
    """Exact match on grade-school mathematics: generate an answer, compare the number behind its last ####.

    Answers are written after each batch; the same command resumes where it stopped. Under torchrun, srun or
    mpirun the processes share the batches; the answers stay the same. The model should be fine-tuned on such
    problems (`index --prompt-key question --json-keys answer`, examples/FAMILY/gsm8k.py).
    """

    data: Path
    """JSON lines with question and answer, such as the data set's test.jsonl."""
    output: Path
    """Directory for answers.jsonl and result.json."""
    limit: int | None = None
    """Evaluate only this many problems, from the start of the file; None: all problems."""
    template: str = PLACE
    """Prompt template in which {question} is replaced by the question; use the format of the fine-tuning
    data."""
    length: int | None = None
    """Total length of prompt and answer in tokens; None: the training sequence length."""
    sampling: tyro.conf.OmitArgPrefixes[SamplingConfig] = SamplingConfig(
        sampler="left-to-right", stop_at_eos=True
    )
    seed: int = 0
    """Random seed. An answer depends on the seed and the problem's index, not on the batch it was sampled
    in."""
    batch_size: int = 16
    """Batch size: problems sampled together."""
    tokenizer: Path | None = None
    """Directory of the model's tokenizer; None: the one in the exported folder, or the one that the training
    data of a checkpoint was indexed with."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of the loaded weights."""
    device: str | None = None
    """Device to run on, for example cpu or cuda:0; None: a GPU if there is one."""

    def __post_init__(self) -> None:
        for name in ("limit", "batch_size", "length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}: {value} is below 1")
        if self.template.count(PLACE) != 1:
            raise InputError(f"template: {self.template!r} does not have {PLACE} just once")
        if not self.sampling.stop_at_eos:
            raise InputError("stop_at_eos: an answer ends with its first <eos>")


def run(arguments: list[str]) -> int:
    """Parse, generate, score; returns the exit code."""
    config = parse_with_model(Gsm8kConfig, arguments, verb="evaluate gsm8k")
    from megatron_dlm.evaluation.gsm8k import answer, prompts_of, read_problems
    from megatron_dlm.evaluation.loaded_model import open_model

    problems = read_problems(config.data)[: config.limit]
    loaded = open_model(config.model, tokenizer=config.tokenizer, dtype=config.dtype, device=config.device)
    peers = loaded.peers
    with bad_values(), peers.together():
        settings = config.sampling.resolved(loaded.family)
        length = loaded.length(config.length)
        questions = [config.template.replace(PLACE, problem.question) for problem in problems]
        prompts = prompts_of(questions, length, loaded)
        done = peers.on_first(lambda: _resume(config, settings, loaded))
        left = [problem for problem in problems if problem.number not in done]
        answers = answer(
            left,
            [prompts[problem.number] for problem in left],
            length,
            settings,
            loaded,
            batch_size=config.batch_size,
            seed=config.seed,
        )
        if peers.is_first:
            _write(answers, len(left), config)
            _score(config, problems)
        else:
            for _ in answers:
                continue
    return 0


def _resume(config: Gsm8kConfig, sampling: SamplingConfig, loaded: LoadedModel) -> set[int]:
    """Numbers of the problems already answered; InputError if the earlier run had other settings."""
    from megatron_dlm.platform.files import sha256_of, write_json
    from megatron_dlm.platform.json_lines import drop_cut_line

    settings = {
        "weights_sha256": loaded.weights_sha256(),
        "data_sha256": sha256_of(config.data),
        "sampling": asdict(sampling),
        "length": loaded.length(config.length),
        **{name: getattr(config, name) for name in ("template", "seed", "dtype")},
    }
    # As they are read back: with lists in place of tuples.
    settings = json.loads(json.dumps(settings))
    path, answers = config.output / SETTINGS, config.output / ANSWERS
    if config.output.exists() and not config.output.is_dir():
        raise InputError(f"output: {config.output} is not a directory")
    if answers.exists():
        before = _read_settings(path)
        for name, value in settings.items():
            if before.get(name) != value:
                raise InputError(
                    f"output: {config.output} has answers with {name} {before.get(name)!r}, "
                    f"now {value!r}; take another directory"
                )
        drop_cut_line(answers)
    config.output.mkdir(parents=True, exist_ok=True)
    write_json(path, settings | {"model": str(config.model)})
    return {int(line["number"]) for line in _answers(config)}


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"output: {path}: {error}; take another directory") from error
    if not isinstance(settings, dict):
        raise InputError(f"output: {path}: not an object; take another directory")
    return settings


def _answers(config: Gsm8kConfig) -> list[dict[str, Any]]:
    """Answers in the output file, checked."""
    from megatron_dlm.platform.json_lines import read_json_lines

    path = config.output / ANSWERS
    answers: dict[int, dict[str, Any]] = {}
    for where, line in read_json_lines(path, "output") if path.exists() else ():
        if not isinstance(line, dict) or type(line.get("number")) is not int or line["number"] < 0:
            raise InputError(f"{where}: not an answer with the number of its problem")
        if type(line.get("correct")) is not bool or not isinstance(line.get("found", 0), str | None):
            raise InputError(f"{where}: not an answer with found and correct")
        if line["number"] in answers:
            raise InputError(f"{where}: a second answer to problem {line['number']}")
        answers[line["number"]] = line
    return list(answers.values())


def _write(answers: Iterator[tuple[list[dict[str, Any]], int]], count: int, config: Gsm8kConfig) -> None:
    """Append answers to their file as they come; `count` of them are to come."""
    from megatron_dlm.telemetry.writers import duration

    tokens, done, correct, begun = 0, 0, 0, time.perf_counter()
    with (config.output / ANSWERS).open("a", encoding="utf-8") as file:
        for lines, sampled in answers:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
            seconds = time.perf_counter() - begun
            done, tokens = done + len(lines), tokens + sampled
            correct += sum(line["correct"] for line in lines)
            print(
                f"{done}/{count} problems | {correct} correct | {tokens / seconds:,.0f} tokens/s | "
                f"ETA {duration((count - done) * seconds / done)}",
                file=sys.stderr,
                flush=True,
            )


def _score(config: Gsm8kConfig, problems: list[Problem]) -> None:
    from megatron_dlm.evaluation.gsm8k import accuracy
    from megatron_dlm.platform.files import write_json

    asked = {problem.number for problem in problems}
    answers = [line for line in _answers(config) if line["number"] in asked]
    share, low, high = accuracy([line["correct"] for line in answers])
    empty = sum(line["found"] is None for line in answers)
    # Of an earlier version's answers it is not known.
    unfinished = sum(line.get("unfinished") is True for line in answers)
    counts = {"problems": len(answers), "without_number": empty, "unfinished": unfinished}
    write_json(config.output / RESULT, {"exact_match": share, "low": low, "high": high, **counts})
    print(
        f"{config.model}: exact match {share:.4f} [{low:.4f}, {high:.4f}] of {len(answers):,} problems, "
        f"{empty:,} answers without a number, {unfinished:,} that reach the end of the text without <eos>"
    )
