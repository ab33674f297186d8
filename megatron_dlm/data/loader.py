"""Which block each sample of a run reads; the only state is the number of samples consumed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_dlm.data.packing import TokenBlocks
from megatron_dlm.interfaces import InputError, TokenBatch
from megatron_dlm.platform.rng import NoiseSource, Permutation


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a run reads."""

    train: Path
    """Prefix of the training shard (PREFIX.bin, .idx, .json)."""
    validation: Path
    """Prefix of the held-out shard."""
    seq_length: int = 2048
    """Tokens of one sample."""
    document_mask: bool = False
    """Keep attention inside documents, whose positions start at 0; off, as in the paper, a block is one."""
    verify_checksums: bool = False
    """Read both shards whole before the run and compare their SHA-256 with the manifests."""

    def __post_init__(self) -> None:
        if self.seq_length < 1:
            raise InputError(f"data.seq_length: {self.seq_length} is below 1")


class SampleOrder:
    """Sample position in the run -> block: a new addressed permutation of all blocks each epoch."""

    def __init__(self, num_blocks: int, noise: NoiseSource) -> None:
        self.num_blocks = num_blocks
        self._permutation = lru_cache(maxsize=2)(
            lambda epoch: Permutation(num_blocks, noise, "data/order", epoch)
        )

    def __call__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Blocks (int64) of sample positions (int64 [B], >= 0)."""
        epochs, offsets = np.divmod(positions, self.num_blocks)
        blocks = [self._permutation(int(e))(o[None]) for e, o in zip(epochs, offsets, strict=True)]
        return np.concatenate(blocks)


def microbatch_positions(
    first: int, *, global_batch_size: int, micro_batch_size: int, data_rank: int, data_size: int
) -> Iterator[NDArray[np.int64]]:
    """Sample positions of one rank's microbatches of the global batch that starts at `first`.

    Ranks own contiguous slices of the global batch, so positions do not depend on the micro-batch size.

    Args:
        first: position in the run of the global batch's first sample.
        global_batch_size: samples of the step; a multiple of micro_batch_size * data_size.
        micro_batch_size: samples of one forward-backward.
        data_rank: data parallel rank.
        data_size: data parallel size.

    Yields:
        int64 [micro_batch_size], one array a microbatch.
    """
    share = global_batch_size // data_size
    start = first + data_rank * share
    for offset in range(0, share, micro_batch_size):
        yield np.arange(start + offset, start + offset + micro_batch_size, dtype=np.int64)


def read_batch(
    blocks: TokenBlocks, block_indices: NDArray[np.int64], positions: NDArray[np.int64]
) -> TokenBatch:
    """The blocks as one microbatch whose samples stand at `positions` of the run."""
    documents = blocks.read_documents(block_indices)
    return TokenBatch(
        token_ids=torch.from_numpy(blocks.read(block_indices)),
        sample_indices=positions,
        document_ids=None if documents is None else torch.from_numpy(documents),
    )
