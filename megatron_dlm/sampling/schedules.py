"""Builds the decoding plan of each sampler whose unmasking order is drawn beforehand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_dlm.sampling.decoding_plan import (
    Part,
    Plan,
    ancestral_part,
    block_autoregressive_part,
    block_part,
    in_blocks,
    plan_of,
    reveal_shares,
)
from megatron_dlm.sampling.noise import SampleNoise
from megatron_dlm.sampling.settings import SamplingConfig

PartOfRow = Callable[[int, NDArray[np.int64]], Part]


class Planned(Protocol):
    """A family, as far as plans depend on it; `MaskedSampler` says what each of these is."""

    def alphas(self, num_steps: int) -> list[float]:
        """Share of clean tokens at the edges of the ancestral sampler's steps."""

    def block_of(self, unknown_n: NDArray[np.int64], config: SamplingConfig) -> NDArray[np.int64] | None:
        """Block of each unknown token, where ancestral sampling goes block by block."""

    def left_to_right_steps(self, unknown_n: NDArray[np.int64]) -> NDArray[np.int64]:
        """Step at which left-to-right sampling reveals each unknown token."""


def plan(config: SamplingConfig, family: Planned, given_BL: NDArray[np.bool_], noise: SampleNoise) -> Plan:
    """The decoding plan: at which step each token of a batch is unmasked.

    Args:
        config: resolved settings of a sampler that has a plan.
        family: samplers of the network's family.
        given_BL: bool [B, L], True where a token is given.
        noise: source of the random orders.

    Returns:
        Plan of the batch.

    Raises:
        ValueError: steps or segments that do not divide the tokens of a sequence.
    """
    builder = {
        "left-to-right": _left_to_right,
        "block-autoregressive": _block_autoregressive,
        "block": _block,
        "ancestral": _ancestral,
    }[str(config.sampler)]
    return plan_of(given_BL, builder(config, family, noise))


def _left_to_right(config: SamplingConfig, family: Planned, noise: SampleNoise) -> PartOfRow:
    return lambda row, unknown: (np.arange(len(unknown)), family.left_to_right_steps(unknown))


def check_division(config: SamplingConfig, count: int) -> None:
    """Refuse steps or segments that do not divide the tokens to sample.

    Args:
        config: resolved sampler settings.
        count: unknown tokens of a sequence.

    Raises:
        ValueError: the steps or segments do not divide `count`.
    """
    length, groups, steps = config.segment_length, config.num_groups, config.num_steps
    if config.sampler == "block-autoregressive" and count % ((length or 1) * (groups or 1)):
        raise ValueError(f"segment_length: {length} x num_groups {groups} does not divide {count} tokens")
    if config.sampler == "block" and count % (steps or 1):
        raise ValueError(f"num_steps: {steps} does not divide {count} tokens")


def _block_autoregressive(config: SamplingConfig, family: Planned, noise: SampleNoise) -> PartOfRow:
    length, groups = config.segment_length or 0, config.num_groups or 0

    def part_of_row(row: int, unknown: NDArray[np.int64]) -> Part:
        check_division(config, len(unknown))
        return block_autoregressive_part(length, groups, len(unknown) // (length * groups))

    return part_of_row


def _block(config: SamplingConfig, family: Planned, noise: SampleNoise) -> PartOfRow:
    uniform_BL, steps = noise.uniform("order").cpu().numpy(), config.num_steps or 0

    def part_of_row(row: int, unknown: NDArray[np.int64]) -> Part:
        check_division(config, len(unknown))
        return block_part(uniform_BL[row, :steps], len(unknown) // steps)

    return part_of_row


def _ancestral(config: SamplingConfig, family: Planned, noise: SampleNoise) -> PartOfRow:
    uniform_BL = noise.uniform("order").cpu().numpy()
    shares_T = reveal_shares(family.alphas(config.num_steps or 0))

    def part_of_row(row: int, unknown: NDArray[np.int64]) -> Part:
        uniform_n = uniform_BL[row, : len(unknown)]
        block_n = family.block_of(unknown, config)
        if block_n is None:
            return ancestral_part(uniform_n, shares_T)
        return in_blocks(block_n, lambda members: ancestral_part(uniform_n[members], shares_T), len(shares_T))

    return part_of_row
