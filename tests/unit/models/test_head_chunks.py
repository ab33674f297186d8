"""A chunk of the head's rows by the bytes of its logits."""

import pytest

from megatron_dlm.models.head_chunks import CHUNK_BYTES, rows_per_chunk


@pytest.mark.parametrize("device", CHUNK_BYTES)
@pytest.mark.parametrize("columns", [16, 257, 512, 4_000])
def test_a_chunk_has_as_many_rows_as_its_bytes_hold(device, columns):
    rows = rows_per_chunk(None, columns, device)
    assert rows % 16 == 0 and 4 * columns * rows <= CHUNK_BYTES[device] < 4 * columns * (rows + 16)


@pytest.mark.parametrize("device", CHUNK_BYTES)
def test_a_chunk_has_128_rows_at_least(device):
    assert rows_per_chunk(None, 1 << 22, device) == rows_per_chunk(None, 32_001, "cpu") == 128


def test_what_is_asked_for_is_taken():
    assert rows_per_chunk(48, 512, "cpu") == rows_per_chunk(48, 512, "cuda") == 48
    assert rows_per_chunk(None, 32_001, "cuda") == 2096
