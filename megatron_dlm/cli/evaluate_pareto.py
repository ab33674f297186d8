"""`megatron-dlm evaluate pareto MODEL ...`."""

from __future__ import annotations

import csv
import itertools
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import tyro

from megatron_dlm.cli.arguments import bad_values, parse
from megatron_dlm.interfaces import InputError
from megatron_dlm.platform.files import write_csv
from megatron_dlm.sampling.settings import RemaskingRule, SamplerName, SamplingConfig

if TYPE_CHECKING:
    from megatron_dlm.evaluation.judge import Judge
    from megatron_dlm.evaluation.loaded_model import LoadedModel

TABLE, PICTURE = "pareto.csv", "pareto.png"
SETTINGS = ("family", "sampler", "variant", "num_steps", "batch_size", "temperature", "top_p")
COMPARABLE = ("judge", "length", "samples", "seed", "dtype", "device")
"""What rows must have in common to be on one frontier."""
KEYS = ("model", "weights_sha256", *SETTINGS, *COMPARABLE)
MEASURED = ("tokens_per_second", "seconds", "generative_perplexity", "unigram_entropy")


@dataclass(frozen=True, kw_only=True)
class ParetoConfig:
    """Quality against speed of sampling: every combination of the lists, one row of a table each.

    Speed is measured over whole sampling calls, including all overhead of the sampler. Under torchrun, srun
    or mpirun the processes share the texts, and the speed is still that of one process. Rows already in the
    table are not measured again, so the same command resumes a sweep that was stopped.
    """

    models: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Runs' directories, which mean their newest checkpoints, RUN@STEP, checkpoint directories
    (step-NNNNNNNN) or exported folders."""
    judge: Path
    """Model that scores generative perplexity: a local Hugging Face folder of a causal language model, or an
    AR model of this package."""
    output: Path
    """Directory for pareto.csv and pareto.png."""
    samplers: tuple[SamplerName, ...] = ()
    """Samplers to compare; each model uses those its family has, which must be at least one. Default: each
    family's default sampler."""
    num_steps: tuple[int, ...] = (16, 32, 64, 128)
    """Numbers of denoising steps, for samplers that use steps; tokens per segment for
    block-autoregressive."""
    batch_sizes: tuple[int, ...] = (8,)
    """Batch sizes: texts sampled together; values above num_samples are lowered to num_samples."""
    temperatures: tuple[float, ...] = (1.0,)
    """Sampling temperatures, by which the logits are divided."""
    top_ps: tuple[float, ...] = (1.0,)
    """Top-p (nucleus sampling) values: probability mass of the most likely tokens that are kept; 1 keeps
    all."""
    kappas: tuple[float, ...] = (0.5,)
    """Shares of the reverse process in a step, for sampler psi."""
    remasking: tuple[RemaskingRule, ...] = ("cap",)
    """Rules of sampler remasking."""
    remasking_strengths: tuple[float, ...] = (0.02,)
    """Strengths of remasking, for each rule."""
    thresholds: tuple[float, ...] = ()
    """Probabilities above which sampler confidence keeps a token, each in place of a number of steps."""
    num_samples: int = 64
    """Number of texts to sample for each combination."""
    length: int | None = None
    """Length of each text in tokens; None: the training sequence length."""
    seed: int = 0
    """Random seed."""
    reference: Path | None = None
    """CSV file of reference points to draw in the plot, with columns family, throughput_tok_per_s and
    gen_ppl."""
    tokenizer: Path | None = None
    """Directory of the models' tokenizer; None: the one in the exported folder, or the one that the training
    data of a checkpoint was indexed with."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of the models' weights."""
    device: str | None = None
    """Device to run on, for example cpu or cuda:0; None: a GPU if there is one."""

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_sizes"):
            for value in getattr(self, name):
                if value < 1:
                    raise InputError(f"{name}: {value} is below 1")
        if self.num_samples < 1:
            raise InputError(f"num_samples: {self.num_samples} is below 1")
        if self.length is not None and self.length < 2:
            raise InputError(f"length: {self.length} is below 2")
        if self.output.exists() and not self.output.is_dir():
            raise InputError(f"output: {self.output} is not a directory")
        listed = ("models", "num_steps", "batch_sizes", "temperatures", "top_ps", "kappas")
        for name in (*listed, "remasking", "remasking_strengths"):
            if not getattr(self, name):
                raise InputError(f"{name}: none given")


