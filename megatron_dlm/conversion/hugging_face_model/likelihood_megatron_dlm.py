"""Bound at given noise, and the Monte-Carlo NELBO of each family. B sequences, L tokens."""

import torch
import torch.nn.functional as F

from .noise_megatron_dlm import (
    alpha_and_slope,
    block_mask,
    num_states,
    random_states,
    sequential_mask,
    token_nats,
)


def bound_at_noise(model, noisy_ids, target_ids, weights, sigma=None, position_ids=None, visible_mask=None):
    """float: sum of weight * token cost over the number of tokens of the data."""
    logits = model(noisy_ids, sigma=sigma, position_ids=position_ids, visible_mask=visible_mask).logits
    nats = token_nats(model.config, logits, noisy_ids, target_ids, sigma)
    tokens = noisy_ids.numel() // (1 if visible_mask is None else 2)
    return float((nats * weights).sum() / tokens)


def estimate_nll(model, input_ids, num_samples, seed, t_grid=None):
    """float64 [B] nats of clean sequences; the arguments are those of `MegatronDlmModel.nll`."""
    if t_grid is not None:
        num_samples = len(t_grid)
        for t in t_grid:
            if not 0 < t <= 1:
                raise ValueError(f"t_grid: {t} is outside (0, 1]")
    if num_samples < 1:
        raise ValueError(f"num_samples, t_grid: {num_samples} times; at least one is needed")
    family = model.config.family
    if family == "ar":
        logits = model(input_ids[:, :-1]).logits
        return F.cross_entropy(logits.transpose(1, 2), input_ids[:, 1:], reduction="none").double().sum(1)
    draw = Draws(input_ids, seed, t_grid)
    total = torch.zeros(len(input_ids), dtype=torch.float64, device=input_ids.device)
    for index in range(num_samples):
        if family == "esolm":
            if model.config.alpha_0 > 0:
                total += _esolm_diffusion(model, input_ids, draw, index, num_samples)
            if model.config.alpha_0 < 1:
                total += _esolm_sequential(model, input_ids, draw)
        else:
            sample = {"mdlm": _mdlm, "duo": _duo, "block-diffusion": _block_diffusion}[family]
            total += sample(model, input_ids, draw, index, num_samples)
    return total / num_samples


class Draws:
    """Seeded draws, made on the CPU so that every device gets the same."""

    def __init__(self, input_ids, seed, t_grid=None):
        self.generator = torch.Generator().manual_seed(seed)
        self.shape, self.device = input_ids.shape, input_ids.device
        self.t_grid = t_grid

    def uniform(self, *shape):
        """float64 in [0, 1)."""
        return torch.rand(shape, generator=self.generator, dtype=torch.float64).to(self.device)

    def times(self, config, index, num_samples, columns=1):
        """float64 [B, columns] in stratum `index` of `num_samples`, or that time of the grid."""
        if self.t_grid is not None:
            shape = (self.shape[0], columns)
            return torch.full(shape, float(self.t_grid[index]), dtype=torch.float64, device=self.device)
        strata = (self.uniform(self.shape[0], columns) + index) / num_samples
        return config.time_epsilon + (1 - config.time_epsilon) * strata


def _masked(model, ids, draw, times):
    """Noisy ids, where they are masked, and the NELBO's weights; times are [B, 1] or [B, L]."""
    alpha, slope = alpha_and_slope(model.config, times)
    masked = draw.uniform(*ids.shape) < 1 - alpha
    return torch.where(masked, model.config.mask_token_id, ids), masked, masked * -slope / (1 - alpha), alpha


def _mdlm(model, ids, draw, index, num_samples):
    noisy, _, weights, alpha = _masked(model, ids, draw, draw.times(model.config, index, num_samples))
    sigma = -alpha[:, 0].log().float() if model.config.time_conditioning else None
    logits = model(noisy, sigma=sigma).logits
    return (token_nats(model.config, logits, noisy, ids, sigma) * weights).sum(1)


def _duo(model, ids, draw, index, num_samples):
    alpha, slope = alpha_and_slope(model.config, draw.times(model.config, index, num_samples))
    drawn = random_states(model.config, ids.shape, draw.generator).to(ids.device)
    noisy = torch.where(draw.uniform(*ids.shape) < 1 - alpha, drawn, ids)
    sigma = -alpha[:, 0].log()
    logits = model(noisy, sigma=sigma.float()).logits
    weights = -slope / (num_states(model.config) * alpha)
    return (token_nats(model.config, logits, noisy, ids, sigma) * weights).sum(1)


def _esolm_diffusion(model, ids, draw, index, num_samples):
    noisy, masked, weights, _ = _masked(model, ids, draw, draw.times(model.config, index, num_samples))
    order = (masked + 0.9 * draw.uniform(*ids.shape)).argsort(1)
    noisy, targets, weights = (x.gather(1, order) for x in (noisy, ids, weights))
    logits = model(noisy, position_ids=order).logits
    return (token_nats(model.config, logits, noisy, targets, None) * weights).sum(1)


def _esolm_sequential(model, ids, draw):
    length = ids.shape[1]
    masked = draw.uniform(*ids.shape) < 1 - model.config.alpha_0
    places = torch.arange(length, device=ids.device)
    order = torch.where(masked, 1.0 + places, 0.9 * draw.uniform(*ids.shape)).argsort(1)
    noisy = torch.where(masked, model.config.mask_token_id, ids)
    noisy, targets, masked = (x.gather(1, order) for x in (noisy, ids, masked))
    logits = model(
        torch.cat([noisy, targets], dim=1),
        position_ids=torch.cat([order, order], dim=1),
        visible_mask=sequential_mask(length, ids.device),
    ).logits[:, :length]
    return (token_nats(model.config, logits, noisy, targets, None) * masked).sum(1)


def _block_diffusion(model, ids, draw, index, num_samples):
    length, size = ids.shape[1], model.config.block_size
    times = draw.times(model.config, index, num_samples, -(-length // size)).repeat_interleave(size, dim=1)
    noisy, _, weights, _ = _masked(model, ids, draw, times[:, :length])
    places = torch.arange(length, device=ids.device)[None]
    logits = model(
        torch.cat([noisy, ids], dim=1),
        position_ids=torch.cat([places, places], dim=1),
        visible_mask=block_mask(length, size, ids.device),
    ).logits[:, :length]
    return (token_nats(model.config, logits, noisy, ids, None) * weights).sum(1)
