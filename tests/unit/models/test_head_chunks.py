"""A chunk of the head's rows by the bytes of its logits."""

import pytest

from megatron_dlm.models.head_chunks import CHUNK_BYTES, rows_per_chunk


@pytest.mark.parametrize("device", CHUNK_BYTES)
@pytest.mark.parametrize("columns", [16, 257, 512, 8_001, 32_001, 128_000])
def test_a_chunk_has_as_many_rows_as_its_bytes_hold(device, columns):
    rows = rows_per_chunk(None, columns, device)
    assert rows % 16 == 0 and 4 * columns * rows <= CHUNK_BYTES[device] < 4 * columns * (rows + 16)


def test_a_vocabulary_beyond_all_bytes_has_a_few_rows():
    assert rows_per_chunk(None, 1 << 22, "cpu") == 16


def test_what_is_asked_for_is_taken():
    assert rows_per_chunk(48, 512, "cpu") == rows_per_chunk(48, 512, "cuda") == 48
    assert (rows_per_chunk(None, 32_001, "cpu"), rows_per_chunk(None, 32_001, "cuda")) == (64, 2096)