def run(arguments: list[str]) -> int:
    """Parse, sweep, draw; returns the exit code."""
    config = parse(ParetoConfig, arguments, verb="evaluate pareto")
    from megatron_dlm.evaluation.sample_quality import reference_points
    from megatron_dlm.platform.peers import meet_peers

    published = {} if config.reference is None else reference_points(config.reference)
    rows = _read(config.output / TABLE)
    peers = meet_peers()
    with peers.together():
        groups = _measure_missing(config, rows)
    if peers.is_first:
        _report(config, [row for row in rows if _comparable(row) in groups], published)
    return 0


def _measure_missing(config: ParetoConfig, rows: list[dict[str, str]]) -> set[tuple[str, ...]]:
    """Add what is not among the rows yet; returns what the rows of this sweep have in common."""
    from megatron_dlm.evaluation.judge import open_judge
    from megatron_dlm.evaluation.loaded_model import open_model

    groups: set[tuple[str, ...]] = set()
    for path in config.models:
        loaded = open_model(path, tokenizer=config.tokenizer, dtype=config.dtype, device=config.device)
        judge = open_judge(config.judge, config.dtype, loaded.network.device)
        with bad_values():
            wanted = _combinations(config, path, loaded)
            groups |= {_comparable(keys) for keys, _ in wanted}
            if len(groups) > 1:
                raise InputError(f"length: {path} was trained at another length than the others; give one")
            config.output.mkdir(parents=True, exist_ok=True)
            for number, (keys, settings) in enumerate(wanted, start=1):
                if not any(all(row[key] == str(keys[key]) for key in KEYS) for row in rows):
                    rows.append(_measure(keys, settings, loaded, judge))
                    if loaded.peers.is_first:
                        write_csv(config.output / TABLE, (*KEYS, *MEASURED), rows)
                if loaded.peers.is_first:
                    print(f"{path}: {number}/{len(wanted)} combinations", file=sys.stderr, flush=True)
    return groups


def _comparable(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in COMPARABLE)


def _variants(config: ParetoConfig, sampler: SamplerName) -> list[tuple[str, dict[str, Any]]]:
    """Names of a sampler's own settings, and these: steps and what else it takes."""
    if sampler == "left-to-right":
        return [("", {})]
    if sampler == "block-autoregressive":
        return [("", {"segment_length": steps}) for steps in config.num_steps]
    own: list[tuple[str, dict[str, Any]]] = [("", {})]
    if sampler == "psi":
        own = [(f"kappa {kappa}", {"kappa": kappa}) for kappa in config.kappas]
    if sampler == "remasking":
        own = [
            (f"{rule} {strength}", {"remasking": rule, "remasking_strength": strength})
            for rule, strength in itertools.product(config.remasking, config.remasking_strengths)
        ]
    found = [(name, more | {"num_steps": steps}) for name, more in own for steps in config.num_steps]
    if sampler == "confidence":
        found += [(f"threshold {threshold}", {"threshold": threshold}) for threshold in config.thresholds]
    return found


def _combinations(
    config: ParetoConfig, path: Path, loaded: LoadedModel
) -> list[tuple[dict[str, Any], SamplingConfig]]:
    """Key columns of one model's table rows, and settings; raises for an impossible one before any is run."""
    import torch

    from megatron_dlm.sampling.schedules import check_division

    family = loaded.family
    offered = [*family.samplers]
    chosen = [cast(SamplerName, name) for name in config.samplers or offered[:1] if name in offered]
    if not chosen:
        raise InputError(f"samplers: none is one of {family.name}, which has {', '.join(offered)}")
    length = loaded.length(config.length)
    device = loaded.network.device
    common = {
        "model": str(path),
        "weights_sha256": loaded.weights_sha256()[:16],
        "family": family.name,
        "judge": str(config.judge),
        "length": length,
        "samples": config.num_samples,
        "seed": config.seed,
        "dtype": config.dtype,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
    }
    # Written as they are sampled.
    batch_sizes = tuple(dict.fromkeys(min(size, config.num_samples) for size in config.batch_sizes))
    found: list[tuple[dict[str, Any], SamplingConfig]] = []
    for sampler in chosen:
        shared = itertools.product(batch_sizes, config.temperatures, config.top_ps)
        for (variant, own), values in itertools.product(_variants(config, sampler), list(shared)):
            batch_size, temperature, top_p = values
            settings = SamplingConfig(sampler=sampler, temperature=temperature, top_p=top_p, **own)
            settings = settings.resolved(family)
            check_division(settings, length - len(family.empty_prompt))
            keys = common | {"sampler": sampler, "variant": variant, "batch_size": batch_size}
            keys |= {"num_steps": own.get("num_steps", own.get("segment_length", ""))}
            keys |= {"temperature": temperature, "top_p": top_p}
            found.append(({key: keys[key] for key in KEYS}, settings))
    return found


