"""Saves and loads a run: sharded tensors by megatron-core, everything else as JSON beside them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from torch import Tensor

from megatron_dlm.checkpointing.safe_metadata import check_metadata
from megatron_dlm.checkpointing.storage import CheckpointRoot, verify
from megatron_dlm.checkpointing.writing import BACKEND, VERSION, ShareWriter
from megatron_dlm.interfaces import SaveError
from megatron_dlm.models.denoiser import Denoiser
from megatron_dlm.platform import distributed_optimizer
from megatron_dlm.platform.files import write_json
from megatron_dlm.platform.parallel import ParallelState, on_first_rank

MAIN_WEIGHTS = ("optimizer.state.param.", "optimizer.state.fp32_param.")
"""Where a distributed optimizer and a plain one keep fp32 weights, before the parameter's own name."""
RUN_RECORD, PROGRESS_RECORD = "run.json", "progress.json"

# common.pt and byte objects are pickles too; with this torch accepts tensors and plain containers only.
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"


class PendingSave:
    """A checkpoint that is being written; it becomes visible in `finish`, once complete."""

    def __init__(
        self,
        root: CheckpointRoot,
        step: int,
        denoiser: Denoiser,
        optimizer: Any,
        parallel: ParallelState,
        records: dict[str, Any],
        timeout_seconds: float,
    ) -> None:
        """Start to write the run as it is now; all ranks call it.

        Args:
            root: the run's checkpoints, on storage that all ranks share.
            step: optimizer steps done.
            denoiser: this process's stage; may change as soon as this returns.
            optimizer: megatron-core's; likewise.
            parallel: this process's place.
            records: JSON values by file name, written by rank 0.
            timeout_seconds: for writing the tensors.

        Raises:
            SaveError: the storage is full or cannot be written.
        """
        self.step = step
        self._root = root
        self._parallel = parallel
        self._records = records
        self._timeout_seconds = timeout_seconds
        try:
            self._on_first_rank(lambda: root.prepare(step))
            sharded, common = _sharded_state(denoiser, optimizer, parallel)
            self._on_first_rank(lambda: _write_common(root.temporary(step), common))
            self._share = ShareWriter(root.temporary(step), sharded, parallel)
            self._require_space()
        except SaveError:
            self._discard()
            raise
        self._share.start()

    def _require_space(self) -> None:
        size = torch.tensor(self._share.num_bytes, device=self._parallel.device)
        dist.all_reduce(size)
        self._on_first_rank(lambda: self._root.require_space(int(size)))

    def is_done(self) -> bool:
        """Whether `finish` has nothing to wait for; all ranks call it."""
        waiting = torch.tensor(
            int(not self._share.is_done(self._timeout_seconds)), device=self._parallel.device
        )
        dist.all_reduce(waiting, op=dist.ReduceOp.MAX)
        return not waiting

    def finish(self) -> None:
        """Wait until all is written and make it visible; all ranks call it.

        Raises:
            SaveError: something could not be written; nothing of it is left.
        """
        written = self._share.wait(self._timeout_seconds)
        shares: list[Any] = [None] * self._parallel.world_size
        dist.gather_object(written, shares if self._parallel.rank == 0 else None)

        def publish() -> None:
            if errors := [share.error for share in shares if share.error]:
                raise SaveError(errors[0])
            self._share.write_index(shares)
            for name, record in self._records.items():
                write_json(self._root.temporary(self.step) / name, record)
            self._root.publish(self.step, {k: v for share in shares for k, v in share.digests.items()})

        try:
            self._on_first_rank(publish)
        except SaveError:
            self._discard()
            raise

    def _discard(self) -> None:
        if self._parallel.rank == 0:
            self._root.discard(self.step)

    def _on_first_rank(self, action: Callable[[], Any]) -> None:
        def act() -> None:
            try:
                action()
            except OSError as error:
                raise SaveError(f"{self._root.temporary(self.step)}: {error}") from error

        on_first_rank(self._parallel, act)


