"""A run in a few lines for people: what trains on what, where and how far, and what has changed."""

from __future__ import annotations

from typing import Any

from megatron_dlm.data.loading.prompt_rows import PromptRows
from megatron_dlm.models.sizes import parameter_count
from megatron_dlm.platform.codec import encode
from megatron_dlm.run.config import RunConfig
from megatron_dlm.run.datasets import RunData

NAMED_CHANGES = 8
"""Most changed fields that a line names."""


def describe_layout(config: RunConfig, processes: int) -> dict[str, str]:
    """What a run does, as far as its configuration tells.

    Args:
        config: a configuration that fits the number of processes.
        processes: processes of the job.

    Returns:
        Lines by their heading.
    """
    parallel, training = config.parallel, config.training
    heads = config.model.num_attention_heads
    padded_heads = config.model.padded_heads(parallel.tensor_model_parallel_size)
    padding = "" if padded_heads == heads else f" ({padded_heads} with padding)"
    data_size = parallel.data_parallel_size(processes)
    tokens = training.global_batch_size * config.data.seq_length
    microbatches = training.global_batch_size // (training.micro_batch_size * data_size)
    run_tokens = training.samples_ahead(0, training.num_steps) * config.data.seq_length
    count = f"{run_tokens / 1e9:,.1f}B" if run_tokens >= 1e9 else f"{run_tokens:,}"
    chunks = ""
    if parallel.virtual_pipeline_model_parallel_size > 1:
        chunks = f" of {parallel.virtual_pipeline_model_parallel_size} chunks"
    ramp = f", from {training.ramp_start} samples on" if training.ramp_start else ""
    return {
        "objective": config.objective.name,
        "processes": f"{processes} = {parallel.tensor_model_parallel_size} tensor "
        f"x {parallel.pipeline_model_parallel_size} pipeline{chunks} "
        f"x {parallel.context_parallel_size} context x {data_size} data parallel",
        "model": f"{parameter_count(config.model, 0):,} body parameters, {config.model.num_layers} layers, "
        f"{heads} heads{padding}, {training.precision}",
        "step": f"{training.global_batch_size} samples x {config.data.seq_length} = {tokens:,} tokens, "
        f"{microbatches} microbatches of {training.micro_batch_size} a process{ramp}",
        "run": f"{training.num_steps:,} steps, {count} tokens",
        "directory": str(config.directory),
    }


def describe_data(config: RunConfig, data: RunData, consumed_samples: int, step: int) -> str:
    """The shards of a run, and how often the rest of the run reads them.

    Args:
        config: configuration of the run.
        data: its opened data.
        consumed_samples: samples read so far.
        step: optimizer steps done.

    Returns:
        One line.
    """
    ahead = config.training.samples_ahead(consumed_samples, config.training.num_steps - step)
    shards = []
    for name, weight in zip(data.train.blend.names, data.train.blend.weights, strict=True):
        rows = data.train.rows[name]
        room = rows.num_rows * config.data.seq_length
        size = f"{room:,} tokens"
        if isinstance(rows, PromptRows):
            size = (
                f"{rows.num_tokens:,} tokens of records, which fill {rows.num_tokens / room:.0%} of the rows"
            )
        shards.append(f"{rows.label} ({size}, {ahead * weight / rows.num_rows:.3g} epochs to come)")
    validation = config.data.validation or "of the same shards"
    return f"{', '.join(shards)}; validation {validation}"


def describe_changes(old: RunConfig, new: RunConfig) -> str:
    """The fields in which two configurations differ.

    Args:
        old: configuration of the checkpoint.
        new: configuration of the run that goes on from it.

    Returns:
        `field old -> new`, joined; empty if only the directory differs.
    """
    before, after = flat_options(old), flat_options(new)
    changed = [
        f"{name} {before.get(name)} -> {after.get(name)}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name) and name != "directory"
    ]
    more = len(changed) - NAMED_CHANGES
    return ", ".join(changed[:NAMED_CHANGES]) + (f" and {more} more" if more > 0 else "")


def flat_options(config: RunConfig) -> dict[str, Any]:
    """All options of a run by dotted name, as JSON values."""
    return _flat(encode(config))


def options_between(old: RunConfig, new: RunConfig) -> dict[str, list[str]]:
    """Command-line options that turn one run into another.

    Args:
        old: the run as it is.
        new: the run as it is to be.

    Returns:
        Values by option; a switch has none.
    """
    before, found = flat_options(old), dict[str, list[str]]()
    for name, value in flat_options(new).items():
        if value == before[name]:
            continue
        option = f"--{name}".replace("_", "-")
        if isinstance(value, bool):
            section, dot, switch = option.rpartition(".")
            found[option if value else f"{section}{dot}no-{switch}"] = []
        else:
            found[option] = [str(item) for item in (value if isinstance(value, list) else [value])]
    return found


def _flat(record: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves of nested records by dotted name."""
    leaves: dict[str, Any] = {}
    for name, value in record.items():
        path = f"{prefix}{name}"
        leaves |= _flat(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return leaves
