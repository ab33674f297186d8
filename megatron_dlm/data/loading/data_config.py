"""Configuration of a run's data, and the sample positions of each rank's microbatches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megatron_dlm.interfaces import InputError

Loader = Literal["auto", "torch", "pinned", "dali"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data of a run."""

    train: tuple[str, ...]
    """Training shards: one prefix (of PREFIX.bin, PREFIX.idx and PREFIX.json), or a blend given as
    alternating weights and prefixes, such as 3 A 7 B. A prefix may be the URL of an object store, such as
    s3://bucket/prefix."""
    validation: str | None = None
    """Prefix of the held-out shard for validation; give either this or split."""
    split: tuple[float, ...] = ()
    """Relative shares of each training shard's documents used for training, validation and test, for example
    98 1 1; needed if no validation shard is given."""
    seq_length: int = 2048
    """Sequence length: tokens per sample."""
    document_mask: bool = False
    """Let tokens attend only to their own document, whose positions start at 0. Without it a sample is one
    text, as in the paper. Records of prompt and response are always kept apart."""
    drop_long_records: bool = False
    """Skip prompt-response records longer than seq_length tokens; if off, such a record is an error. Bits per
    byte still use the bytes per token of the whole shard."""
    workers: int = 0
    """Worker processes per rank that read and corrupt batches ahead of time; 0: the training process does so
    in each step. Samples and noise do not depend on the number of workers."""
    loader: Loader = "auto"
    """How batches get to the device, with the same bits in all cases. torch: copied in each step; pinned:
    copied ahead of time from pinned memory on a CUDA stream of its own; dali: ahead of time, by
    NVIDIA DALI; auto: pinned on CUDA, torch on a CPU."""
    verify_checksums: bool = False
    """Before the run, read all shards in full and compare their SHA-256 checksums with the manifests."""

    def __post_init__(self) -> None:
        if self.seq_length < 1:
            raise InputError(f"data.seq_length: {self.seq_length} is below 1")
        if self.workers < 0:
            raise InputError(f"data.workers: {self.workers} is below 0")
        self.blend()
        if (self.validation is None) == (not self.split):
            raise InputError("data.validation: needs a shard, or data.split in its place")
        if self.split and (
            len(self.split) != 3
            or not all(math.isfinite(share) and share >= 0 for share in self.split)
            or min(self.split[:2]) == 0
        ):
            shares = " ".join(map(str, self.split))
            raise InputError(f"data.split: {shares}: not three shares, the first two above 0")

    def loader_for(self, device_type: str) -> Loader:
        """Loader that moves batches to a device of this type; resolves `auto`."""
        if self.loader != "auto":
            return self.loader
        return "pinned" if device_type == "cuda" else "torch"

    def blend(self) -> list[tuple[float, str]]:
        """Weights and prefixes of the training shards.

        Returns:
            One pair a shard.

        Raises:
            InputError: `train` is neither one prefix nor pairs.
        """
        if len(self.train) == 1:
            return [(1.0, self.train[0])]
        try:
            weights = [float(word) for word in self.train[0::2]]
        except ValueError:
            weights = []
        if not weights or len(weights) * 2 != len(self.train):
            raise InputError(
                f"data.train: {' '.join(self.train)}: not one prefix, or weights and prefixes in turn"
            )
        return list(zip(weights, self.train[1::2], strict=True))


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
