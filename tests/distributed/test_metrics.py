"""Metrics of all ranks: who is slow, who waits for data, how much memory."""

import gzip
import json
import statistics
import time
from types import SimpleNamespace

import pytest

from megatron_dlm.families.mdlm.objective import MDLMConfig
from megatron_dlm.interfaces import InputError
from megatron_dlm.telemetry.writers import NOT_DRAWN, read_metrics
from tests.helpers.distributed import run_distributed
from tools import tiny

SLOW_SECONDS = 0.5


def train_with_a_slow_rank(state, config):
    """A run whose rank 1 takes longer for its forward pass and for its data."""
    from megatron_dlm.run.datasets import open_data
    from megatron_dlm.training.hooks.logging import LoggingHook
    from megatron_dlm.training.hooks.telemetry import Telemetry
    from megatron_dlm.training.loop import fit
    from megatron_dlm.training.progress import TrainingProgress
    from megatron_dlm.training.session import Session

    session = Session(config, open_data(config.data), state)
    logging = LoggingHook(Telemetry(session, 0))
    # As on GPUs of 150 W each, whose energy of both a lap tells.
    laps = iter([300.0, 600.0])
    logging._energy = SimpleNamespace(lap=lambda: next(laps))
    logging._first_measured_step = 4
    if state.rank == 1:
        forward, get = session.denoiser.forward, session._batches.get
        session.denoiser.forward = lambda *words: time.sleep(SLOW_SECONDS) or forward(*words)
        session._batches.get = lambda address: time.sleep(SLOW_SECONDS / 2) or get(address)
    fit(session, TrainingProgress(), [logging])


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    directory = tmp_path_factory.mktemp("metrics") / "run"
    config = tiny.run_config(
        corpus,
        directory,
        MDLMConfig(),
        training__num_steps=6,
        training__micro_batch_size=4,
        telemetry__log_every=3,
    )
    run_distributed(train_with_a_slow_rank, 2, config)
    return directory


def test_the_slowest_rank_is_named(run):
    lines = read_metrics(run)
    assert [line["step"] for line in lines] == [3, 6]
    for line in lines:
        assert line["slowest_rank"] == 1
        assert line["rank_seconds_max"] > SLOW_SECONDS
        assert line["rank_seconds_max"] > line["rank_seconds_median"]
        assert SLOW_SECONDS / 2 < line["data_wait_seconds"] < SLOW_SECONDS
        assert 0 < line["step_seconds_median"] <= line["step_seconds_p95"]
        assert 0.1 < line["memory_gib"] < 8 and abs(time.time() - line["time"]) < 600
        assert line["tokens_per_second_per_device"] == pytest.approx(line["tokens_per_second"] / 2)


def test_losses_are_told_by_time(run):
    for line in read_metrics(run):
        bands = [f"nats_per_token/t{edges}" for edges in ("0.00-0.25", "0.25-0.50", "0.50-0.75", "0.75-1.00")]
        assert statistics.fmean(line[band] for band in bands) == pytest.approx(
            line["nats_per_token"], rel=1e-6
        )


def test_energy_is_that_of_the_line_s_steps(run):
    first, last = read_metrics(run)
    # A line that began before the measurement has none.
    assert "joules_per_token" not in first
    assert last["joules_per_token"] == pytest.approx(600 / (3 * 8 * 32))
    seconds = 3 * 8 * 32 / last["tokens_per_second"]
    # Over all the time since the line before, in which the steps were made.
    assert 0.8 * 300 / seconds < last["watts_per_device"] <= 300 / seconds


def test_tensorboard_has_the_configuration_and_no_curve_of_what_is_none(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    drawn = {name.removeprefix("train/") for name in tags["scalars"]}
    assert {"loss", "step_seconds_p95", "memory_gib"} <= drawn
    assert not drawn & NOT_DRAWN
    text = events.Tensors("run/configuration/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| training.global_batch_size | 8 |" in text
    assert "_hparams_/session_start_info" in events.summary_metadata


def train_with_a_profile(state, config):
    """Steps of a run with the profiling hook alone."""
    from megatron_dlm.run.datasets import open_data
    from megatron_dlm.training.hooks.profiling import ProfilingHook
    from megatron_dlm.training.loop import fit
    from megatron_dlm.training.progress import TrainingProgress
    from megatron_dlm.training.session import Session

    fit(Session(config, open_data(config.data), state), TrainingProgress(), [ProfilingHook()])


@pytest.mark.parametrize(("window", "steps"), [("2:3", 2), ("1:1", 1), ("4:9", 1)])
def test_a_window_of_steps_is_profiled(corpus, tmp_path, window, steps):
    config = tiny.run_config(
        corpus, tmp_path / "run", MDLMConfig(), training__num_steps=4, telemetry__profile_steps=window
    )
    run_distributed(train_with_a_profile, 2, config)
    place = tmp_path / "run" / "profiles" / f"steps-{window.replace(':', '-')}"
    assert sorted(place.parent.iterdir()) == [place.with_suffix(".json.gz"), place.with_suffix(".txt")]
    assert "aten::" in place.with_suffix(".txt").read_text()
    with gzip.open(place.with_suffix(".json.gz")) as file:
        events = json.load(file)["traceEvents"]
    optimizer_steps = [event for event in events if event.get("name", "").startswith("Optimizer.step")]
    assert len(optimizer_steps) == steps


@pytest.mark.parametrize("window", ["3", "0:2", "4:2", "a:b", "1:"])
def test_no_window_is_refused(window):
    from megatron_dlm.run.config import TelemetryConfig

    with pytest.raises(InputError, match=r"telemetry.profile_steps: .* is not FIRST:LAST"):
        TelemetryConfig(profile_steps=window)
