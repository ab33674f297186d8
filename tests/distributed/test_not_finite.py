"""A loss or gradient that is not finite changes no parameter; the run skips the step, stops or goes back."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_dlm.families.ar.objective import ARConfig
from megatron_dlm.families.esolm.objective import EsoLMConfig
from megatron_dlm.families.mdlm.objective import MDLMConfig
from megatron_dlm.interfaces import TrainingError
from megatron_dlm.platform.parallel_config import ParallelConfig
from tests.helpers.distributed import run_distributed
from tests.helpers.selection import slow
from tools import tiny

NAN = float("nan")


def build(state, config):
    from megatron_dlm.run.datasets import open_data
    from megatron_dlm.training.session import Session

    return Session(config, open_data(config.data), state)


def spoil(session, kind, steps):
    """Make loss or gradient NaN in some steps (counted from 0): in one microbatch, or on one rank."""
    run_batch, current = session.run_batch, {}
    state = session.parallel
    if kind == "loss" and state.is_last_stage:
        losses = session.denoiser.head.forward

        def spoiled_losses(*arguments):
            result = losses(*arguments)
            if current.pop("spoil", False) and state.data_rank == state.data_size - 1:
                return replace(result, loss=result.loss * NAN, bound=result.bound * NAN)
            return result

        session.denoiser.head.forward = spoiled_losses

    def spoiled_batch(step, first_sample):
        current["spoil"] = step in steps
        sums = run_batch(step, first_sample)
        if kind == "gradient" and step in steps and state.rank == state.world_size - 1:
            for parameter in session.denoiser.parameters():
                parameter.main_grad.fill_(NAN)
        return sums

    session.run_batch = spoiled_batch


def four_steps(state, config, kind):
    """Reports of four steps with a fault in the second, and the parameters after each."""
    from megatron_dlm.training.loop import train_step
    from megatron_dlm.training.progress import TrainingProgress

    session, progress, seen = build(state, config), TrainingProgress(), []
    if kind is not None:
        spoil(session, kind, {1})
    for step in range(4):
        if kind is None and step == 1:
            # The same run with the second step left out of the update.
            session.run_batch(1, 8)
            progress.step, progress.consumed_samples = 2, 16
            report = None
        else:
            report = train_step(session, progress)
        seen.append((report, [p.detach().clone() for p in session.denoiser.parameters()]))
    return seen


LAYOUTS = {
    "one": (1, ParallelConfig()),
    "dp2": (2, ParallelConfig()),
    "dp2-plain": (2, ParallelConfig(use_distributed_optimizer=False)),
    "tp2pp2": (4, ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)),
}


CASES = list(itertools.product(LAYOUTS, ["loss", "gradient"], ["fp32", "bf16"]))
QUICK = [("one", "loss", "fp32"), ("one", "gradient", "bf16"), ("tp2pp2", "loss", "bf16")]


@pytest.mark.parametrize(("layout", "kind", "precision"), [c if c in QUICK else slow(*c) for c in CASES])
def test_a_bad_step_changes_nothing_and_the_run_goes_on(corpus, layout, kind, precision):
    size, parallel = LAYOUTS[layout]
    config = tiny.run_config(corpus, corpus.directory / "unused", MDLMConfig(), training__precision=precision)
    config = replace(config, parallel=parallel)
    spoiled = run_distributed(four_steps, size, config, kind, parallel=parallel)
    without = run_distributed(four_steps, size, config, None, parallel=parallel)
    for ours, theirs in zip(spoiled, without, strict=True):
        reports = [report for report, _ in ours]
        assert [report.applied for report in reports] == [True, False, True, True]
        # The micro-batch at fault (2 samples of the last data parallel rank), or all of the batch.
        first = 12 if size == 2 else 8
        expected = range(first, first + 2) if kind == "loss" else range(8, 16)
        assert reports[1].bad_samples == tuple(expected)
        for (_, mine), (_, other) in zip(ours, theirs, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(ours[0][1], ours[1][1], strict=True))


def whole_run(state, config, kind, steps):
    """What a run with faults ends with: its last progress, or its complaint."""
    from megatron_dlm.training.progress import TrainingProgress
    from megatron_dlm.training.signals import StopSignals
    from megatron_dlm.training.train import go_on

    session, progress = build(state, config), TrainingProgress()
    seen = []
    spoil(session, kind, steps)
    run_batch = session.run_batch

    def recording(step, first_sample):
        seen.append((step, first_sample))
        # A step is spoiled the first time only.
        sums = run_batch(step, first_sample)
        steps.discard(step)
        return sums

    session.run_batch = recording
    try:
        go_on(session, progress, StopSignals())
    except TrainingError as error:
        return str(error), seen
    return (progress.step, progress.consumed_samples), seen


def config_for(corpus, directory, policy, objective=None):
    return tiny.run_config(
        corpus, directory, objective or ARConfig(), training__on_non_finite=policy, training__num_steps=6
    )


@pytest.mark.parametrize(
    "objective", [ARConfig(), EsoLMConfig(alpha_0=0.5, batch_split=0.5)], ids=["ar", "esolm"]
)
def test_three_bad_steps_in_a_row_end_the_run_and_leave_a_replay(corpus, tmp_path, objective):
    config = config_for(corpus, tmp_path, "skip", objective)
    for message, _ in run_distributed(whole_run, 2, config, "gradient", {1, 2, 3}):
        assert message.startswith(
            "gradient norm: not finite in step 4, samples 24, 25, 26, 27, 28, 29, 30, 31,"
        )
        assert "3 such steps in a row" in message
    record = json.loads((tmp_path / "bad-step-00000004.json").read_text())
    assert (
        record["step"] == 4 and record["consumed_samples"] == 24 and record["samples"] == list(range(24, 32))
    )
    with np.load(tmp_path / "bad-step-00000004.npz") as arrays:
        assert arrays["sample_24/clean_token_ids"].shape == (1, 33)
        assert "sample_31/token_ids_BL" in arrays and "sample_31/weight_BL" in arrays
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    # The third ends the run before it is logged.
    assert [line["step"] for line in lines if line["kind"] == "skipped"] == [2, 3]
    assert all(line["loss"] == line["loss"] for line in lines if line["kind"] == "train")


def test_single_bad_steps_are_skipped_and_stop_ends_at_once(corpus, tmp_path):
    for end, seen in run_distributed(
        whole_run, 2, config_for(corpus, tmp_path / "a", "skip"), "loss", {1, 3}
    ):
        assert end == (6, 48) and seen == [(step, 8 * step) for step in range(6)]
    for message, seen in run_distributed(
        whole_run, 1, config_for(corpus, tmp_path / "b", "stop"), "loss", {1}
    ):
        assert message.startswith("loss: not finite in step 2, samples 8, 9, 1 such steps in a row")
        assert seen == [(0, 0), (1, 8)]


def behind_the_bad_samples(state, config):
    """Losses of an undisturbed run that reads the samples of one that went back from step 4 to step 2."""
    from megatron_dlm.training.loop import train_step
    from megatron_dlm.training.progress import TrainingProgress

    session, progress, losses = build(state, config), TrainingProgress(), {}
    while progress.step < 6:
        if progress.step == 2:
            progress.consumed_samples = 32
        report = train_step(session, progress)
        losses[report.step] = (report.loss, report.grad_norm)
    return losses


def test_rollback_goes_on_from_the_checkpoint_behind_the_bad_samples(corpus, tmp_path):
    """Checkpoints at steps 2 and 4; the fourth step is bad the first time."""
    config = config_for(corpus, tmp_path / "run", "rollback")
    config = replace(config, evaluation=replace(config.evaluation, every=2))
    for end, seen in run_distributed(whole_run, 2, config, "gradient", {3}):
        assert end == (6, 64)
        assert seen == [(0, 0), (1, 8), (2, 16), (3, 24), (2, 32), (3, 40), (4, 48), (5, 56)]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    expected = run_distributed(behind_the_bad_samples, 2, config_for(corpus, tmp_path / "other", "skip"))[0]
    train = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in train] == [1, 2, 3, 4, 5, 6]
    assert {line["step"]: (line["loss"], line["grad_norm"]) for line in train} == expected
    # The loaded step is neither called bad nor evaluated again.
    assert [(line["kind"], line["step"]) for line in lines if line["kind"] != "train"] == [
        *(("validation", 0), ("validation", 2), ("rollback", 2), ("validation", 4), ("validation", 6))
    ]
    (rollback,) = [line for line in lines if line["kind"] == "rollback"]
    assert rollback["failed_step"] == 4 and rollback["fault"] == "gradient norm: not finite"
    fingerprints = {line["step"]: line["fingerprint"] for line in train}
    assert rollback["fingerprint"] not in fingerprints.values()


def checkpoints_in_a_rollback(state, config):
    """Inodes of the run's newest checkpoint before and after the run goes back to it."""
    from megatron_dlm.training.hooks.non_finite import NonFiniteHook
    from megatron_dlm.training.progress import TrainingProgress
    from megatron_dlm.training.signals import StopSignals
    from megatron_dlm.training.train import go_on

    checkpoints, inodes = config.directory / "checkpoints", []

    def note():
        inodes.append({path.name: path.stat().st_ino for path in checkpoints.iterdir()})

    go_back = NonFiniteHook.after_step

    def noting(self, session, progress, report):
        go_back(self, session, progress, report)
        if not report.applied:
            note()

    NonFiniteHook.after_step = noting
    session, progress, steps = build(state, config), TrainingProgress(), {3}
    spoil(session, "loss", steps)
    run_batch = session.run_batch

    def once(step, first_sample):
        if first_sample == 32:
            # The step after the rollback begins.
            steps.clear()
            note()
        return run_batch(step, first_sample)

    session.run_batch = once
    go_on(session, progress, StopSignals())
    return inodes


def test_the_checkpoint_that_was_gone_back_to_is_not_written_again(corpus, tmp_path):
    config = config_for(corpus, tmp_path, "rollback")
    config = replace(config, checkpoint=replace(config.checkpoint, keep_last=1, save_every=2))
    ((loaded, begun),) = run_distributed(checkpoints_in_a_rollback, 1, config)
    assert list(loaded) == ["step-00000002"] and loaded == begun


def validation_of_spoiled_weights(state, config):
    session = build(state, config)
    with torch.no_grad():
        next(session.denoiser.parameters()).fill_(NAN)
    try:
        session.validation.run(config.evaluation)
    except TrainingError as error:
        return str(error)
    return "no complaint"


def test_a_bad_validation_loss_names_its_samples(corpus, tmp_path):
    config = config_for(corpus, tmp_path, "skip")
    (message,) = run_distributed(validation_of_spoiled_weights, 1, config)
    assert message == "loss: not finite in validation batch 1, samples [0, 1, 2, 3, 4, 5, 6, 7]"
