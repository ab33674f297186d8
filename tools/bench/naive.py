"""The plain way: full logits over all rows and losses under autograd, as the paper's repository has them.

Written from the formulas, not from the package's losses; the other side of tools/bench/step.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dlm.interfaces import Targets


def naive_loss(
    family: str,
    hidden_sbD: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Targets,
    mask_token_id: int,
    tokens: int,
) -> Tensor:
    """Mean training loss of one microbatch, differentiable.

    Args:
        family: name of the objective.
        hidden_sbD: [s, b, D] output of the final layer.
        weight: [V, D] of the head.
        bias: [V].
        targets: of the microbatch.
        mask_token_id: never predicted.
        tokens: divisor of the sum.

    Returns:
        A float32 scalar.
    """
    logits = F.linear(hidden_sbD.transpose(0, 1), weight, bias)
    return naive_loss_of_logits(family, logits, targets, mask_token_id, tokens)


def naive_loss_of_logits(
    family: str, logits: Tensor, targets: Targets, mask_token_id: int, tokens: int
) -> Tensor:
    """Mean training loss from [b, s, V] logits of any dtype; targets on the same device."""
    column = torch.zeros(logits.shape[-1], device=logits.device)
    column[mask_token_id] = -1e6
    logits = logits.float() + column
    if family == "duo":
        nats = duo_nelbo(logits, targets)
        return (nats * targets.weight_BL.float() * logits.shape[-1]).sum() / tokens
    nats = F.cross_entropy(logits.flatten(0, 1), targets.clean_BL.flatten(), reduction="none")
    return (nats * targets.weight_BL.flatten().float()).sum() / tokens


def duo_nelbo(logits: Tensor, targets: Targets) -> Tensor:
    """[B, L] T2 - T1 over V, to be weighted by -alpha' / alpha; float32 and full [B, L, V] tensors."""
    vocabulary_size = logits.shape[-1]
    x_theta = logits.log_softmax(-1).exp()
    alpha = targets.alpha_BL.float()[..., None]
    mixed = vocabulary_size * alpha * x_theta + 1 - alpha
    log_mixed = mixed.log()
    alpha = alpha[..., 0]
    same = (targets.noisy_BL == targets.clean_BL).float()
    k = (1 - alpha) / (vocabulary_size * alpha + 1 - alpha)
    s = log_mixed.sum(-1)
    at_noisy = mixed.gather(-1, targets.noisy_BL[..., None])[..., 0]
    a = log_mixed.gather(-1, targets.noisy_BL[..., None])[..., 0]
    b = log_mixed.gather(-1, targets.clean_BL[..., None])[..., 0]
    t1 = vocabulary_size * (1 / (1 - alpha + vocabulary_size * alpha * same) - 1 / at_noisy)
    t2 = -(same * k + 1 - same) * (s - vocabulary_size * a)
    t2 = t2 - (1 - same) * (vocabulary_size * alpha / (1 - alpha)) * (b - a)
    t2 = t2 + ((vocabulary_size - 1) * k * same - (1 - same) / k) * k.log()
    return (t2 - t1) / vocabulary_size
