"""megatron-core's optimizers, sharded over data parallel ranks or not, seen parameter by parameter."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from megatron.core.fp8_utils import post_all_gather_processing
from megatron.core.optimizer import clip_grads
from megatron.core.utils import local_multi_tensor_l2_norm
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatron_dlm.platform.fp8_weights import is_fp8
from megatron_dlm.platform.fully_sharded import local, own_range
from megatron_dlm.platform.megatron import own_elements, round_main_weights

MOMENTS = ("exp_avg", "exp_avg_sq")
AVERAGE = "ema"
"""Entry of the optimizer's state with the moving average of a main parameter."""


def _parts(optimizer: Any) -> list[Any]:
    """The optimizers that a chained one is made of."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def is_sharded(optimizer: Any) -> bool:
    """Whether each data parallel rank has a part of the state only."""
    return any(
        _is_distributed(part) or any(isinstance(main, DTensor) for main in part.get_parameters())
        for part in _parts(optimizer)
    )


def _is_distributed(part: Any) -> bool:
    return hasattr(part, "model_param_group_index_map")


def keep_norms_on_device() -> None:
    """Let megatron-core's gradient norm read one number from the GPU, not one of each tensor.

    Its own way, where neither Transformer Engine nor apex is installed (0.16.1); the bits are the same.
    """
    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = _l2_norm


def _l2_norm(chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], *unused: Any) -> Any:
    """As `local_multi_tensor_l2_norm`: float32 [1], and nothing."""
    norms = torch.stack([torch.norm(tensor) for tensors in tensor_lists for tensor in tensors])
    return torch.norm(norms)[None], None


def main_pieces(
    optimizer: Any, parameters: Collection[torch.nn.Parameter]
) -> Iterator[tuple[Any, torch.nn.Parameter, Tensor, int, int]]:
    """The shard of each parameter that this rank optimizes.

    Args:
        optimizer: optimizer from `get_megatron_optimizer`.
        parameters: parameters to look up.

    Yields:
        The (inner) optimizer, the parameter, this rank's shard of its float32 main parameter (or a main
        parameter sharded like the parameter), and start and end of the shard in the parameter's elements.
    """
    for part in _parts(optimizer):
        if not _is_distributed(part):
            for param in parameters:
                yield part, param, getattr(param, "main_param", param), *own_range(param)
            continue
        for param, (group, index) in part.model_param_group_index_map.items():
            if param not in parameters:
                continue
            main = part.optimizer.param_groups[group]["params"][index]
            yield part, param, main, *own_elements(part, param)


def state_of(part: Any, main: Tensor) -> dict[str, Tensor]:
    """Adam state of one main parameter; created with zeros if Adam has not stepped yet.

    Args:
        part: inner optimizer from `main_pieces`.
        main: main parameter from `main_pieces`.

    Returns:
        The state itself, not a copy, by name: MOMENTS and, with torch's AdamW, `step`.
    """
    state: dict[str, Tensor] = part.optimizer.state[main]
    if not state:
        state.update({name: torch.zeros_like(main) for name in MOMENTS})
        if isinstance(part.optimizer, torch.optim.AdamW):
            state["step"] = torch.zeros(())
    return state


def average_weights(optimizer: Any, decay: float, step: int) -> None:
    """Move the averages of the weights towards the weights; those of the first step are the weights.

    Args:
        optimizer: what `get_megatron_optimizer` returned; its state keeps the averages, sharded like moments.
        decay: share of an average that stays, in (0, 1).
        step: optimizer steps done; early ones keep (1 + step) / (10 + step) if that is less.
    """
    averages, weights = [], []
    for part in _parts(optimizer):
        for group in part.optimizer.param_groups:
            for main in group["params"]:
                averages.append(local(average_of(part, main)))
                weights.append(local(main.detach()))
    torch._foreach_lerp_(averages, weights, 1.0 - min(decay, (1 + step) / (10 + step)))


def average_of(part: Any, main: Tensor) -> Tensor:
    """The moving average of a main parameter, created as a copy of it.

    Args:
        part: inner optimizer from `main_pieces`.
        main: main parameter from `main_pieces`.

    Returns:
        The average itself, not a copy.
    """
    state = state_of(part, main)
    if AVERAGE not in state:
        state[AVERAGE] = main.detach().clone()
    return state[AVERAGE]


def step_count(optimizer: Any) -> int:
    """How many steps Adam has made."""
    for part in _parts(optimizer):
        for group in part.optimizer.param_groups:
            for main in group["params"]:
                # FusedAdam counts per group.
                return int(group.get("step", state_of(part, main).get("step", 0)))
    return 0


def set_step_count(optimizer: Any, step: int) -> None:
    """Set how many steps Adam has made.

    Args:
        optimizer: what `get_megatron_optimizer` returned; changed in place.
        step: 0 or above.
    """
    for part in _parts(optimizer):
        for group in part.optimizer.param_groups:
            if not isinstance(part.optimizer, torch.optim.AdamW):
                group["step"] = step
                continue
            for main in group["params"]:
                state_of(part, main)["step"] = torch.tensor(float(step))


def complete_weights(optimizer: Any) -> None:
    """Gather the updated weights now, which overlap_param_gather would leave to the next forward pass.

    Args:
        optimizer: what `get_megatron_optimizer` returned; all ranks call it.
    """
    for part in _parts(optimizer):
        if _is_distributed(part) and part.ddp_config.overlap_param_gather:
            _gather(part)


def _gather(part: Any) -> None:
    for chunk in part.model_chunks:
        chunk.start_param_sync(force_sync=True)
        if chunk.ddp_config.overlap_param_gather:
            # What megatron-core leaves to the next forward pass, which then thinks that all is done.
            fp8 = [parameter for parameter in chunk.parameters() if is_fp8(parameter)]
            if fp8:
                post_all_gather_processing(fp8)


def weights_from_main(optimizer: Any) -> None:
    """Make FP8 weights of the main weights again, as each step does; others are what was loaded.

    Args:
        optimizer: what `get_megatron_optimizer` returned; all ranks call it.
    """
    for part in _parts(optimizer):
        if _is_distributed(part) and any(map(is_fp8, part.model_param_group_index_map)):
            round_main_weights(part)
            _gather(part)


def set_weights(optimizer: Any, values: dict[torch.nn.Parameter, Tensor]) -> None:
    """Give parameters new values, and their fp32 main parameters the same before they are rounded.

    Args:
        optimizer: what `get_megatron_optimizer` returned; changed in place.
        values: float32, of each parameter's shape; every parameter of the optimizer.
    """
    with torch.no_grad():
        for param, value in values.items():
            if is_fp8(param):
                param.copy_(value)
                continue
            start, end = own_range(param)
            local(param).view(-1).copy_(value.reshape(-1)[start:end])
    optimizer.reload_model_params()
    for _, param, main, start, end in main_pieces(optimizer, values):
        local(main).data.view(-1).copy_(values[param].reshape(-1)[start:end])
