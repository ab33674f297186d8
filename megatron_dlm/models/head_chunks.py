"""Rows of the head whose logits are in memory at a time."""

from __future__ import annotations

CHUNK_BYTES = {"cpu": 1 << 21, "cuda": 1 << 28}
"""Bytes of a chunk's logits in float32: 2 MiB stay in a CPU's cache; a GPU is fast from 256 MiB on."""
LEAST_ROWS = 128
"""Fewer make products too small, however wide the vocabulary is."""
MULTIPLE = 16


def rows_per_chunk(asked: int | None, columns: int, device_type: str) -> int:
    """Most rows whose logits are in memory at a time.

    Args:
        asked: `training.head_rows_per_chunk`; None: as many as a chunk's bytes hold, at least 128.
        columns: vocabulary columns of this rank.
        device_type: of the logits, "cpu" or "cuda".

    Returns:
        The number of rows, a multiple of 16 where it was not asked for.
    """
    if asked is not None:
        return asked
    rows = CHUNK_BYTES[device_type] // (4 * columns)
    return max(LEAST_ROWS, rows - rows % MULTIPLE)
