"""Sampling of many texts, one batch at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from megatron_dlm.platform.peers import Peers
from megatron_dlm.sampling.family_sampler import FamilySampler
from megatron_dlm.sampling.generate import sample
from megatron_dlm.sampling.network import Network
from megatron_dlm.sampling.settings import SamplingConfig
from megatron_dlm.sampling.start import Start, start_from


@dataclass(frozen=True)
class Generated:
    """Texts of one batch."""

    places: range
    """Indices of the batch's samples among all starts."""
    ids_BL: Tensor
    """int64 [B, L] on the CPU."""
    given_BL: Tensor
    """bool [B, L], True where the start gave the token."""
    tokens: int
    """Number of sampled tokens; given tokens are not counted."""
    seconds: float
    """Wall-clock time of the batch, in seconds."""


def sample_all(
    network: Network,
    family: FamilySampler,
    config: SamplingConfig,
    starts: Sequence[Start],
    *,
    batch_size: int,
    seed: int,
    numbers: Sequence[int] | None = None,
    peers: Peers = Peers(),
) -> Iterator[Generated]:
    """Sample a text for each start; the texts depend on neither `batch_size` nor the number of processes.

    Args:
        network: trained network.
        family: samplers of the network's family.
        config: settings of the sampler.
        starts: starts of one sequence each, all of the same length.
        batch_size: sequences sampled at a time.
        seed: random seed of all draws.
        numbers: number of each sample, which with the seed addresses its draws; None: its index in `starts`.
        peers: processes that share the batches; all iterate.

    Yields:
        The texts of each batch, in order, on every process.
    """

    def sample_batch(first: int) -> Generated:
        some = starts[first : first + batch_size]
        batch = Start(
            torch.cat([start.ids_BL for start in some]), torch.cat([start.given_BL for start in some])
        )
        places = range(first, first + len(some))
        samples = places if numbers is None else numbers[first : first + len(some)]
        begun = time.perf_counter()
        ids_BL = sample(network, family, config, batch, seed=seed, samples=samples).cpu()
        seconds = time.perf_counter() - begun
        return Generated(places, ids_BL, batch.given_BL, int((~batch.given_BL).sum()), seconds)

    for first in range(0, len(starts), batch_size * peers.world_size):
        own = first + batch_size * peers.rank
        for generated in peers.all_gather_objects(sample_batch(own) if own < len(starts) else None):
            if generated is not None:
                yield generated


def are_greedy(
    network: Network,
    family: FamilySampler,
    texts: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_size: int,
) -> list[bool]:
    """Whether each continuation is what the model writes greedily, left to right, in a text of that length.

    Args:
        network: trained network.
        family: samplers of the network's family.
        texts: token ids of each context, from which the family can start, and of its continuation.
        batch_size: most texts sampled at a time; a batch ends as soon as all its texts differ.

    Returns:
        One answer for each text.
    """
    found = [False] * len(texts)
    lengths = [len(context) + len(continuation) for context, continuation in texts]
    order = sorted(range(len(texts)), key=lengths.__getitem__)
    for length, group in groupby(order, key=lengths.__getitem__):
        members = list(group)
        for first in range(0, len(members), batch_size):
            some = members[first : first + batch_size]
            start = start_from([texts[i][0] for i in some], length, family)
            greedy = _Greedy(start, torch.tensor([[*texts[i][0], *texts[i][1]] for i in some]), family)
            with suppress(_AllDiffer):
                sample(network, family, _Greedy.SETTINGS, start, on_step=greedy)
            for i, same in zip(some, greedy.same_B.tolist(), strict=True):
                found[i] = same
    return found


class _AllDiffer(Exception):
    """No text of the batch is the greedy one any more."""


class _Greedy:
    """Compares the tokens that greedy sampling has written so far with those of given texts."""

    SETTINGS = SamplingConfig(sampler="left-to-right", temperature=0.0)

    def __init__(self, start: Start, wanted_BL: Tensor, family: FamilySampler) -> None:
        self._wanted_BL = wanted_BL
        self._mask_token_id = family.mask_token_id
        self._ordinal_BL = torch.where(start.given_BL, -1, (~start.given_BL).cumsum(1) - 1)
        self.same_B = torch.ones(len(wanted_BL), dtype=torch.bool)

    def __call__(self, step: int, ids_BL: Tensor) -> None:
        """Called after each step, which has written one more token of a text, or none."""
        ids_BL = ids_BL.cpu()
        written_BL = (self._ordinal_BL <= step) & (ids_BL != self._mask_token_id)
        self.same_B &= ~(written_BL & (ids_BL != self._wanted_BL)).any(1)
        if not self.same_B.any():
            raise _AllDiffer


def start_of_parts(parts: Sequence[Sequence[int] | int], length: int, family: FamilySampler) -> Start:
    """A text with gaps: given tokens, and numbers of tokens to fill in between them.

    Args:
        parts: token ids or a number of unknown tokens, in the order of the text.
        length: tokens in total; positions after the parts are unknown.
        family: samplers of the network's family.

    Returns:
        Start of one sequence.

    Raises:
        ValueError: the parts are longer than `length`, or a number is outside [1, length].
    """
    ids: list[int] = []
    given: list[bool] = []
    for part in parts:
        if isinstance(part, int):
            if not 1 <= part <= length:
                raise ValueError(f"parts: a gap of {part} tokens is outside [1, {length}]")
            ids += [family.mask_token_id] * part
            given += [False] * part
        else:
            ids += part
            given += [True] * len(part)
    if len(ids) > length:
        raise ValueError(f"parts: {len(ids)} tokens exceed the length {length}")
    rest = length - len(ids)
    if family.empty_prompt and not any(given):
        return start_from([[]], length, family)
    return Start(torch.tensor([ids + [family.mask_token_id] * rest]), torch.tensor([given + [False] * rest]))


def before_end(ids: Sequence[int], given: Sequence[bool], eos_token_id: int) -> list[int]:
    """Tokens before the first sampled <eos>; a given <eos>, which may also serve as <bos>, does not count."""
    for place, (token, is_given) in enumerate(zip(ids, given, strict=True)):
        if token == eos_token_id and not is_given:
            return list(ids[:place])
    return list(ids)
