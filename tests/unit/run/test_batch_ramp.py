"""A batch that grows: its sizes, what is refused, how many samples a run has."""

import pytest

from megatron_dlm.interfaces import InputError
from megatron_dlm.run.config import TrainingConfig


def ramp(**changes):
    settings = {"ramp_start": 2, "ramp_increment": 2, "ramp_samples": 24} | changes
    return TrainingConfig(num_steps=20, global_batch_size=8, **settings)


def test_each_smaller_size_has_the_same_share_of_samples():
    config, consumed, sizes = ramp(), 0, []
    while consumed < 40:
        sizes.append(config.batch_size_at(consumed))
        consumed += sizes[-1]
    # 24 samples for three sizes: [0, 8), [8, 16), [16, 24), then the whole batch.
    assert sizes == [2, 2, 2, 2, 4, 4, 6, 6, 8, 8]
    assert config.samples_ahead(0, len(sizes)) == consumed
    assert config.samples_ahead(0, 20) == consumed + 10 * 8
    assert config.samples_ahead(16, 3) == 6 + 6 + 8
    constant = TrainingConfig(num_steps=20, global_batch_size=8)
    assert constant.batch_size_at(0) == 8 and constant.samples_ahead(0, 20) == 160


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ramp_start": 0}, "ramp_start: 0, while"),
        ({"ramp_start": 8}, "ramp_start: 8 is outside"),
        ({"ramp_increment": 4}, "ramp_increment: 4 does not divide global_batch_size - ramp_start = 6"),
        ({"ramp_increment": 0}, "ramp_increment: 0 does not divide"),
        ({"ramp_samples": 0}, "ramp_samples: 0 is below 1"),
    ],
)
def test_impossible_ramps_are_refused(changes, message):
    with pytest.raises(InputError, match=f"training.{message}"):
        ramp(**changes)
