"""Recorded tables that belong to no family: times, learning rates, step counts, plans, draws."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from megatron_dlm.data.loading.data_config import microbatch_positions
from megatron_dlm.diffusion.context import CorruptionContext
from megatron_dlm.diffusion.noise_schedules import alpha_and_slope
from megatron_dlm.diffusion.time_sampling import stratified_times
from megatron_dlm.run.lr_schedule import LrScheduleConfig
from megatron_dlm.sampling.categorical import keep_nucleus
from megatron_dlm.sampling.decoding_plan import Part, block_autoregressive_part, block_part, reveal_shares
from tools.oracle.draws import exponential_race
from tools.oracle.noise import TIME_EPSILON, Array, RecordedNoise

GLOBAL_BATCH_SIZE = 256
"""Global batch size of the recorded step counts."""
STEP_COUNT_LENGTH = 256
"""Tokens of the recorded Eso-LM step counts, where the file does not show it."""
SEEDS_TRIED = 1000


def table_method(key: str, a: dict[str, Array]) -> Callable[[], Any]:
    """How to compute `key`.

    Args:
        key: for example "lr/iso/lr".
        a: the recorded arrays of its area, by what follows the area's name.

    Returns:
        A function of nothing.

    Raises:
        KeyError: unknown key.
    """
    area, _, name = key.partition("/")
    if area == "tsplit" and (found := re.fullmatch(r"n(\d+)_d(\d+)_a(\d+)", name)):
        return partial(_split_times, a["u"], a["shape"], *map(int, found.groups()))
    if area == "lr" and (found := re.fullmatch(r"(\w+)/lr", name)):
        return partial(_learning_rates, a[f"{found[1]}/cfg"], a[f"{found[1]}/step"])
    if area == "eso_steps" and (found := re.fullmatch(r"a([\d.]+)", name)):
        return partial(_reveal_sizes, float(found[1]), a)
    if area == "topp" and (found := re.fullmatch(r"out_(renorm_)?([\d.]+)", name)):
        return partial(_nucleus, a["logits"], float(found[2]), renormalise=found[1] is not None)
    return {
        "steps/max_steps": lambda: _step_counts(a["names"], a["budgets_1e18"]),
        "block/order": lambda: np.stack([block_part(row, int(a["T_P"][1]))[0] for row in a["u"]]),
        "block/unmask_k": lambda: _sizes(block_part(a["u"][0], int(a["T_P"][1]))),
        "blockar/order": lambda: np.tile(
            block_autoregressive_part(*a["T_S_P"].tolist())[0], (len(a["order"]), 1)
        ),
        "blockar/unmask_k": lambda: _sizes(block_autoregressive_part(*a["T_S_P"].tolist())),
        "cat/x": lambda: exponential_race(a["p"], a["u"]),
        "temb/emb": lambda: _sinusoid(a["sigma"]),
    }[key]


def _sizes(part: Part) -> Array:
    """Tokens that each step reveals."""
    return np.bincount(part[1])


def _split_times(jitter: Array, shape: Array, node: int, device: int, micro_step: int) -> Array:
    """Times of one micro-step of one device, which is data parallel rank node * devices + device."""
    samples, nodes, devices, micro_steps = map(int, shape)
    context = CorruptionContext(
        noise=RecordedNoise(0, draws={"time/jitter": jitter}),
        step=0,
        batch_start=0,
        global_batch_size=samples,
        training=True,
    )
    microbatches = microbatch_positions(
        0,
        global_batch_size=samples,
        micro_batch_size=samples // (nodes * devices * micro_steps),
        data_rank=node * devices + device,
        data_size=nodes * devices,
    )
    positions = list(microbatches)[micro_step]
    return stratified_times(positions, context, time_epsilon=TIME_EPSILON, order="reference")[:, 0]


def _learning_rates(cfg: Array, steps: Array) -> Array:
    total, warmup, low, high = cfg.tolist()
    schedule = LrScheduleConfig(lr=high, min_lr=low, warmup_steps=int(warmup), decay_steps=int(total))
    return np.array([schedule.at(int(step)) for step in steps])


def _step_counts(names: Array, budgets: Array) -> Array:
    from megatron_dlm.models.flops.flops_paper import PUBLISHED_VOCABULARY, max_steps, published_forward_flops
    from megatron_dlm.models.sizes import paper_model

    flops = [published_forward_flops(paper_model(str(n)), PUBLISHED_VOCABULARY, 2048) for n in names]
    return np.array([[max_steps(1e18 * b, f, GLOBAL_BATCH_SIZE) for b in budgets.tolist()] for f in flops])


def _reveal_sizes(alpha_0: float, recorded: dict[str, Array]) -> list[int]:
    """Drawn by numpy's old generator; its seed is not recorded, so it is the one that fits the whole file."""
    full = recorded.get("a1.0")
    length = STEP_COUNT_LENGTH if full is None else int(full.sum())
    steps = len(recorded[f"a{alpha_0}"] if full is None else full)
    times = np.append(np.linspace(1.0, 1.0 / steps, steps), 0.0)

    def sizes(share: float, seed: int) -> list[int]:
        alphas = alpha_and_slope("log-linear", times, alpha_0=share)[0].tolist()
        draw, left, found = np.random.RandomState(seed).binomial, length, []
        for revealed_share in reveal_shares(alphas):
            found.append(int(draw(left, revealed_share)))
            left -= found[-1]
        if left and share == 1.0:
            found.append(left)
        return [size for size in found if size]

    shares = {float(name[1:]): values.tolist() for name, values in recorded.items()}
    fitting = (s for s in range(SEEDS_TRIED) if all(sizes(a, s) == found for a, found in shares.items()))
    return sizes(alpha_0, next(fitting, 0))


def _nucleus(logits: Array, top_p: float, *, renormalise: bool) -> Array:
    kept = keep_nucleus(torch.from_numpy(logits), top_p)
    return (kept.log_softmax(-1) if renormalise else kept).numpy()


def _sinusoid(sigma: Array) -> Array:
    from megatron_dlm.models.time_embedding import sinusoid

    return sinusoid(torch.from_numpy(sigma)).numpy()
