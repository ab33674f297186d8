"""Four defects in how megatron-core 0.16.1's DistributedOptimizer is saved and loaded, mended per instance.

Three appear where neither transformer-engine nor apex provides FusedAdam (torch's AdamW then stands in), on
CUDA too; the fourth, wrong slices in `fully_reshardable` saves, appears everywhere. Tests in
tests/distributed/test_upstream_defects.py leave the fixes out and fail once they are not needed any more.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch


@contextmanager
def correct_slices(optimizer: Any) -> Iterator[None]:
    """Save every parameter's state from its own place; hold around `sharded_state_dict`.

    megatron-core gathers the state of all buckets without the padding at their ends, then cuts it at places
    counted with that padding: from the second padded bucket on, each parameter is saved with its
    neighbour's numbers, and the last ones with zeros.

    Args:
        optimizer: what `get_megatron_optimizer` returned.

    Yields:
        Nothing.
    """
    buffers = [buffer for part in _parts(optimizer) for buffer in getattr(part, "buffers", [])]
    padded = [buffer.param_index_map for buffer in buffers]
    try:
        for buffer in buffers:
            paddings = [bucket.grad_data.numel() - bucket.numel_unpadded for bucket in buffer.buckets]
            shifts = [0, *accumulate(paddings)]
            buffer.param_index_map = {
                param: (start - shifts[bucket], end - shifts[bucket], bucket)
                for param, (start, end, bucket) in buffer.param_index_map.items()
            }
        yield
    finally:
        for buffer, index_map in zip(buffers, padded, strict=True):
            buffer.param_index_map = index_map


def _adamw_optimizers(optimizer: Any) -> Iterator[Any]:
    """The parts of a (chained) megatron optimizer that wrap torch's AdamW."""
    for part in _parts(optimizer):
        if isinstance(part.optimizer, torch.optim.AdamW):
            yield part


def _parts(optimizer: Any) -> list[Any]:
    """The optimizers that a chained one is made of."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def is_sharded(optimizer: Any) -> bool:
    """Whether each data parallel rank has a part of the state only."""
    return any(hasattr(part, "model_param_group_index_map") for part in _parts(optimizer))


def _main_pieces(
    optimizer: Any, values: dict[torch.nn.Parameter, torch.Tensor]
) -> Iterator[tuple[Any, torch.Tensor, torch.Tensor]]:
    """The part that optimizes each parameter, the main tensor this rank has, its piece of the value."""
    for part in _parts(optimizer):
        if not is_sharded(part):
            yield from ((part, getattr(param, "main_param", param), value) for param, value in values.items())
            continue
        for param, (group, index) in part.model_param_group_index_map.items():
            own = part._get_model_param_range_map(param)["param"]
            main = part.optimizer.param_groups[group]["params"][index]
            yield part, main, values[param].reshape(-1)[own.start : own.end]


def set_weights(optimizer: Any, values: dict[torch.nn.Parameter, torch.Tensor]) -> None:
    """Give parameters new values, and their fp32 main parameters the same before they are rounded.

    Args:
        optimizer: what `get_megatron_optimizer` returned; changed in place.
        values: float32, of each parameter's shape; every parameter of the optimizer.
    """
    with torch.no_grad():
        for param, value in values.items():
            param.copy_(value)
    optimizer.reload_model_params()
    for _, main, piece in _main_pieces(optimizer, values):
        main.data.copy_(piece)


MOMENTS = ("exp_avg", "exp_avg_sq")


def set_moment(optimizer: Any, name: str, values: dict[torch.nn.Parameter, torch.Tensor]) -> None:
    """Give one of Adam's moments new values.

    Args:
        optimizer: what `get_megatron_optimizer` returned; changed in place.
        name: one of MOMENTS.
        values: float32, of each parameter's shape; every parameter of the optimizer.
    """
    for part, main, piece in _main_pieces(optimizer, values):
        part.optimizer.state[main][name] = piece.clone()


def set_step(optimizer: Any, step: int) -> None:
    """Set how many steps Adam has made.

    Args:
        optimizer: what `get_megatron_optimizer` returned; changed in place.
        step: 0 or above.
    """
    for part in _parts(optimizer):
        for group in part.optimizer.param_groups:
            if not isinstance(part.optimizer, torch.optim.AdamW):
                # FusedAdam counts per group.
                group["step"] = step
                continue
            for main in group["params"]:
                part.optimizer.state[main]["step"] = torch.tensor(float(step))


def prepare_to_load(optimizer: Any) -> None:
    """Make a fresh optimizer able to build its loading state dict and to take the loaded tensors.

    Call before `sharded_state_dict(is_loading=True)`.

    Args:
        optimizer: what `get_megatron_optimizer` returned; changed in place.
    """
    for part in _adamw_optimizers(optimizer):
        # Without state, the loading state dict fails on `assert len(steps) == 1`.
        for group in part.optimizer.param_groups:
            for param in group["params"]:
                if not part.optimizer.state[param]:
                    part.optimizer.state[param] = {
                        "step": torch.zeros((), dtype=torch.float32),
                        "exp_avg": torch.zeros_like(param),
                        "exp_avg_sq": torch.zeros_like(param),
                    }
        if hasattr(part, "_set_main_param_and_optimizer_states"):
            part._set_main_param_and_optimizer_states = types.MethodType(_set_states, part)


def finish_load(optimizer: Any) -> None:
    """Give every parameter a step counter of its own; call after `load_state_dict`.

    megatron-core loads ONE step tensor shared by all parameters, which AdamW then raises once a parameter:
    training goes on with wrong bias corrections and no error.

    Args:
        optimizer: what `get_megatron_optimizer` returned; changed in place.
    """
    for part in _adamw_optimizers(optimizer):
        for state in part.optimizer.state.values():
            state["step"] = state["step"].clone()


def _set_states(self: Any, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
    """As the method it stands for, without its KeyError on "step", which torch keeps per parameter."""
    group, index = self.model_param_group_index_map[model_param]
    main_param = self.optimizer.param_groups[group]["params"][index]
    destination = {"param": main_param, **self.optimizer.state[main_param]}
    for name, tensor in tensors.items():
        if name != "step":
            destination[name].copy_(tensor)
