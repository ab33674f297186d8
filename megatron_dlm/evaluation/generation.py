"""Many texts, a batch at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dlm.sampling.generate import sample
from megatron_dlm.sampling.network import Network, Process
from megatron_dlm.sampling.settings import SamplingConfig
from megatron_dlm.sampling.start import Start, start_from


@dataclass(frozen=True)
class Generated:
    """One batch."""

    places: range
    """Of its samples among the starts."""
    ids_BL: Tensor
    """int64 [B, L] on the CPU."""
    tokens: int
    """Sampled, those given not counted."""
    seconds: float


def sample_all(
    network: Network,
    process: Process,
    config: SamplingConfig,
    starts: Sequence[Start],
    *,
    batch_size: int,
    seed: int,
    numbers: Sequence[int] | None = None,
) -> Iterator[Generated]:
    """Sample a text for each start; what a text becomes does not depend on `batch_size`.

    Args:
        network: trained.
        process: its noise.
        config: of the sampler.
        starts: of one sequence each, all of one length.
        batch_size: sequences at a time.
        seed: of all draws.
        numbers: of each sample, which with the seed address its draws; its place where absent.

    Yields:
        Batch after batch, in order.
    """
    for first in range(0, len(starts), batch_size):
        some = starts[first : first + batch_size]
        batch = Start(
            torch.cat([start.ids_BL for start in some]), torch.cat([start.given_BL for start in some])
        )
        places = range(first, first + len(some))
        samples = places if numbers is None else numbers[first : first + len(some)]
        begun = time.perf_counter()
        ids_BL = sample(network, process, config, batch, seed=seed, samples=samples).cpu()
        seconds = time.perf_counter() - begun
        yield Generated(places, ids_BL, int((~batch.given_BL).sum()), seconds)


def start_of_parts(parts: Sequence[Sequence[int] | int], length: int, process: Process) -> Start:
    """A text with gaps: given tokens, and numbers of tokens to fill in between them.

    Args:
        parts: token ids or a number of unknown tokens, in the order of the text.
        length: tokens in all; what the parts leave is unknown.
        process: the network's.

    Returns:
        One sequence.

    Raises:
        ValueError: the parts are longer than `length`, or a number is below 1.
    """
    ids: list[int] = []
    given: list[bool] = []
    for part in parts:
        if isinstance(part, int):
            if part < 1:
                raise ValueError(f"parts: a gap of {part} tokens is below 1")
            ids += [process.mask_token_id] * part
            given += [False] * part
        else:
            ids += part
            given += [True] * len(part)
    if len(ids) > length:
        raise ValueError(f"parts: {len(ids)} tokens exceed the length {length}")
    rest = length - len(ids)
    if process.family == "ar" and not any(given):
        return start_from([[]], length, process)
    return Start(torch.tensor([ids + [process.mask_token_id] * rest]), torch.tensor([given + [False] * rest]))


TextOf = Callable[[list[int]], str]


def text_of(ids: Sequence[int], decode: TextOf, eos_token_id: int, *, stop: bool) -> str:
    """Text of tokens, up to the first <eos> where `stop`."""
    tokens = list(ids)
    if stop and eos_token_id in tokens:
        tokens = tokens[: tokens.index(eos_token_id)]
    return decode(tokens)