def _measure(
    keys: dict[str, Any], settings: SamplingConfig, loaded: LoadedModel, judge: Judge
) -> dict[str, str]:
    """Measure one combination; returns its row of the table."""
    from megatron_dlm.evaluation.generation import sample_all
    from megatron_dlm.evaluation.sample_quality import unigram_entropy
    from megatron_dlm.sampling.start import start_from

    starts = [start_from([[]], keys["length"], loaded.family)] * keys["samples"]
    samples: list[list[int]] = []
    tokens, seconds = 0, 0.0
    for batch in sample_all(
        loaded.network,
        loaded.family,
        settings,
        starts,
        batch_size=keys["batch_size"],
        seed=keys["seed"],
        peers=loaded.peers,
    ):
        samples += batch.ids_BL.tolist()
        tokens, seconds = tokens + batch.tokens, seconds + batch.seconds
    texts = [loaded.tokenizer.decode(sample) for sample in samples]
    measured = {
        "tokens_per_second": f"{tokens / seconds:.6g}",
        "seconds": f"{seconds:.6g}",
        "generative_perplexity": f"{judge.perplexity(texts, loaded.peers):.6g}",
        "unigram_entropy": f"{unigram_entropy(samples):.6g}",
    }
    return {key: str(value) for key, value in keys.items()} | measured


def _read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    if reader.fieldnames is None or tuple(reader.fieldnames) != (*KEYS, *MEASURED):
        raise InputError(f"output: {path} is not a table of this command; take another directory")
    for number, row in enumerate(rows, start=2):
        try:
            numbers = [float(row[name]) for name in MEASURED]
        except (TypeError, ValueError) as error:
            raise InputError(f"output: {path}:{number}: {error}; take another directory") from error
        if None in row or any(map(math.isnan, numbers)):
            raise InputError(f"output: {path}:{number}: not a row of this command; take another directory")
    return rows


def _report(
    config: ParetoConfig, rows: list[dict[str, str]], published: dict[str, list[tuple[float, float]]]
) -> None:
    from rich.console import Console
    from rich.table import Table

    from megatron_dlm.evaluation.sample_quality import frontier
    from megatron_dlm.telemetry.plots import plot_pareto

    points = [(float(row["tokens_per_second"]), float(row["generative_perplexity"])) for row in rows]
    best = frontier(points)
    judge, length, samples, seed, dtype, device = _comparable(rows[0])
    title = f"{samples} texts of {length} tokens, seed {seed}, {dtype} on {device}, judge {judge}"
    table = Table(*SETTINGS, "tokens/s", "perplexity", "entropy", "frontier", title=title)
    for index, row in enumerate(rows):
        names = (*SETTINGS, "tokens_per_second", "generative_perplexity", "unigram_entropy")
        table.add_row(*(row[name] for name in names), "*" if index in best else "")
    Console(width=130).print(table)
    series: dict[str, list[tuple[float, float]]] = {}
    for row, point in zip(rows, points, strict=True):
        name = ", ".join(filter(None, (row["family"], row["sampler"], row["variant"])))
        series.setdefault(name, []).append(point)
    plot_pareto(series, published, config.output / PICTURE, frontier=[points[index] for index in best])
    print(f"{config.output}: {TABLE}, {PICTURE}; {len(rows)} combinations, {len(best)} on the frontier")
