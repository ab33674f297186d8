"""`megatron-dlm sample MODEL`."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from megatron_dlm.cli.arguments import ModelArgument, bad_values, check_new_file, parse_with_model
from megatron_dlm.interfaces import InputError
from megatron_dlm.sampling.settings import SamplingConfig

if TYPE_CHECKING:
    from megatron_dlm.evaluation.loaded_model import LoadedModel
    from megatron_dlm.sampling.start import Start

TRACED_SAMPLES = 8
PREVIEW_CHARACTERS = 400


@dataclass(frozen=True, kw_only=True)
class SampleConfig(ModelArgument):
    """Sample texts from a trained model with any sampler of its family.

    Under torchrun, srun or mpirun the processes share the batches; the texts stay the same.
    """

    num_samples: int = 4
    """Number of texts to sample; with prompts, the number per prompt."""
    length: int | None = None
    """Length of each text in tokens, prompt included; None: the training sequence length."""
    prompt: str = ""
    """Prompt text with which every sample begins."""
    prompts: Path | None = None
    """JSON lines file of prompts: {"prompt": TEXT}, or, to fill gaps, {"parts": [TEXT, NUMBER, TEXT, ...]},
    where NUMBER is the length of a gap in tokens."""
    sampling: tyro.conf.OmitArgPrefixes[SamplingConfig] = SamplingConfig()
    seed: int = 0
    """Random seed. A text depends on the seed and its index, not on the batch it was sampled in."""
    batch_size: int = 8
    """Batch size: texts sampled together."""
    output: Path | None = None
    """JSON lines file to write, with number, prompt, text and token ids; None: print texts to standard
    output."""
    trace: Path | None = None
    """HTML file to write that replays the sampling steps of the first 8 texts; None: no trace."""
    tokenizer: Path | None = None
    """Directory of the model's tokenizer; None: the one in the exported folder, or the one that the training
    data of a checkpoint was indexed with."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of the loaded weights."""
    device: str | None = None
    """Device to run on, for example cpu or cuda:0; None: a GPU if there is one."""

    def __post_init__(self) -> None:
        for name in ("num_samples", "batch_size", "length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}: {value} is below 1")
        if self.prompt and self.prompts is not None:
            raise InputError("prompt, prompts: give one of them")
        for name in ("output", "trace"):
            check_new_file(name, getattr(self, name))


def run(arguments: list[str]) -> int:
    """Parse, sample, report; returns the exit code."""
    config = parse_with_model(SampleConfig, arguments, verb="sample")
    from megatron_dlm.evaluation.loaded_model import open_model

    loaded = open_model(config.model, tokenizer=config.tokenizer, dtype=config.dtype, device=config.device)
    with bad_values(), loaded.peers.together():
        _sample(config, loaded)
    return 0


def _sample(config: SampleConfig, loaded: LoadedModel) -> None:
    from megatron_dlm.evaluation.generation import before_end, sample_all
    from megatron_dlm.telemetry.writers import duration

    settings = config.sampling.resolved(loaded.family)
    prompts = _prompts(config)
    length = loaded.length(config.length)
    starts = [start for prompt in prompts for start in [_start(prompt, length, loaded)] * config.num_samples]
    lines: list[dict[str, Any]] = []
    tokens, begun = 0, time.perf_counter()
    for batch in sample_all(
        loaded.network,
        loaded.family,
        settings,
        starts,
        batch_size=config.batch_size,
        seed=config.seed,
        peers=loaded.peers,
    ):
        tokens, seconds = tokens + batch.tokens, time.perf_counter() - begun
        for number, ids, given in zip(
            batch.places, batch.ids_BL.tolist(), batch.given_BL.tolist(), strict=True
        ):
            eos = loaded.vocabulary.eos_token_id
            text = loaded.tokenizer.decode(before_end(ids, given, eos) if settings.stop_at_eos else ids)
            line = {"number": number, "seed": config.seed, **prompts[number // config.num_samples]}
            lines.append(line | {"text": text, "token_ids": ids})
        left = (len(starts) - len(lines)) * seconds / len(lines)
        if not loaded.peers.is_first:
            continue
        print(
            f"{len(lines)}/{len(starts)} texts | {tokens / seconds:,.0f} tokens/s | ETA {duration(left)}",
            file=sys.stderr,
            flush=True,
        )
    if not loaded.peers.is_first:
        return
    if config.output is None:
        for line in lines:
            print(f"-- {line['number']}\n{line['text']}")
    else:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        config.output.write_text(text, encoding="utf-8")
    if config.trace is not None:
        _write_trace(config, settings, starts[:TRACED_SAMPLES], loaded)


def _prompts(config: SampleConfig) -> list[dict[str, Any]]:
    """Checked lines of `prompts`, or the one prompt."""
    if config.prompts is None:
        return [{"prompt": config.prompt}]
    from megatron_dlm.platform.json_lines import read_json_lines

    lines = []
    for where, line in read_json_lines(config.prompts, "prompts"):
        if not isinstance(line, dict) or len(line.keys() & {"prompt", "parts"}) != 1:
            raise InputError(f"{where}: not an object with either prompt or parts")
        if "prompt" in line and not isinstance(line["prompt"], str):
            raise InputError(f"{where}: prompt is not a text")
        parts = line.get("parts", [""])
        if not isinstance(parts, list) or not all(type(part) in (str, int) for part in parts):
            raise InputError(f"{where}: parts is not a list of texts and numbers")
        lines.append({key: line[key] for key in ("prompt", "parts") if key in line})
    if not lines:
        raise InputError(f"prompts: {config.prompts}: has no line")
    return lines


def _start(prompt: dict[str, Any], length: int, loaded: LoadedModel) -> Start:
    from megatron_dlm.evaluation.generation import start_of_parts

    parts = prompt["parts"] if "parts" in prompt else [prompt["prompt"]]
    encoded = [part if isinstance(part, int) else loaded.tokenizer.ids_of(part) for part in parts]
    return start_of_parts(encoded, length, loaded.family)


def _write_trace(
    config: SampleConfig, settings: SamplingConfig, starts: list[Start], loaded: LoadedModel
) -> None:
    """Sample the first texts again, which gives the same texts, and record every sampling step."""
    import torch

    from megatron_dlm.evaluation.trace import Trace
    from megatron_dlm.sampling.generate import sample
    from megatron_dlm.sampling.start import Start

    assert config.trace is not None
    batch = Start(torch.cat([s.ids_BL for s in starts]), torch.cat([s.given_BL for s in starts]))
    unknown = torch.full_like(batch.ids_BL, loaded.vocabulary.mask_token_id)
    trace = Trace(torch.where(batch.given_BL, batch.ids_BL, unknown), batch.given_BL)
    sample(loaded.network, loaded.family, settings, batch, seed=config.seed, on_step=trace.keep)
    chosen = {k: v for k, v in asdict(settings).items() if v is not None and v is not False}
    trace.write(
        config.trace,
        title=f"{loaded.family.name}: {config.model}",
        facts=", ".join(f"{name} {value}" for name, value in chosen.items()) + f", seed {config.seed}",
        mask_token_id=loaded.vocabulary.mask_token_id,
        names=[str(number) for number in range(len(starts))],
        string_of=lambda token: loaded.tokenizer.decode([token]) or f"<{token}>",
    )
    print(f"{config.trace}: {len(starts)} texts", file=sys.stderr)
