"""Metrics for Weights & Biases, offline, and what its faults do."""

import sys

import pytest

from megatron_dlm.telemetry.wandb_writer import WandbWriter, run_id


def test_an_offline_run_holds_metrics_and_goes_on(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    for step in (1, 2):
        writer = WandbWriter(tmp_path, {"training.seed": 7, "directory": "x"}, "offline")
        writer.write("train", step, {"first_step": 1, "loss": 1.5, "fault": "none"})
        writer.rewind(0)
        writer.write("train", 1, {"loss": 2.5})
        writer.close()
    files = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) >= 1 and all(run_id(tmp_path) in file.name for file in files)
    content = b"".join(file.read_bytes() for file in files)
    assert b"train/loss" in content and b"training.seed" in content and b"first_step" not in content


def test_directories_have_ids_of_their_own(tmp_path):
    assert run_id(tmp_path / "a") == run_id(tmp_path / "a") != run_id(tmp_path / "b")


def test_its_faults_are_os_errors(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(OSError, match="Weights & Biases: import of wandb halted"):
        WandbWriter(tmp_path, {}, "offline")
