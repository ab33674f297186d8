"""What `megatron-dlm plan` prints and writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_dlm.planning.plan import Cluster, Estimate
    from megatron_dlm.run.config import RunConfig


def print_run(config: RunConfig, cluster: Cluster, vocabulary_size: int, source: str) -> None:
    """Print what is planned, and for which GPUs.

    Args:
        config: configuration of the run.
        cluster: GPUs of the job.
        vocabulary_size: number of token ids.
        source: where that number is from.
    """
    from megatron_dlm.models.sizes import parameter_count
    from megatron_dlm.planning.gpus import usable_gib

    training = config.training
    print(
        f"run    {config.objective.name}, {parameter_count(config.model, vocabulary_size):,} parameters, "
        f"{vocabulary_size:,} ids ({source}), {training.global_batch_size:,} samples of "
        f"{config.data.seq_length:,} tokens a step, {training.num_steps:,} steps"
    )
    print(
        f"GPUs   {cluster.gpus:,} {cluster.gpu.name} on {cluster.nodes:,} nodes; "
        f"{usable_gib(cluster.gpu):.1f} of {cluster.gpu.memory_gib:.1f} GiB for tensors"
    )


COLUMNS = ("TP", "PP", "chunks", "CP", "DP", "micro", "recompute", "sharded", "precision")
NUMBERS = ("GiB", "ms/step", "tok/s/GPU", "MFU", "days")
WIDTH = 132
"""Least columns of a table; a narrower terminal breaks its lines."""


def _cells(estimate: Estimate) -> list[str]:
    from megatron_dlm.planning.layouts import sharding_of
    from megatron_dlm.planning.plan import GIB

    parallel, training = estimate.config.parallel, estimate.config.training
    return [
        str(parallel.tensor_model_parallel_size),
        str(parallel.pipeline_model_parallel_size),
        str(parallel.virtual_pipeline_model_parallel_size),
        str(parallel.context_parallel_size),
        str(parallel.data_parallel_size(estimate.cluster.gpus)),
        str(training.micro_batch_size),
        training.recompute,
        sharding_of(estimate.config),
        training.precision,
        f"{estimate.memory.total / GIB:.1f}",
        f"{estimate.time.total * 1e3:,.0f}",
        f"{estimate.tokens_per_second_per_gpu:,.0f}",
        f"{estimate.mfu:.1%}",
        f"{estimate.hours / 24:,.2f}",
    ]


def _console() -> Any:
    from rich.console import Console

    return Console(width=max(WIDTH, Console().width))


def print_layouts(shown: Sequence[Estimate], count: int) -> None:
    """Print layouts as a table.

    Args:
        shown: the fastest ones.
        count: number of all that fit.
    """
    from rich.table import Table

    title = f"the fastest of {count:,} layouts that fit; MFU of the data sheet's bf16 speed"
    table = Table("", *COLUMNS, *NUMBERS, title=title)
    for place, estimate in enumerate(shown, start=1):
        table.add_row(str(place), *_cells(estimate))
    _console().print(table)


def print_own(config: RunConfig, own: Estimate | str, fitting: Sequence[Estimate]) -> None:
    """Print whether the recipe's own layout fits, and what to change.

    Args:
        config: configuration of the run.
        own: its estimate, or why it cannot run.
        fitting: layouts that fit, fastest first.
    """
    from megatron_dlm.planning.gpus import usable_gib
    from megatron_dlm.planning.layouts import changes_between
    from megatron_dlm.planning.plan import GIB, nearest

    if isinstance(own, str):
        print(f"the recipe's own layout cannot run: {own}")
    else:
        cells = dict(zip((*COLUMNS, *NUMBERS), _cells(own), strict=True))
        text = ", ".join(f"{name} {value}" for name, value in cells.items())
        verdict = "fits" if own.fits else "DOES NOT FIT"
        print(f"the recipe's own layout {verdict}: {text}")
        if not own.fits:
            missing = own.memory.total / GIB - usable_gib(own.cluster.gpu)
            largest = max(_parts(own.memory), key=lambda part: part[1])
            print(f"  {missing:.1f} GiB too much; most are {largest[0]}, {largest[1] / GIB:.1f} GiB")
    if not fitting:
        print("no layout fits: take more GPUs or ones with more memory")
        return
    if isinstance(own, str) or not own.fits:
        near = nearest(config, fitting)
        assert near is not None
        print(f"  the nearest layout that fits: {_options(changes_between(config, near.config))}")
    elif own.time.total > 1.01 * fitting[0].time.total:
        ratio = own.time.total / fitting[0].time.total
        print(f"  the fastest takes 1/{ratio:.2f} of the time")


def _options(changes: dict[str, str]) -> str:
    return " ".join(f"{option} {value}".strip() for option, value in changes.items()) or "no change"


def _parts(record: Any) -> list[tuple[str, float]]:
    """Parts of a memory or time above 0, by name."""
    return [
        (field.name.replace("_", " "), getattr(record, field.name))
        for field in fields(record)
        if field.name != "stage" and getattr(record, field.name) > 0
    ]


def print_chosen(config: RunConfig, fitting: Sequence[Estimate]) -> None:
    """Print where memory and time of the fastest layout go, its options, and what other choices cost.

    Args:
        config: configuration of the run.
        fitting: layouts that fit, fastest first; at least one.
    """
    from rich.table import Table

    from megatron_dlm.planning.explanation import alternatives
    from megatron_dlm.planning.layouts import changes_between
    from megatron_dlm.planning.plan import GIB

    chosen = fitting[0]
    print("row 1")
    memory = ", ".join(f"{name} {size / GIB:.2f}" for name, size in _parts(chosen.memory))
    print(f"  GiB of a rank   {memory}")
    print(
        "  ms of a step    "
        + ", ".join(f"{name} {1e3 * seconds:.1f}" for name, seconds in _parts(chosen.time))
    )
    gpu_hours = chosen.hours * chosen.cluster.gpus
    print(f"  the run         {chosen.hours / 24:,.2f} days, {gpu_hours:,.0f} GPU-hours")
    print(f"  options         {_options(changes_between(config, chosen.config))}")
    others = alternatives(chosen, fitting)
    if others:
        table = Table(
            "axis", "choice", "time", "GiB", "what grows most", title="what another choice costs at best"
        )
        for other in others:
            table.add_row(
                other.axis,
                str(other.choice),
                f"{other.slowdown:.2f}x",
                f"{other.estimate.memory.total / GIB:.1f}",
                f"{other.grows} +{1e3 * other.by_seconds:.0f} ms",
            )
        _console().print(table)


def print_refusals(config: RunConfig, cluster: Cluster, fitting: Sequence[Estimate]) -> None:
    """Why no layout that fits uses an axis."""
    from megatron_dlm.planning.layouts import why_not

    used = {axis for estimate in fitting for axis in _used_axes(estimate.config)}
    for axis in ("tensor", "pipeline", "context"):
        reason = None if axis in used else why_not(config, cluster.gpus, axis)
        if reason:
            print(f"no {axis} parallelism: {reason}")


def _used_axes(config: RunConfig) -> set[str]:
    sizes = {
        "tensor": config.parallel.tensor_model_parallel_size,
        "pipeline": config.parallel.pipeline_model_parallel_size,
        "context": config.parallel.context_parallel_size,
    }
    return {axis for axis, size in sizes.items() if size > 1}


def print_simulation(chosen: Estimate, vocabulary_size: int, picture: Path) -> None:
    """Print and draw a layout's speed on more and more GPUs.

    Args:
        chosen: estimate of the layout.
        vocabulary_size: number of token ids.
        picture: PNG file to write.
    """
    from rich.table import Table

    from megatron_dlm.planning.scaling_simulation import ASSUMPTIONS, simulate_scaling
    from megatron_dlm.telemetry.plots import plot_scaling

    series = dict(
        zip(("same batch", "same batch per GPU"), simulate_scaling(chosen, vocabulary_size), strict=True)
    )
    table = Table("GPUs", "series", "batch", "micro", "ms/step", "tokens/s", "of ideal", title="row 1 scaled")
    points: dict[str, list[tuple[float, float]]] = {}
    for name, found in series.items():
        for point in found:
            ideal = found[0].tokens_per_second / found[0].gpus * point.gpus
            training = point.estimate.config.training
            points.setdefault(name, []).append((point.gpus, point.tokens_per_second))
            table.add_row(
                f"{point.gpus:,}",
                name,
                f"{training.global_batch_size:,}",
                str(training.micro_batch_size),
                f"{1e3 * point.estimate.time.total:,.0f}",
                f"{point.tokens_per_second:,.0f}",
                f"{point.tokens_per_second / ideal:.0%}",
            )
    _console().print(table)
    print(f"assumed: {ASSUMPTIONS}")
    title = f"{chosen.config.objective.name} on {chosen.cluster.gpu.name}"
    plot_scaling(points, picture, title=title, note=ASSUMPTIONS)
    print(picture)


def write_rows(path: Path, fitting: Sequence[Estimate]) -> None:
    """Write layouts as JSON.

    Args:
        path: the file.
        fitting: layouts that fit, fastest first.
    """
    from megatron_dlm.platform.files import write_json

    rows = [
        dict(zip((*COLUMNS, *NUMBERS), _cells(estimate), strict=True))
        | {
            "bytes": {name: size for name, size in _parts(estimate.memory)},
            "seconds": {name: seconds for name, seconds in _parts(estimate.time)},
        }
        for estimate in fitting
    ]
    write_json(path, rows)
    print(path)
