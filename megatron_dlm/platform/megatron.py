"""The only module that uses private or unstable APIs of megatron-core; torch's are in this package too.

Public APIs are imported where they are used. The APIs used here were tested with megatron-core 0.16.1 and
0.19.2, and torch 2.10 to 2.14; look here first when either package changes.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.distributed.data_parallel_base import _BaseDataParallel
from megatron.core.energy_monitor import EnergyMonitor
from megatron.core.transformer import cuda_graphs
from megatron.core.transformer.transformer_layer import BaseTransformerLayer
from torch.distributed.checkpoint import Metadata, SavePlan
from torch.distributed.checkpoint.utils import _DistWrapper

COMMON_STATE = "common.pt"
CHECKPOINT_BACKEND, CHECKPOINT_VERSION = "torch_dist", 1
"""megatron-core's names of the checkpoint format."""
DataParallelBase = _BaseDataParallel
SavePlannerBase = MCoreSavePlanner
torch_state = mcore_to_pyt_state_dict


def by_checkpoint_key(state: dict[str, Any]) -> dict[str, Any]:
    """Group sharded tensors and objects by their checkpoint keys.

    Args:
        state: sharded state dict by module names; tensors of several layers may share one checkpoint key.

    Returns:
        For each checkpoint key, the list of entries that share it.
    """
    renamed, _, _ = _replace_state_dict_keys_with_sharded_keys(state, True)
    return renamed


def save_common_state(directory: Path, common: dict[str, Any]) -> None:
    """Write what is the same on all ranks, and the name of the format.

    Args:
        directory: of the checkpoint.
        common: state without sharded tensors.
    """
    if torch.distributed.get_rank() == 0:
        # The newer line writes it only with a warning that it will not for long.
        torch.save(common, directory / COMMON_STATE)
    save_config(CheckpointingConfig(CHECKPOINT_BACKEND, CHECKPOINT_VERSION), str(directory))


def agree_on_plan(
    own_plan: Callable[[], SavePlan], join: Callable[[list[SavePlan]], tuple[list[SavePlan], Metadata]]
) -> tuple[SavePlan, Metadata]:
    """Merge all ranks' checkpoint save plans on rank 0. All ranks of the default group must call it.

    Args:
        own_plan: function that returns this rank's save plan.
        join: function from all ranks' plans to final plans and checkpoint metadata; called on rank 0.

    Returns:
        This rank's final plan, and the metadata, which are empty on ranks other than 0.

    Raises:
        CheckpointException: `own_plan` or `join` has raised, on all ranks.
    """
    metadata = Metadata({})

    def join_keeping_metadata(plans: list[SavePlan]) -> list[SavePlan]:
        nonlocal metadata
        final, metadata = join(plans)
        return final

    return _DistWrapper(None, True, 0).reduce_scatter("plan", own_plan, join_keeping_metadata), metadata


def hand_context_to_all_layers() -> None:
    """Let full recomputation give `context` to all kinds of layers, as it does up to 0.16.

    0.19 gives it to its own TransformerLayer only, and drops what other layers return beside their output.
    """
    if importlib.util.find_spec("megatron.core.recompute") is not None:
        recompute = importlib.import_module("megatron.core.recompute")
        recompute.TransformerLayer = BaseTransformerLayer  # type: ignore[attr-defined]


def energy_monitor(device: torch.device) -> EnergyMonitor:
    """megatron-core's monitor of a GPU's energy, which all ranks ask together.

    Args:
        device: this process's GPU.

    Returns:
        The monitor, of this GPU also where CUDA_VISIBLE_DEVICES leaves others out, which NVML still counts.
    """
    import pynvml

    monitor = EnergyMonitor()
    monitor.setup()
    uuid = torch.cuda.get_device_properties(device).uuid
    monitor._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    return monitor


@contextmanager
def hooks_at_rest() -> Iterator[None]:
    """Disable megatron-core's hooks on modules and gradients, as during its own CUDA graph capture."""
    cuda_graphs._set_capture_start()
    try:
        yield
    finally:
        cuda_graphs._set_capture_end()


def own_elements(part: Any, parameter: torch.nn.Parameter) -> tuple[int, int]:
    """Range of a parameter's elements that this rank optimizes.

    Args:
        part: megatron-core's distributed optimizer.
        parameter: a parameter of this optimizer.

    Returns:
        Start and end (exclusive) of the range, in row-major order.
    """
    own = part._get_model_param_range_map(parameter)["param"]
    return own.start, own.end


def round_main_weights(part: Any) -> None:
    """Make this rank's share of the model's weights of the optimizer's main weights again.

    Args:
        part: megatron-core's distributed optimizer.
    """
    part._copy_main_params_to_model_params()
