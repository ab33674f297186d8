"""Saves and loads a run: sharded tensors by megatron-core, everything else as JSON beside them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from torch import Tensor

from megatron_dlm.checkpointing.async_writer import SavePlans, ShareWriter
from megatron_dlm.checkpointing.layout import CheckpointRoot, verify
from megatron_dlm.checkpointing.optimizer_state import load_state, state_to_save
from megatron_dlm.checkpointing.safe_metadata import check_metadata, force_weights_only
from megatron_dlm.checkpointing.tensor_chunks import TensorChunks, weight_key
from megatron_dlm.interfaces import InputError, SaveError
from megatron_dlm.models.denoiser import ChunkedDenoiser, Denoiser
from megatron_dlm.platform import distributed_optimizer
from megatron_dlm.platform.files import write_json
from megatron_dlm.platform.fp8_weights import plain
from megatron_dlm.platform.fully_sharded import sharded_names, stand_ins
from megatron_dlm.platform.megatron import save_common_state
from megatron_dlm.platform.parallel import ParallelState, on_first_rank

OPTIMIZER_STEP = "optimizer_step"


class PendingSave:
    """A checkpoint that is being written; it becomes visible in `finish`, once complete."""

    def __init__(
        self,
        root: CheckpointRoot,
        step: int,
        denoiser: Denoiser | ChunkedDenoiser,
        optimizer: Any,
        parallel: ParallelState,
        plans: SavePlans,
        records: dict[str, Any],
        timeout_seconds: float,
    ) -> None:
        """Start to write the run as it is now; all ranks call it.

        Args:
            root: the run's checkpoints, on storage that all ranks share.
            step: optimizer steps done.
            denoiser: pipeline stage of this rank; may change as soon as this returns.
            optimizer: megatron-core's optimizer; may change as soon as this returns. None for imported
                weights, which no run of this package has trained.
            parallel: rank and process groups of this process.
            plans: save plan and host memory, kept from save to save of one run.
            records: JSON values by file name, written by rank 0.
            timeout_seconds: seconds that writing the tensors may take.

        Raises:
            SaveError: the storage is full or cannot be written.
        """
        self.step = step
        self._started_at = time.monotonic()
        self._root = root
        self._parallel = parallel
        self._records = records
        self._timeout_seconds = timeout_seconds
        if optimizer is not None:
            distributed_optimizer.complete_weights(optimizer)
        try:
            state = _model_state(denoiser, parallel)
            pieces: dict[str, TensorChunks] = {}
            common_state: dict[str, Any] = {"content_metadata": {}}
            if optimizer is not None:
                pieces = state_to_save(optimizer, _places(denoiser, state))
                common_state[OPTIMIZER_STEP] = distributed_optimizer.step_count(optimizer)
            weights, common = save_preprocess(
                _without_sharded(denoiser, state) | common_state,
                validate_access_integrity=plans.agreed is None,
            )
            self._on_first_rank(lambda: save_common_state(root.prepare(step), common))
            self._share = ShareWriter(root.temporary(step), weights, pieces, plans, parallel)
            self._require_space()
        except SaveError:
            # No child has been started.
            plans.memory.release()
            self._discard()
            raise
        self._share.start()

    def _require_space(self) -> None:
        free = 0
        if self._parallel.rank == 0:
            try:
                free = self._root.free_bytes()
            except OSError:
                # The storage is not to be had: as good as full, and all ranks must hear of it.
                free = -1
        has_failed = int(bool(self._share.error))
        sums = torch.tensor([self._share.num_bytes, free, has_failed], device=self._parallel.device)
        dist.all_reduce(sums)
        needed, free, failures = sums.tolist()
        if failures:
            # Who has seen it says what, the others that it was not them.
            raise SaveError(self._share.error or f"{failures} other ranks have no memory for their copies")
        if free < needed:
            raise SaveError(f"{self._root.path}: {needed:,} bytes needed, {free:,} free")

    def seconds(self) -> float:
        """Seconds since the save began."""
        return time.monotonic() - self._started_at

    def is_done(self) -> bool:
        """Whether `finish` has nothing to wait for on this rank."""
        return self._share.is_done(self._timeout_seconds)

    def finish(self) -> None:
        """Wait until all ranks have written and make the checkpoint visible; all ranks call it.

        Raises:
            SaveError: something could not be written; the unfinished checkpoint is removed.
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


