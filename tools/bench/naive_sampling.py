"""Samplers as the published code writes them: the side that ours are measured and tested against.

The network reads all rows in every step and gives all logits; noise is a [B, L, V] buffer; AR keeps keys
without their rotation and rotates all of them anew for each token. `model` is an exported model.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

GUARD = 1e-10


def race(weights: Tensor, uniform: Tensor) -> Tensor:
    """Ids drawn from weights [..., V]."""
    return (weights / (GUARD - (uniform + GUARD).log())).argmax(-1)


def alpha(t: float) -> float:
    """Share of tokens that are clean at time t, log-linear."""
    return 1 - 0.999 * t


def times(steps: int) -> list[float]:
    """Times of the steps' edges, from 1 down, and 0 for the last step that takes all noise away."""
    return [*torch.linspace(1, 1e-5, steps + 1, dtype=torch.float64).tolist(), 0.0]


@torch.no_grad()
def mdlm(model: Any, batch: int, length: int, steps: int, generator: torch.Generator) -> Tensor:
    """MDLM's ancestral sampler; int64 [batch, length], as from all of these."""
    mask = model.config.mask_token_id
    ids = torch.full((batch, length), mask)
    for index, (t, s) in enumerate(itertools.pairwise(times(steps))):
        p = model(ids).logits.double().softmax(-1)
        alpha_s = 1.0 if index == steps else alpha(s)
        weights = (alpha_s - alpha(t)) * p
        weights[..., mask] = 1 - alpha_s
        drawn = race(weights, torch.rand(weights.shape, dtype=torch.float64, generator=generator))
        ids = torch.where(ids == mask, drawn, ids)
    return ids


@torch.no_grad()
def duo(model: Any, batch: int, length: int, steps: int, generator: torch.Generator) -> Tensor:
    """Duo's ancestral sampler."""
    size = model.config.vocab_size
    ids = torch.randint(size, (batch, length), generator=generator)
    for index, (t, s) in enumerate(itertools.pairwise(times(steps))):
        alpha_t, alpha_s = alpha(t), 1.0 if index == steps else alpha(s)
        p = model(ids, sigma=torch.full((batch,), -math.log(alpha_t))).logits.double().softmax(-1)
        here = torch.nn.functional.one_hot(ids, size).double()
        ratio = alpha_t / alpha_s
        q = size * alpha_t * p * here + (ratio - alpha_t) * here
        q = q + (alpha_s - alpha_t) * p + (1 - ratio) * (1 - alpha_s) / size
        q = q / (size * alpha_t * p.gather(-1, ids[..., None]) + 1 - alpha_t)
        ids = race(q, torch.rand(q.shape, dtype=torch.float64, generator=generator))
    return ids


@torch.no_grad()
def esolm(model: Any, batch: int, length: int, steps: int, generator: torch.Generator) -> Tensor:
    """`steps` columns in random order, all that is known read again for each."""
    mask, width = model.config.mask_token_id, length // steps
    gumbel = -(-(torch.rand(batch, length, model.config.vocab_size, generator=generator) + GUARD).log()).log()
    columns = torch.rand(batch, steps, generator=generator).argsort(1)
    order = (columns[:, :, None] + torch.arange(width) * steps).flatten(1)
    ids = torch.empty(batch, 0, dtype=torch.int64)
    for step in range(steps):
        seen = torch.cat([ids, torch.full((batch, width), mask)], dim=1)
        logits = model(seen, position_ids=order[:, : seen.shape[1]]).logits[:, -width:]
        drawn = (logits + gumbel[:, step * width : (step + 1) * width]).argmax(-1)
        ids = torch.cat([ids, drawn], dim=1)
    return torch.empty_like(ids).scatter_(1, order, ids)


@torch.no_grad()
def ar(model: Any, batch: int, length: int, steps: int, generator: torch.Generator) -> Tensor:
    """Left to right behind a cache; `steps` is not used."""
    from megatron_dlm.conversion.hugging_face_model.network_megatron_dlm import modulation, rotate

    config = model.config
    gumbel = (
        -(-(torch.rand(batch, length, config.vocab_size, generator=generator) + GUARD).log()).log().double()
    )
    ids = torch.full((batch, 1), config.bos_token_id)
    conditioning = model.sigma_map(torch.zeros(batch))
    cos, sin = model._rotary(torch.arange(length)[None])
    keys, values = ([torch.empty(0)] * len(model.blocks) for _ in range(2))
    for place in range(length - 1):
        x = model.vocab_embed(ids[:, -1:]).float()
        for index, block in enumerate(model.blocks):
            shift1, scale1, gate1, shift2, scale2, gate2 = modulation(block.adaLN_modulation, conditioning, 6)
            h = block.norm1(x) * (1 + scale1) + shift1
            q, k, v = block.attn_qkv(h).unflatten(-1, (3, block.heads, -1)).permute(2, 0, 3, 1, 4)
            keys[index] = torch.cat([keys[index], k], dim=2) if place else k
            values[index] = torch.cat([values[index], v], dim=2) if place else v
            q = rotate(q, cos[:, :, place : place + 1], sin[:, :, place : place + 1])
            k = rotate(keys[index], cos[:, :, : place + 1], sin[:, :, : place + 1])
            attended = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ values[index]
            x = x + gate1 * block.attn_out(attended.transpose(1, 2).flatten(2))
            h = block.norm2(x) * (1 + scale2) + shift2
            x = x + gate2 * block.mlp(h)
        logits = model.head(model.output_layer(x, conditioning))[:, -1].double()
        ids = torch.cat([ids, (logits + gumbel[:, place + 1]).argmax(-1, keepdim=True)], dim=1)
    return ids


NAIVE = {"ar": ar, "mdlm": mdlm, "duo": duo, "esolm": esolm}
