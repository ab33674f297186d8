"""Steps far above the last ones change nothing, before and after a resume."""

import statistics
from dataclasses import replace

import pytest

from megatron_dlm.families.ar.objective import ARConfig
from megatron_dlm.telemetry.writers import read_metrics
from megatron_dlm.training.spike_detection import FEWEST, extended, spike_limit
from tests.helpers import faulty
from tests.helpers.runs import without_speed
from tools import tiny


def test_the_limit_is_so_many_deviations_above_the_mean():
    values = tuple(float(i % 7) for i in range(FEWEST))
    expected = statistics.fmean(values) + 6 * statistics.pstdev(values)
    assert spike_limit(values, 6) == expected
    assert spike_limit(values[1:], 6) == spike_limit(values, 0) == float("inf")
    assert extended(tuple(range(128)), 5.0) == (*range(1, 128), 5.0)


def make_spikes(kind, steps, fatal=None):
    """Multiply loss or gradient in some steps (counted from 0); die at the start of another."""
    import os
    import signal

    from megatron_dlm.training.session import Session

    run_batch = Session.run_batch

    def spiked(self, step, first_sample):
        if step == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        sums = run_batch(self, step, first_sample)
        if step in steps and kind == "loss":
            return replace(sums, loss=100 * sums.loss)
        if step in steps:
            for parameter in self.denoiser.parameters():
                parameter.main_grad.mul_(100)
        return sums

    Session.run_batch = spiked


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "log_every"),
    [("loss", 10), ("loss", 1), ("gradient norm", 10), ("gradient norm", 1)],
)
def test_spikes_are_skipped_also_right_after_a_resume(corpus, tmp_path, kind, log_every):
    def config_for(name):
        config = tiny.run_config(
            corpus,
            tmp_path / name,
            ARConfig(),
            training__num_steps=48,
            training__spike_sigmas=6.0,
            # Between two lines where ten steps are one.
            checkpoint__save_every=36,
            telemetry__log_every=log_every,
        )
        return config

    spikes = {41, 45}
    code, output = faulty.train_in_child(config_for("whole"), make_spikes, kind, spikes)
    assert code == 0, output
    assert output.count(f"warning: {kind}: ") == 2 and "in step 42, samples 328, " in output, output
    code, _ = faulty.train_in_child(config_for("cut"), make_spikes, kind, spikes, 41)
    assert code == -9
    code, output = faulty.train_in_child(config_for("cut"), make_spikes, kind, spikes)
    assert code == 0 and output.count(f"warning: {kind}: ") == 2, output
    logs = [[without_speed(entry) for entry in read_metrics(tmp_path / name)] for name in ("whole", "cut")]
    assert logs[0] == logs[1]
    skipped = [entry for entry in logs[0] if entry["kind"] == "skipped"]
    assert [entry["step"] for entry in skipped] == [42, 46]
    assert all(entry["fault"].startswith(f"{kind}: ") and " is above " in entry["fault"] for entry in skipped)
    if log_every == 10:
        windows = [(entry["first_step"], entry["step"]) for entry in logs[0] if entry["kind"] == "train"]
        assert windows == [(1, 10), (11, 20), (21, 30), (31, 40), (41, 48)]
