"""Noise schedules, corruptions and per-token losses of the families; torch alone.

B sequences, L tokens, V ids. t in [0, 1], 0 clean; alpha is the probability that a token is still clean.
"""

import math

import torch
import torch.nn.functional as F

LOG_LINEAR_END = 1e-3


def alpha_and_slope(config, t):
    """alpha_t and d alpha / dt of float64 t."""
    if config.noise_schedule == "log-linear":
        alpha, slope = 1 - (1 - LOG_LINEAR_END) * t, torch.full_like(t, -(1 - LOG_LINEAR_END))
    elif config.noise_schedule == "linear":
        alpha, slope = 1 - t, -torch.ones_like(t)
    else:
        angle = math.pi / 4 * (1 - t)
        alpha, slope = 2 * angle.sin() ** 2, -math.pi / 2 * (2 * angle).sin()
    return config.alpha_0 * alpha, config.alpha_0 * slope


def num_states(config):
    """States that Duo's noise draws from."""
    return config.vocab_size if config.mask_in_noise else config.vocab_size - 1


def random_states(config, shape, generator):
    """Uniform ids of Duo's noise, on the CPU."""
    ids = torch.randint(num_states(config), shape, generator=generator)
    return ids if config.mask_in_noise else ids + (ids >= config.mask_token_id)


def token_nats(config, logits, noisy_ids, target_ids, sigma):
    """float64 [B, L]: what each position costs before its weight in the bound.

    Cross-entropy; for Duo the divergence of arXiv:2506.10892, to be weighted by -alpha' / (K alpha).
    """
    if config.family != "duo":
        return F.cross_entropy(logits.transpose(1, 2), target_ids, reduction="none").double()
    rows = zip(logits, noisy_ids, target_ids, sigma.double(), strict=True)
    return torch.stack([uniform_divergence(num_states(config), *row) for row in rows])


def uniform_divergence(states, logits, noisy, clean, sigma):
    """float64 [L] from logits [L, V], ids [L] and one sequence's sigma."""
    p = logits.double().softmax(-1)
    alpha, left = (-sigma).exp(), -(-sigma).expm1()
    mixed = states * alpha * p + left
    # Ids that are no state (the mask, where the noise leaves it out) are not in the sum.
    s = (mixed / left).log().sum(-1) + states * left.log()
    at_noisy = mixed.gather(-1, noisy[:, None])[:, 0]
    at_clean = mixed.gather(-1, clean[:, None])[:, 0]
    same = noisy == clean
    k = left / (states * alpha + left)
    first = states * (1 / (left + states * alpha * same) - 1 / at_noisy)
    second = -torch.where(same, k, torch.ones_like(k)) * (s - states * at_noisy.log())
    replaced = -(states * alpha / left) * (at_clean.log() - at_noisy.log()) - k.log() / k
    second = second + torch.where(same, (states - 1) * k * k.log(), replaced)
    return second - first


def sequential_mask(length, device):
    """Eso-LM's [z ; x]: z sees itself and earlier x, x sees x up to itself; bool [2 L, 2 L]."""
    return block_mask(length, 1, device)


def block_mask(length, block_size, device):
    """Block diffusion's [x_t ; x_0]: own noisy block and earlier clean ones; bool [2 L, 2 L]."""
    block = torch.arange(length, device=device) // block_size
    same, earlier = block[:, None] == block, block[:, None] > block
    noisy = torch.cat([same, earlier], dim=1)
    return torch.cat([noisy, torch.cat([torch.zeros_like(same), same | earlier], dim=1)])
