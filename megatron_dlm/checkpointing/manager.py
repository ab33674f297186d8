"""Saves and loads a run: sharded tensors by megatron-core, everything else as JSON beside them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch import Tensor

from megatron_dlm.checkpointing.safe_metadata import check_metadata
from megatron_dlm.checkpointing.storage import CheckpointRoot, verify
from megatron_dlm.models.denoiser import Denoiser
from megatron_dlm.platform import distributed_optimizer
from megatron_dlm.platform.files import write_json
from megatron_dlm.platform.mcore import keep_save_results_in_process
from megatron_dlm.platform.parallel import ParallelState, on_first_rank

MAIN_WEIGHTS = ("optimizer.state.param.", "optimizer.state.fp32_param.")
"""Where a distributed optimizer and a plain one keep fp32 weights, before the parameter's own name."""
RUN_RECORD, PROGRESS_RECORD = "run.json", "progress.json"

# common.pt and byte objects are pickles too; with this torch accepts tensors and plain containers only.
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"


def save(
    root: CheckpointRoot,
    step: int,
    denoiser: Denoiser,
    optimizer: Any,
    parallel: ParallelState,
    records: dict[str, Any],
) -> None:
    """Write one checkpoint; it is visible only once complete. All ranks call it.

    Args:
        root: the run's checkpoints, on storage that all ranks share.
        step: optimizer steps done.
        denoiser: this process's stage.
        optimizer: megatron-core's.
        parallel: this process's place.
        records: JSON values by file name, written by rank 0.
    """
    on_first_rank(parallel, lambda: root.prepare(step))
    state = _model_state(denoiser, parallel)
    with distributed_optimizer.correct_slices(optimizer):
        state["optimizer"] = optimizer.sharded_state_dict(
            dict(state), is_loading=False, metadata=_metadata(parallel)
        )
    strategy = FullyParallelSaveStrategyWrapper(
        TorchDistSaveShardedStrategy("torch_dist", 1), parallel.replica_group, False
    )
    keep_save_results_in_process()
    described = {key: value for key, value in _metadata(parallel).items() if key != "dp_cp_group"}
    dist_checkpointing.save(state, str(root.temporary(step)), strategy, content_metadata=described)
    on_first_rank(parallel, lambda: _publish(root, step, records))


def load(directory: Path, denoiser: Denoiser, optimizer: Any, parallel: ParallelState) -> None:
    """Load weights and optimizer to go on with a run. All ranks call it.

    Args:
        directory: a checkpoint that `verify_on_all_ranks` has accepted.
        denoiser: this process's stage; changed in place.
        optimizer: megatron-core's; changed in place.
        parallel: this process's place; may differ from the one that saved.
    """
    state = _model_state(denoiser, parallel)
    distributed_optimizer.prepare_to_load(optimizer)
    with distributed_optimizer.correct_slices(optimizer):
        state["optimizer"] = optimizer.sharded_state_dict(
            dict(state), is_loading=True, metadata=_metadata(parallel)
        )
    loaded = _load(state, directory, parallel)
    denoiser.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    distributed_optimizer.finish_load(optimizer)


def load_weights(directory: Path, denoiser: Denoiser, parallel: ParallelState) -> dict[str, Tensor]:
    """The weights alone, as exactly as the checkpoint has them. All ranks call it.

    Args:
        directory: a checkpoint that `verify_on_all_ranks` has accepted.
        denoiser: this process's stage; says which weights, and is left as it is.
        parallel: this process's place; may differ from the one that saved.

    Returns:
        float32 tensors by the stage's own names: of a bf16 run the optimizer's main weights.
    """
    stored = dist_checkpointing.load_tensors_metadata(str(directory))
    state = _model_state(denoiser, parallel)
    for tensor in state["model"].values():
        if not isinstance(tensor, ShardedTensor):
            # An FP8 linear's scales, or nothing at other precisions.
            continue
        candidates = [f"{prefix}{tensor.key}" for prefix in MAIN_WEIGHTS]
        tensor.key = next((key for key in candidates if key in stored), tensor.key)
        tensor.data = torch.empty(tensor.local_shape, dtype=torch.float32, device=parallel.device)
        tensor.dtype = torch.float32
    weights: dict[str, Tensor] = _load(state, directory, parallel)["model"]
    return weights


def _load(state: dict[str, Any], directory: Path, parallel: ParallelState) -> dict[str, Any]:
    strategy = FullyParallelLoadStrategyWrapper(
        get_default_load_sharded_strategy(str(directory)), parallel.replica_group
    )
    loaded: dict[str, Any] = dist_checkpointing.load(state, str(directory), strategy)
    return loaded


def verify_on_all_ranks(directory: Path, parallel: ParallelState) -> None:
    """Rank 0 verifies a checkpoint; all ranks raise what it found.

    Args:
        directory: a checkpoint.
        parallel: this process's place.

    Raises:
        InputError: the checkpoint is incomplete, damaged or hostile.
    """

    def check() -> None:
        verify(directory)
        check_metadata(directory)

    on_first_rank(parallel, check)


def _publish(root: CheckpointRoot, step: int, records: dict[str, Any]) -> None:
    for name, record in records.items():
        write_json(root.temporary(step) / name, record)
    root.publish(step)


def _model_state(denoiser: Denoiser, parallel: ParallelState) -> dict[str, Any]:
    return {"model": denoiser.sharded_state_dict(metadata=_metadata(parallel))}


def _metadata(parallel: ParallelState) -> dict[str, Any]:
    return {
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel.replica_group,
        # The other sharding types cannot be loaded with torch's AdamW, or only on the same layout.
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": True,
    }
