"""`megatron-dlm sample MODEL`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from megatron_dlm.cli.arguments import parse
from megatron_dlm.interfaces import InputError
from megatron_dlm.sampling.settings import SamplingConfig

if TYPE_CHECKING:
    from megatron_dlm.sampling.start import Start
    from megatron_dlm.training.use_model import UsableModel

TRACED_SAMPLES = 8
PREVIEW_CHARACTERS = 400


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Texts of a model, by any sampler of its family."""

    model: Annotated[Path, tyro.conf.Positional]
    """A step-NNNNNNNN directory of any layout, or an exported folder."""
    num_samples: int = 4
    """Texts to make, of each prompt where there are prompts."""
    length: int | None = None
    """Tokens of a text, the prompt's included; None: the training length."""
    prompt: str = ""
    """How every text begins."""
    prompts: Path | None = None
    """JSON lines with {"prompt": TEXT}, or {"parts": [TEXT, NUMBER, TEXT, ...]}: gaps in tokens."""
    sampling: tyro.conf.OmitArgPrefixes[SamplingConfig] = SamplingConfig()
    seed: int = 0
    """Of all draws; a text depends on the seed and its number, not on the batch."""
    batch_size: int = 8
    """Texts sampled together."""
    output: Path | None = None
    """JSON lines with number, prompt, text and token ids; None: texts on standard output."""
    trace: Path | None = None
    """HTML page to make that plays the steps of the first 8 texts."""
    tokenizer: Path | None = None
    """Directory of the model's tokenizer; None: the folder's, or where the data was indexed with it."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Of the weights."""
    device: str | None = None
    """For example cpu or cuda:0; None: CUDA where there is one."""

    def __post_init__(self) -> None:
        for name in ("num_samples", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: {getattr(self, name)} is below 1")
        if self.prompt and self.prompts is not None:
            raise InputError("prompt, prompts: give one of them")
        for name in ("output", "trace"):
            path: Path | None = getattr(self, name)
            if path is not None and not path.parent.is_dir():
                raise InputError(f"{name}: {path.parent}: no such directory")


def run(arguments: list[str]) -> int:
    """Parse, sample, report; returns the exit code."""
    config = parse(SampleConfig, arguments, verb="sample")
    from megatron_dlm.training.use_model import open_model

    usable = open_model(config.model, tokenizer=config.tokenizer, dtype=config.dtype, device=config.device)
    try:
        _sample(config, usable)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from error
    return 0


def _sample(config: SampleConfig, usable: UsableModel) -> None:
    from megatron_dlm.evaluation.generation import sample_all, text_of
    from megatron_dlm.telemetry.writers import duration

    settings = config.sampling.resolved(usable.process)
    prompts = _prompts(config)
    length = config.length or usable.config.data.seq_length
    starts = [start for prompt in prompts for start in [_start(prompt, length, usable)] * config.num_samples]
    lines: list[dict[str, Any]] = []
    tokens, seconds = 0, 0.0
    for batch in sample_all(
        usable.network, usable.process, settings, starts, batch_size=config.batch_size, seed=config.seed
    ):
        tokens, seconds = tokens + batch.tokens, seconds + batch.seconds
        for number, ids in zip(batch.places, batch.ids_BL.tolist(), strict=True):
            eos, stop = usable.vocabulary.eos_token_id, settings.stop_at_eos
            text = text_of(ids, usable.tokenizer.decode, eos, stop=stop)
            line = {"number": number, "seed": config.seed, **prompts[number // config.num_samples]}
            lines.append(line | {"text": text, "token_ids": ids})
        left = (len(starts) - len(lines)) * seconds / len(lines)
        print(
            f"{len(lines)}/{len(starts)} texts | {tokens / seconds:,.0f} tokens/s | ETA {duration(left)}",
            file=sys.stderr,
            flush=True,
        )
    if config.output is None:
        for line in lines:
            print(f"-- {line['number']}\n{line['text']}")
    else:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        config.output.write_text(text, encoding="utf-8")
    if config.trace is not None:
        _write_trace(config, settings, starts[:TRACED_SAMPLES], usable)


def _prompts(config: SampleConfig) -> list[dict[str, Any]]:
    """Checked lines of `prompts`, or the one prompt."""
    if config.prompts is None:
        return [{"prompt": config.prompt}]
    try:
        lines = [json.loads(line) for line in config.prompts.read_text(encoding="utf-8").splitlines() if line]
    except (OSError, ValueError) as error:
        raise InputError(f"prompts: {config.prompts}: {error}") from error
    for number, line in enumerate(lines, start=1):
        where = f"prompts: {config.prompts}:{number}"
        if not isinstance(line, dict) or len(line.keys() & {"prompt", "parts"}) != 1:
            raise InputError(f"{where}: not an object with either prompt or parts")
        if "prompt" in line and not isinstance(line["prompt"], str):
            raise InputError(f"{where}: prompt is not a text")
        parts = line.get("parts", [""])
        if not isinstance(parts, list) or not all(type(part) in (str, int) for part in parts):
            raise InputError(f"{where}: parts is not a list of texts and numbers")
    if not lines:
        raise InputError(f"prompts: {config.prompts}: has no line")
    return [{key: line[key] for key in ("prompt", "parts") if key in line} for line in lines]


def _start(prompt: dict[str, Any], length: int, usable: UsableModel) -> Start:
    from megatron_dlm.evaluation.generation import start_of_parts

    def tokens(text: str) -> list[int]:
        return [int(token) for token in usable.tokenizer.encode([text])[0]]

    parts = prompt.get("parts") or ([prompt["prompt"]] if prompt["prompt"] else [])
    encoded = [part if isinstance(part, int) else tokens(part) for part in parts]
    return start_of_parts(encoded, length, usable.process)


def _write_trace(
    config: SampleConfig, settings: SamplingConfig, starts: list[Start], usable: UsableModel
) -> None:
    """Sample the first texts once more, which gives the same, and keep what happens."""
    import torch

    from megatron_dlm.evaluation.trace import Trace
    from megatron_dlm.sampling.generate import sample
    from megatron_dlm.sampling.start import Start

    assert config.trace is not None
    batch = Start(torch.cat([s.ids_BL for s in starts]), torch.cat([s.given_BL for s in starts]))
    unknown = torch.full_like(batch.ids_BL, usable.vocabulary.mask_token_id)
    trace = Trace(torch.where(batch.given_BL, batch.ids_BL, unknown), batch.given_BL)
    sample(usable.network, usable.process, settings, batch, seed=config.seed, on_step=trace.keep)
    chosen = {k: v for k, v in asdict(settings).items() if v not in (None, False)}
    trace.write(
        config.trace,
        title=f"{usable.process.family}: {config.model}",
        facts=", ".join(f"{name} {value}" for name, value in chosen.items()) + f", seed {config.seed}",
        mask_token_id=usable.vocabulary.mask_token_id,
        names=[str(number) for number in range(len(starts))],
        string_of=lambda token: usable.tokenizer.decode([token]) or f"<{token}>",
    )
    print(f"{config.trace}: {len(starts)} texts", file=sys.stderr)
