"""Fields of an objective that change during training: their values, what is refused, what is drawn then."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_dlm.diffusion.context import CorruptionContext
from megatron_dlm.families.ar.objective import ARConfig
from megatron_dlm.families.block_diffusion.objective import BlockDiffusionConfig
from megatron_dlm.families.duo.curriculum import CurriculumConfig
from megatron_dlm.families.duo.objective import DuoConfig
from megatron_dlm.families.esolm.objective import EsoLMConfig
from megatron_dlm.families.mask_uniform.objective import MaskUniformConfig
from megatron_dlm.families.mdlm.objective import MDLMConfig
from megatron_dlm.families.schedules import (
    objective_at,
    objective_phases,
    scheduled_values,
    training_objective,
)
from megatron_dlm.interfaces import AttentionPattern, InputError, TokenBatch, Vocabulary
from megatron_dlm.models.visibility import pattern_mask, visibility
from megatron_dlm.platform.rng import NoiseSource

VOCABULARY = Vocabulary(size=11, mask_token_id=4, eos_token_id=3, bos_token_id=0)
ANNEALED = EsoLMConfig(
    alpha_0=0.5, batch_split=0.25, schedules=("alpha_0 0:1.0 100", "batch_split 0:1.0 100")
)
GROWING = BlockDiffusionConfig(block_size=8, schedules=("block_size 10:1 20:4 30", "loss 0:low-variance 25"))
SOFT = DuoConfig(
    curriculum=CurriculumConfig(steps=100, top_k=8),
    schedules=(
        "curriculum.temperature 0:0.1 100",
        "curriculum.gamma_min 0:-1.5 50",
        "curriculum.gamma_max 0:-1.0 50",
    ),
)
AHEAD = {
    config.name: replace(config, schedules=("lookahead 0:0 100",))
    for config in (MDLMConfig(), DuoConfig(), MaskUniformConfig())
}
RANGE = MDLMConfig(largest_time=0.9, schedules=("time_epsilon 0:0.5 50", "largest_time 0:0.6 50"))
CONFIGS = [ANNEALED, GROWING, SOFT, RANGE]


def corrupted(objective, step, *, training=True):
    batch = TokenBatch(
        token_ids=torch.arange(8 * 9).reshape(8, 9) % 4, sample_indices=np.arange(8 * step, 8 * step + 8)
    )
    context = CorruptionContext(
        noise=NoiseSource(3), batch_start=8 * step, global_batch_size=8, training=training, step=step
    )
    return [objective.corrupt(part, context) for part in objective.split(batch, context)]


def test_fractions_change_linearly_and_all_else_at_the_steps():
    assert [scheduled_values(ANNEALED, step) for step in (0, 50, 100, 101)] == [
        {"alpha_0": 1.0, "batch_split": 1.0},
        {"alpha_0": 0.75, "batch_split": 0.625},
        *2 * [{"alpha_0": 0.5, "batch_split": 0.25}],
    ]
    sizes = [scheduled_values(GROWING, step)["block_size"] for step in (0, 10, 19, 20, 29, 30, 1000)]
    assert sizes == [1, 1, 1, 4, 4, 8, 8]
    words = [set(scheduled_values(GROWING, step)) - {"block_size"} for step in (24, 25)]
    assert words == [{"loss=low-variance"}, {"loss=elbo"}]
    assert objective_at(SOFT, 50).curriculum.temperature == pytest.approx(0.0505)
    assert scheduled_values(MDLMConfig(), 7) == {}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
@pytest.mark.parametrize("step", [0, 15, 24, 26, 99, 100, 1000])
def test_a_step_is_corrupted_as_by_its_own_objective(config, step):
    plain = objective_at(config, step)
    assert plain.schedules == ()
    found = corrupted(training_objective(config, VOCABULARY), step)
    expected = corrupted(training_objective(plain, VOCABULARY), step)
    assert len(found) == len(expected)
    for (inputs, targets), (own_inputs, own_targets) in zip(found, expected, strict=True):
        assert torch.equal(inputs.token_ids_BL, own_inputs.token_ids_BL)
        assert torch.equal(inputs.sigma_B, own_inputs.sigma_B)
        assert torch.equal(targets.weight_BL, own_targets.weight_BL)
        assert (inputs.mixture is None) == (own_inputs.mixture is None) == (config is not SOFT or step >= 100)
        if inputs.mixture is not None:
            assert torch.equal(inputs.mixture.weights_BLk, own_inputs.mixture.weights_BLk)


def test_soft_tokens_have_the_step_s_temperature():
    found = [corrupted(training_objective(SOFT, VOCABULARY), step)[0][0].mixture for step in (0, 99)]
    largest = [float(mixture.weights_BLk.max(-1).values.mean()) for mixture in found]
    assert largest[0] < 0.9 and largest[1] > 0.99


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_evaluation_has_the_fields_own_values(config):
    own = replace(config, schedules=(), **({"largest_time": 1.0} if config is RANGE else {}))
    found = corrupted(training_objective(config, VOCABULARY), 0, training=False)
    expected = corrupted(own.build(VOCABULARY), 0, training=False)
    for (inputs, targets), (own_inputs, own_targets) in zip(found, expected, strict=True):
        assert torch.equal(inputs.token_ids_BL, own_inputs.token_ids_BL)
        assert torch.equal(targets.bound_weight_BL, own_targets.bound_weight_BL)


@pytest.mark.parametrize(("step", "low", "high"), [(0, 0.5, 0.6), (25, 0.2505, 0.75), (50, 1e-3, 0.9)])
def test_training_draws_times_from_its_range(step, low, high):
    objective = training_objective(replace(RANGE, time_conditioning=True), VOCABULARY)
    ((inputs, _),) = corrupted(objective, step)
    times = (1 - (-inputs.sigma_B.double()).exp()) / 0.999
    assert low - 1e-6 <= times.min() and times.max() <= high + 1e-6
    # Eight strata of the range.
    assert times.max() - times.min() > 0.7 * (high - low)


@pytest.mark.parametrize("name", AHEAD)
@pytest.mark.parametrize("documents", [False, True])
def test_the_text_to_the_right_comes_into_sight(name, documents):
    config, length = AHEAD[name], 8
    objective = training_objective(config, VOCABULARY)
    causal = pattern_mask(AttentionPattern.CAUSAL, length).dense()[0, 0]
    places = torch.arange(length)
    for step, reach in ((0, 0), (25, 2), (50, 4)):
        ((inputs, _),) = corrupted(objective, step)
        if documents:
            inputs = replace(inputs, document_ids_BL=(places // 3).expand_as(inputs.token_ids_BL))
        seen = visibility(inputs, config.attention).dense()[0, 0]
        expected = places[None] <= places[:, None] + reach
        assert reach or torch.equal(expected, causal)
        assert torch.equal(
            seen, expected & (places[None] // 3 == places[:, None] // 3) if documents else expected
        )
    for step, training in ((100, True), (1000, True), (0, False)):
        ((inputs, _),) = corrupted(objective, step, training=training)
        assert inputs.attention_mask is None


@pytest.mark.parametrize("config", [EsoLMConfig, BlockDiffusionConfig, ARConfig])
def test_families_of_another_attention_have_no_lookahead(config):
    assert "lookahead" not in config.can_change and not hasattr(config(), "lookahead")


def test_phases_are_what_a_run_trains():
    phases = objective_phases(GROWING).values()
    assert {(phase.block_size, phase.loss) for phase in phases} == {
        *((1, "low-variance"), (4, "low-variance"), (4, "elbo"), (8, "elbo")),
    }
    assert len(objective_phases(ANNEALED)) > 90 and objective_phases(ANNEALED)[0].has_parts is False
    # The steps beside each point too, where a ramp that divides no batch shows.
    assert {0, 1, 99, 100} <= objective_phases(ANNEALED).keys()
    assert objective_phases(MDLMConfig()) == {0: MDLMConfig()}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (MDLMConfig(schedules=("noise_schedule 0:cosine 5",)), "'noise_schedule' does not change during"),
        (
            ARConfig(schedules=("alpha_0 0:1 5",)),
            "'alpha_0' does not change during training; ar changes nothing",
        ),
        (MDLMConfig(schedules=("",)), "'' does not change"),
        (MDLMConfig(schedules=("loss 0:elbo",)), "is not FIELD STEP:VALUE ... STEP"),
        (MDLMConfig(schedules=("loss 0:elbo 5:elbo",)), "is not FIELD STEP:VALUE ... STEP"),
        (MDLMConfig(schedules=("loss elbo 5",)), "is not FIELD STEP:VALUE ... STEP"),
        (MDLMConfig(schedules=("loss -1:elbo 5",)), "a step is no whole number"),
        (MDLMConfig(schedules=("loss 5:elbo 5",)), "steps do not rise"),
        (MDLMConfig(schedules=("loss 0:elbo 5", "loss 0:elbo 6")), "loss has two schedules"),
        (GROWING.__class__(schedules=("block_size 0:1.5 5",)), "block_size 0:1.5 5.*invalid literal for int"),
        (GROWING.__class__(schedules=("block_size 0:0 5",)), "at step 0: objective.block_size: 0 is below 1"),
        (EsoLMConfig(schedules=("alpha_0 0:1.5 5",)), "at step 0: objective.alpha_0: 1.5 is outside"),
        (
            EsoLMConfig(alpha_0=0.5, batch_split=0.5, schedules=("alpha_0 0:1 9",)),
            "at step 0: objective.batch_split: 0.5 trains a part that alpha_0 1.0 has not",
        ),
        (
            MDLMConfig(schedules=("largest_time 0:0.0001 9",)),
            "at step 0: objective.largest_time: 0.0001 is out",
        ),
        (
            DuoConfig(
                curriculum=CurriculumConfig(steps=9, top_k=2), schedules=("curriculum.temperature 0:1.0 9",)
            ),
            r"at step 0: objective.curriculum.top_k: 2 drops .* at temperature 1.0",
        ),
        (MDLMConfig(schedules=("loss 0:elbos 9",)), "loss 0:elbos 9': loss is one of low-variance, elbo"),
    ],
)
def test_schedules_that_cannot_be_are_refused(config, words):
    with pytest.raises(InputError, match=words):
        training_objective(config, VOCABULARY)


def test_a_number_is_one_of_its_field_however_it_is_written():
    """A whole number in a recipe does not make a fraction jump."""
    config = MDLMConfig(time_epsilon=0, schedules=("time_epsilon 0:0.5 10",))
    assert objective_at(config, 5).time_epsilon == 0.25


def test_soft_tokens_do_not_change_where_there_are_none():
    with pytest.raises(
        InputError, match=r"changes behind curriculum.steps 0, where there are no soft tokens"
    ):
        DuoConfig(schedules=("curriculum.temperature 0:0.1 100",))