def load(
    directory: Path,
    denoiser: Denoiser | ChunkedDenoiser,
    optimizer: Any,
    parallel: ParallelState,
    *,
    averaged: bool = False,
) -> None:
    """Load weights and optimizer state to resume a run; all ranks call it.

    Args:
        directory: a checkpoint that `verify_on_all_ranks` has accepted.
        denoiser: pipeline stage of this rank; changed in place.
        optimizer: megatron-core's optimizer; changed in place.
        parallel: rank and process groups of this process; the layout may differ from the one that saved, also
            in whether the optimizer is sharded.
        averaged: whether the run keeps averages of its weights.
    """
    loaded = _load(_without_sharded(denoiser, _model_state(denoiser, parallel)), directory, parallel)
    # Nothing is there of a stage whose weights are all sharded.
    found = denoiser.load_state_dict(loaded.get("model", {}), strict=False)
    if set(found.missing_keys) != sharded_names(denoiser) or found.unexpected_keys:
        raise InputError(f"checkpoint: {directory}: not the tensors of this model: {found}")
    for chunk in denoiser.chunks:
        # One by one: chunks of one process have copies of the time embedder.
        load_state(directory, optimizer, _places(chunk, _model_state(chunk, parallel)), averaged=averaged)
    distributed_optimizer.weights_from_main(optimizer)
    distributed_optimizer.set_step_count(optimizer, loaded[OPTIMIZER_STEP])


def load_weights(
    directory: Path,
    denoiser: Denoiser | ChunkedDenoiser,
    parallel: ParallelState,
    *,
    averaged: bool = False,
) -> dict[str, Tensor]:
    """Load only the weights, at the checkpoint's highest precision; all ranks call it.

    Args:
        directory: a checkpoint that `verify_on_all_ranks` has accepted.
        denoiser: pipeline stage that says which weights to load; not changed.
        parallel: rank and process groups of this process; the layout may differ from the one that saved.
        averaged: whether to load the moving averages of the weights.

    Returns:
        float32 tensors by name in the stage; for a bf16 run the optimizer's main weights. Buffers that
        the checkpoint lacks are left out.
    """
    stored = dist_checkpointing.load_tensors_metadata(str(directory))
    state = _model_state(denoiser, parallel)
    parameters = {name for name, _ in denoiser.named_parameters()}
    for name, tensor in list(state["model"].items()):
        if name not in parameters and tensor.key not in stored:
            # Maxima of FP8's delayed scaling, of a run that had none.
            del state["model"][name]
            continue
        if name in parameters:
            tensor.key = weight_key(tensor.key, stored, averaged=averaged)
        tensor.data = torch.empty(tensor.local_shape, dtype=torch.float32, device=parallel.device)
        tensor.dtype = torch.float32
    weights: dict[str, Tensor] = _load(state, directory, parallel)["model"]
    return weights


def _load(state: dict[str, Any], directory: Path, parallel: ParallelState) -> dict[str, Any]:
    strategy = FullyParallelLoadStrategyWrapper(
        get_default_load_sharded_strategy(str(directory)), parallel.replica_group
    )
    with force_weights_only(True):
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

    def check() -> str:
        verify(directory)
        check_metadata(directory)
        return directory.name

    if (first := on_first_rank(parallel, check)) != directory.name:
        raise InputError(f"checkpoint: rank 0 reads {first}, rank {parallel.rank} {directory.name}")


def _model_state(denoiser: Denoiser | ChunkedDenoiser, parallel: ParallelState) -> dict[str, Any]:
    with stand_ins(denoiser, denoiser.config.params_dtype):
        state = denoiser.sharded_state_dict(metadata=_metadata(parallel))
    for tensor in state.values():
        if isinstance(tensor, ShardedTensor):
            tensor.data = plain(tensor.data)
    # The rest, megatron-core's empty places for Transformer Engine's pickles, would tie a checkpoint to the
    # implementation that saved it.
    return {"model": {name: value for name, value in state.items() if not isinstance(value, ShardedObject)}}


def _without_sharded(denoiser: Denoiser | ChunkedDenoiser, state: dict[str, Any]) -> dict[str, Any]:
    """Leave out fully sharded weights, which are saved with the optimizer's state."""
    sharded = sharded_names(denoiser)
    return {"model": {name: value for name, value in state["model"].items() if name not in sharded}}


def _places(
    denoiser: Denoiser | ChunkedDenoiser, state: dict[str, Any]
) -> dict[torch.nn.Parameter, ShardedTensor]:
    """Where each parameter of this stage lies in the whole model, of which `state` is this stage's part."""
    return {parameter: state["model"][name] for name, parameter in denoiser.named_parameters()}


def _metadata(parallel: ParallelState) -> dict[str, Any]:
    return {"singleton_local_shards": False, "dp_cp_group": parallel.replica_group}
