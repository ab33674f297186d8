"""Training targets of diffusion: weights, reordering, and doubling with a clean copy ([x_t ; x_0])."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_dlm.diffusion.noisy_then_clean import noisy_then_clean_mask
from megatron_dlm.interfaces import ModelInputs, Targets


def masked_targets(
    clean_BL: NDArray[np.int64],
    noisy_BL: NDArray[np.int64],
    masked_BL: NDArray[np.bool_],
    alpha_BL: NDArray[np.float64],
    dalpha_BL: NDArray[np.float64],
    *,
    token_count: int,
    low_variance: bool,
) -> Targets:
    """Targets of absorbing-state diffusion: masked tokens, weighted -alpha'/(1 - alpha) in the NELBO.

    Args:
        clean_BL: int64 [B, L].
        noisy_BL: int64 [B, L].
        masked_BL: bool [B, L], True where the token is masked.
        alpha_BL: float64 [B, L] or [B, 1], probability that a token stays clean.
        dalpha_BL: float64, d alpha / dt in alpha's shape.
        token_count: tokens that the sum of losses is divided by.
        low_variance: train with weight 1 instead (arXiv:2602.15014 eq. 8).

    Returns:
        Targets over the L positions.
    """
    bound_BL = np.where(masked_BL, -dalpha_BL / (1.0 - alpha_BL), 0.0)
    targets = weighted_targets(clean_BL, noisy_BL, alpha_BL, bound_BL, token_count=token_count)
    if not low_variance:
        return targets
    return replace(targets, weight_BL=torch.from_numpy(masked_BL.astype(np.float64)))


def weighted_targets(
    clean_BL: NDArray[np.int64],
    noisy_BL: NDArray[np.int64],
    alpha_BL: NDArray[np.float64],
    weight_BL: NDArray[np.float64],
    *,
    token_count: int,
) -> Targets:
    """Targets that train with the NELBO's own weights.

    Args:
        clean_BL: int64 [B, L].
        noisy_BL: int64 [B, L].
        alpha_BL: float64 [B, L] or [B, 1].
        weight_BL: float64 [B, L], weight of each token in the NELBO.
        token_count: tokens that the sum of losses is divided by.

    Returns:
        Targets over the L positions.
    """
    weight = torch.from_numpy(weight_BL)
    return Targets(
        clean_BL=torch.from_numpy(clean_BL),
        noisy_BL=torch.from_numpy(noisy_BL),
        alpha_BL=torch.from_numpy(np.broadcast_to(alpha_BL, clean_BL.shape).copy()),
        weight_BL=weight,
        bound_weight_BL=weight,
        token_count=token_count,
    )


def reordered(targets: Targets, order_BL: NDArray[np.int64]) -> Targets:
    """The targets with their positions in the order of `order_BL` (int64 [B, L], a permutation a row)."""
    order = torch.from_numpy(order_BL)
    return targets.each(lambda values_BL: values_BL.gather(1, order))


def scaled(targets: Targets, factor: float) -> Targets:
    """The targets with both weights times `factor`."""
    return replace(
        targets,
        weight_BL=targets.weight_BL * factor,
        bound_weight_BL=targets.bound_weight_BL * factor,
    )


def append_clean(targets: Targets, position_ids: Tensor, *, block_size: int) -> tuple[ModelInputs, Targets]:
    """Inputs [noisy ; clean] and targets of the same 2 L positions; the clean half carries no loss.

    Args:
        targets: targets over the L positions of the noisy half.
        position_ids: int64 [B, L] or [1, L], position ids of each half.
        block_size: tokens per block; the noisy tokens of a block attend to each other.

    Returns:
        Inputs and targets of one microbatch.
    """
    clean_BL = targets.clean_BL
    nothing = torch.zeros_like(targets.weight_BL)
    inputs = ModelInputs(
        token_ids_BL=torch.cat([targets.noisy_BL, clean_BL], dim=1),
        position_ids_BL=torch.cat([position_ids, position_ids], dim=1),
        sigma_B=torch.zeros(len(clean_BL)),
        attention_mask=noisy_then_clean_mask(clean_BL.shape[1], block_size),
    )
    doubled = Targets(
        clean_BL=torch.cat([clean_BL, clean_BL], dim=1),
        noisy_BL=inputs.token_ids_BL,
        alpha_BL=torch.cat([targets.alpha_BL, torch.ones_like(nothing)], dim=1),
        weight_BL=torch.cat([targets.weight_BL, nothing], dim=1),
        bound_weight_BL=torch.cat([targets.bound_weight_BL, nothing], dim=1),
        token_count=targets.token_count,
    )
    return inputs, doubled
