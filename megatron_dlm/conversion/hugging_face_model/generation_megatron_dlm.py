"""Sampling of each family. B sequences, L tokens, V ids; prompts are kept."""

import itertools

import torch
import torch.nn.functional as F

from .noise_megatron_dlm import alpha_and_slope, num_states, random_states

LAST_TIME = 1e-5


def sample(model, prompt, max_length, num_steps, temperature, seed):
    """int64 [B, max_length] from a prompt [B, P]."""
    sampler = {
        "ar": _ar,
        "mdlm": _mdlm,
        "duo": _duo,
        "esolm": _esolm,
        "block-diffusion": _block_diffusion,
    }[model.config.family]
    generator = torch.Generator().manual_seed(seed)
    return sampler(model, prompt, max_length, num_steps, temperature, generator)


def _times(num_steps):
    """A linear grid from 1 to almost 0, and 0."""
    grid = torch.linspace(1, LAST_TIME, num_steps + 1, dtype=torch.float64)
    return torch.cat([grid, grid.new_zeros(1)])


def _ar(model, ids, max_length, num_steps, temperature, generator):
    while ids.shape[1] < max_length:
        logits = model(ids).logits[:, -1].double() / temperature
        ids = torch.cat([ids, draw(logits.softmax(-1), generator)[:, None]], dim=1)
    return ids


def _mdlm(model, prompt, max_length, num_steps, temperature, generator):
    """Ancestral sampling; the last step fills what is still masked."""
    ids = F.pad(prompt, (0, max_length - prompt.shape[1]), value=model.config.mask_token_id)
    for t, s in itertools.pairwise(_times(num_steps)):
        (alpha_t, _), (alpha_s, _) = alpha_and_slope(model.config, t), alpha_and_slope(model.config, s)
        # Of the tokens masked at t, those masked at s < t as well.
        stay = (1 - alpha_s) / (1 - alpha_t)
        keep = torch.rand(ids.shape, generator=generator, dtype=torch.float64) < stay
        reveal = (ids == model.config.mask_token_id) & ~keep.to(ids.device)
        if reveal.any():
            sigma = None
            if model.config.time_conditioning:
                sigma = (-alpha_t.log()).float().to(ids.device).expand(len(ids))
            logits = model(ids, sigma=sigma).logits[reveal].double() / temperature
            ids[reveal] = draw(logits.softmax(-1), generator)
    return ids


def _duo(model, prompt, max_length, num_steps, temperature, generator):
    """Ancestral sampling from the exact posterior; every position is drawn anew in every step."""
    config, device = model.config, prompt.device
    ids = random_states(config, (len(prompt), max_length), generator).to(device)
    for t, s in itertools.pairwise(_times(num_steps).to(device)):
        ids[:, : prompt.shape[1]] = prompt
        (alpha_t, _), (alpha_s, _) = alpha_and_slope(config, t), alpha_and_slope(config, s)
        sigma = -alpha_t.clamp_min(1e-9).log().float().expand(len(ids))
        p = (model(ids, sigma=sigma).logits.double() / temperature).softmax(-1)
        weights = posterior_weights(config, ids, p, alpha_t, alpha_s)
        ids = draw(weights.flatten(0, 1), generator).view(ids.shape)
    ids[:, : prompt.shape[1]] = prompt
    return ids


def posterior_weights(config, ids, p, alpha_t, alpha_s):
    """Uniform-state diffusion's q(z_s | z_t, prediction p), float64 [B, L, V], not normalised."""
    states, ratio = num_states(config), alpha_t / alpha_s
    is_state = torch.ones(config.vocab_size, dtype=torch.float64, device=ids.device)
    if not config.mask_in_noise:
        is_state[config.mask_token_id] = 0
    weights = (alpha_s - alpha_t) * p + (1 - ratio) * (1 - alpha_s) / states * is_state
    seen = p.gather(-1, ids[..., None])
    return weights.scatter_add_(-1, ids[..., None], states * alpha_t * seen + ratio - alpha_t)


def _esolm(model, prompt, max_length, num_steps, temperature, generator):
    """A random order in groups, as many as the schedule unmasks in a step; then left to right one by one."""
    config, batch_size = model.config, len(prompt)
    known = prompt.shape[1]
    order = torch.stack([torch.randperm(max_length - known, generator=generator) for _ in range(batch_size)])
    sizes = _group_sizes(config, max_length - known, num_steps, generator)
    by_diffusion = sum(sizes)
    order = torch.cat([order[:, :by_diffusion], order[:, by_diffusion:].sort(1).values], dim=1) + known
    start = torch.arange(known).expand(batch_size, known)
    order = torch.cat([start, order], dim=1).to(prompt.device)
    ids = prompt
    for size in sizes + [1] * (max_length - known - by_diffusion):
        masks = ids.new_full((batch_size, size), config.mask_token_id)
        seen = torch.cat([ids, masks], dim=1)
        logits = model(seen, position_ids=order[:, : seen.shape[1]]).logits[:, -size:]
        drawn = draw((logits.double() / temperature).softmax(-1).flatten(0, 1), generator)
        ids = torch.cat([ids, drawn.view(batch_size, size)], dim=1)
    return torch.empty_like(ids).scatter_(1, order, ids)


def _group_sizes(config, count, num_steps, generator):
    """How many of `count` tokens each diffusion step reveals, empty steps left out."""
    sizes, left = [], count
    times = [*torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)]
    for t, s in itertools.pairwise(times):
        (alpha_t, _), (alpha_s, _) = alpha_and_slope(config, t), alpha_and_slope(config, s)
        share = (alpha_s - alpha_t) / (1 - alpha_t)
        size = int((torch.rand(left, generator=generator, dtype=torch.float64) < share).sum())
        sizes += [size] if size else []
        left -= size
    return sizes


def _block_diffusion(model, prompt, max_length, num_steps, temperature, generator):
    """Block after block, each by ancestral sampling given the blocks before it."""
    config, size = model.config, model.config.block_size
    ids = F.pad(prompt, (0, max_length - prompt.shape[1]), value=config.mask_token_id)
    for start in range(prompt.shape[1] // size * size, max_length, size):
        stop = min(start + size, max_length)
        block = torch.arange(stop, device=ids.device) // size
        visible = block[:, None] >= block
        for t, s in itertools.pairwise(_times(max(1, num_steps * size // max_length))):
            (alpha_t, _), (alpha_s, _) = alpha_and_slope(config, t), alpha_and_slope(config, s)
            keep = torch.rand(len(ids), stop - start, generator=generator, dtype=torch.float64)
            keep = keep < (1 - alpha_s) / (1 - alpha_t)
            reveal = (ids[:, start:stop] == config.mask_token_id) & ~keep.to(ids.device)
            if reveal.any():
                logits = model(ids[:, :stop], visible_mask=visible).logits[:, start:][reveal]
                ids[:, start:stop][reveal] = draw((logits.double() / temperature).softmax(-1), generator)
    return ids


def draw(probabilities, generator):
    """One id per row of float64 [N, V] weights, by the inverse of the cumulative distribution."""
    cumulative = probabilities.cumsum(-1)
    uniform = torch.rand(len(probabilities), 1, generator=generator, dtype=torch.float64)
    target = uniform.to(cumulative.device) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=probabilities.shape[-1] - 1)
