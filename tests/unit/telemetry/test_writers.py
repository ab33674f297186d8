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


def test_a_rollback_takes_lines_back_on_a_full_disk_too(tmp_path):
    writer = JsonLinesWriter(tmp_path, 0)
    for step in range(1, 5):
        writer.write("train", step, {"loss": 1.0})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        for action in (lambda: writer.write("train", 5, {"loss": 1.0}), lambda: writer.rewind(2)):
            with pytest.raises(OSError, match="File too large"):
                action()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    # Too late to take them back, and still a file that can be written.
    writer.write("train", 3, {"loss": 2.0})
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 2, 3, 4, 3]
    writer.rewind(2)
    writer.write("train", 3, {"loss": 3.0})
    writer.close()
    assert [(entry["step"], entry["loss"]) for entry in read_metrics(tmp_path)] == [(1, 1), (2, 1), (3, 3)]
