"""Metrics on a disk that fills up."""

import resource

import pytest

from megatron_dlm.telemetry.writers import JsonLinesWriter, read_metrics


def test_lines_wait_for_room(tmp_path):
    writer = JsonLinesWriter(tmp_path, 0)
    writer.write("train", 1, {"loss": 1.0})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60, hard))
    try:
        for step in range(2, 1000):
            with pytest.raises(OSError, match="File too large"):
                writer.write("train", step, {"loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1]
    writer.write("train", 1000, {"loss": 1.0})
    writer.close()
    assert [entry["step"] for entry in read_metrics(tmp_path)] == list(range(1, 1001))