def _sharded_state(denoiser: Denoiser, optimizer: Any, parallel: ParallelState) -> tuple[Any, Any]:
    """megatron-core's view of the tensors this process has, and of what all have in common."""
    state = _model_state(denoiser, parallel)
    with distributed_optimizer.correct_slices(optimizer):
        state["optimizer"] = optimizer.sharded_state_dict(
            dict(state), is_loading=False, metadata=_metadata(parallel)
        )
    described = {key: value for key, value in _metadata(parallel).items() if key != "dp_cp_group"}
    sharded, common = save_preprocess(state | {"content_metadata": described})
    return sharded, common


def _write_common(directory: Path, common: Any) -> None:
    TorchCommonSaveStrategy("torch", VERSION).save_common(common, directory)
    save_config(CheckpointingConfig(BACKEND, VERSION), str(directory))


def load(directory: Path, denoiser: Denoiser, optimizer: Any, parallel: ParallelState) -> None:
    """Load weights and optimizer to go on with a run. All ranks call it.

    Args:
        directory: a checkpoint that `verify_on_all_ranks` has accepted.
        denoiser: this process's stage; changed in place.
        optimizer: megatron-core's; changed in place.
        parallel: this process's place; may differ from the one that saved, sharded optimizer or not.
    """
    distributed_optimizer.prepare_to_load(optimizer)
    stored = dist_checkpointing.load_tensors_metadata(str(directory))
    was_sharded = any(key.startswith(MAIN_WEIGHTS[0]) for key in stored)
    if was_sharded != distributed_optimizer.is_sharded(optimizer):
        _load_by_parameter(directory, denoiser, optimizer, parallel)
        return
    state = _model_state(denoiser, parallel)
    with distributed_optimizer.correct_slices(optimizer):
        state["optimizer"] = optimizer.sharded_state_dict(
            dict(state), is_loading=True, metadata=_metadata(parallel)
        )
    loaded = _load(state, directory, parallel)
    denoiser.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    distributed_optimizer.finish_load(optimizer)


def _load_by_parameter(directory: Path, denoiser: Denoiser, optimizer: Any, parallel: ParallelState) -> None:
    """Load an optimizer's state that was cut otherwise: whole tensors first, then this one's pieces."""
    parameters = dict(denoiser.named_parameters())

    def read(prefixes: tuple[str, ...]) -> dict[torch.nn.Parameter, Tensor]:
        tensors = _load_float32(directory, denoiser, parallel, prefixes)
        return {parameter: tensors[name] for name, parameter in parameters.items()}

    distributed_optimizer.set_weights(optimizer, read(MAIN_WEIGHTS))
    for moment in distributed_optimizer.MOMENTS:
        distributed_optimizer.set_moment(optimizer, moment, read((f"optimizer.state.{moment}.",)))
    saved = dist_checkpointing.load_common_state_dict(str(directory))["optimizer"]
    saved = saved.get("optimizer", saved)
    step = saved["param_groups"][0].get("step", saved.get("state", {}).get("common_step"))
    distributed_optimizer.set_step(optimizer, int(step))


def load_weights(directory: Path, denoiser: Denoiser, parallel: ParallelState) -> dict[str, Tensor]:
    """The weights alone, as exactly as the checkpoint has them. All ranks call it.

    Args:
        directory: a checkpoint that `verify_on_all_ranks` has accepted.
        denoiser: this process's stage; says which weights, and is left as it is.
        parallel: this process's place; may differ from the one that saved.

    Returns:
        float32 tensors by the stage's own names: of a bf16 run the optimizer's main weights.
    """
    return _load_float32(directory, denoiser, parallel, MAIN_WEIGHTS)


def _load_float32(
    directory: Path, denoiser: Denoiser, parallel: ParallelState, prefixes: tuple[str, ...]
) -> dict[str, Tensor]:
    """What is stored of each weight under the first prefix that is there, else the weight itself."""
    stored = dist_checkpointing.load_tensors_metadata(str(directory))
    state = _model_state(denoiser, parallel)
    for tensor in state["model"].values():
        if not isinstance(tensor, ShardedTensor):
            # An FP8 linear's scales, or nothing at other precisions.
            continue
        candidates = [f"{prefix}{tensor.key}" for prefix in prefixes]
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
