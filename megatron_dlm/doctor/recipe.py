"""Whether a recipe's run can start here: configuration, data, tokenizer, start, memory and disk."""

from __future__ import annotations

import shutil

import psutil
import torch

from megatron_dlm.doctor.finding import Finding
from megatron_dlm.doctor.machine import GIB, existing_parent
from megatron_dlm.evaluation.loaded_model import tokenizer_of_data
from megatron_dlm.interfaces import InputError
from megatron_dlm.planning.memory import rank_memory
from megatron_dlm.planning.stage import DeviceType
from megatron_dlm.run.config import RunConfig
from megatron_dlm.run.forward_passes import sampled_passes
from megatron_dlm.run.validation import check_device
from megatron_dlm.run.working_ranks import find_working_ranks
from megatron_dlm.training.train import check_start

TOPIC = "recipe"
PROCESS_GIB = {"cpu": 0.5, "cuda": 1.0}
"""What a process takes beside its tensors: libraries, or CUDA's context and NCCL's buffers."""
CHECKPOINT_BYTES = 12
"""Bytes that a checkpoint holds for each parameter: the fp32 weight and two moments."""


def look_at_recipe(
    config: RunConfig, processes: int, local_processes: int, device: torch.device
) -> list[Finding]:
    """Findings on a run.

    Args:
        config: configuration of the run.
        processes: processes of the job.
        local_processes: processes of the job on this host.
        device: device of this process.

    Returns:
        Findings; the first that fails keeps the others from being looked for.
    """
    try:
        data = check_start(config, processes)
        processes = find_working_ranks(config, processes).count
        check_device(config, device)
    except InputError as error:
        return [Finding(TOPIC, "start", "failed", str(error))]
    size = data.vocabulary.size
    tokens = sum(rows.num_rows for rows in data.train.rows.values()) * config.data.seq_length
    findings = [
        Finding(
            TOPIC, "start", "ok", f"{config.directory} can be started or continued by {processes} processes"
        ),
        Finding(TOPIC, "data", "ok", f"{tokens:,} training tokens, {size:,} ids"),
        _tokenizer(config),
        _memory(config, processes, local_processes, device, size),
        _disk(config, size),
    ]
    return findings


def _tokenizer(config: RunConfig) -> Finding:
    """Whether the data's tokenizer is where it was, which sampling and exports look for."""
    try:
        return Finding(TOPIC, "tokenizer", "ok", str(tokenizer_of_data(config)))
    except InputError as error:
        return Finding(TOPIC, "tokenizer", "note", str(error), "training does without")


def _memory(
    config: RunConfig, processes: int, local_processes: int, device: torch.device, vocabulary_size: int
) -> Finding:
    kind: DeviceType = "cuda" if device.type == "cuda" else "cpu"
    largest = sampled_passes(config, vocabulary_size).largest
    needed = rank_memory(config, processes, largest, vocabulary_size, kind).total / GIB + PROCESS_GIB[kind]
    if kind == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory / GIB
        value = f"{needed:.1f} GiB of the GPU's {there:.1f} predicted"
    else:
        needed, there = needed * local_processes, psutil.virtual_memory().total / GIB
        value = f"{needed:.1f} GiB of the host's {there:.1f} predicted for {local_processes} processes"
    if needed <= there:
        return Finding(TOPIC, "memory", "ok", value)
    return Finding(TOPIC, "memory", "failed", value, "megatron-dlm plan names layouts that fit")


def _disk(config: RunConfig, vocabulary_size: int) -> Finding:
    """Whether the checkpoints that are kept, and one in the making, have room."""
    from megatron_dlm.models.sizes import parameter_count

    each = CHECKPOINT_BYTES * parameter_count(config.model, vocabulary_size) / GIB
    kept = config.checkpoint.keep_last
    free = shutil.disk_usage(existing_parent(config.directory)).free / GIB
    if not kept:
        return Finding(TOPIC, "checkpoints", "ok", f"{each:,.2f} GiB each, all kept; {free:,.1f} GiB free")
    needed = each * (kept + 1)
    value = f"{needed:,.2f} GiB for {kept} kept and one more; {free:,.1f} GiB free"
    if needed <= free:
        return Finding(TOPIC, "checkpoints", "ok", value)
    return Finding(
        TOPIC, "checkpoints", "failed", value, "lower checkpoint.keep-last, or another --directory"
    )
