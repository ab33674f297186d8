"""Corruptions of Duo, Eso-LM and block diffusion, truncated lengths, strata, and their configurations."""

import numpy as np
import pytest
import torch

from megatron_dlm.diffusion.noisy_then_clean import noisy_then_clean_mask
from megatron_dlm.diffusion.time_sampling import stratified_times
from megatron_dlm.families.block_diffusion.objective import BlockDiffusionConfig
from megatron_dlm.families.duo.curriculum import CurriculumConfig, signal_probability
from megatron_dlm.families.duo.objective import DuoConfig, UniformStates
from megatron_dlm.families.esolm.objective import EsoLMConfig
from megatron_dlm.families.mdlm.objective import MDLMConfig
from megatron_dlm.interfaces import InputError, Vocabulary
from megatron_dlm.platform.rng import NoiseSource, Permutation
from tests.helpers.batches import batch_of, context

SIZE, MASK = 40, 7
VOCABULARY = Vocabulary(size=SIZE, mask_token_id=MASK, eos_token_id=0, bos_token_id=1)


def tokens(batch, length, seed=0):
    drawn = np.random.default_rng(seed).integers(8, SIZE, (batch, length + 1))
    return batch_of(drawn, np.arange(batch))


def corrupt(config, batch, training=True):
    size = len(batch.sample_indices)
    objective, where = config.build(VOCABULARY), context(0, size, training=training)
    return [objective.corrupt(part, where) for part in objective.split(batch, where)]


# ---- Duo -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask_in_noise", [True, False])
def test_duo_replaces_uniformly_at_the_right_rate(mask_in_noise):
    batch = tokens(64, 4000)
    ((inputs, targets),) = corrupt(DuoConfig(mask_in_noise=mask_in_noise), batch)
    states = SIZE if mask_in_noise else SIZE - 1
    t = stratified_times(batch.sample_indices, context(0, 64), time_epsilon=1e-3)[:, 0]
    alpha = 1 - 0.999 * t
    changed = (inputs.token_ids_BL != targets.clean_BL).double().mean(1).numpy()
    assert np.abs(changed - (1 - alpha) * (1 - 1 / states)).max() < 0.04
    noise = inputs.token_ids_BL[inputs.token_ids_BL != targets.clean_BL]
    assert (noise == MASK).any() == mask_in_noise
    assert np.allclose(inputs.sigma_B, -np.log(alpha), rtol=1e-5)
    assert np.allclose(targets.weight_BL[:, 0], 0.999 / (states * alpha), rtol=1e-12)
    assert targets.token_count == 64 * 4000


def test_uniform_states_skip_the_mask():
    states = UniformStates(SIZE, MASK, mask_in_noise=False)
    ids = states.token(np.arange(states.count))
    assert sorted(ids) == [i for i in range(SIZE) if i != MASK]
    assert (states.ordinal(ids) == np.arange(states.count)).all()


@pytest.mark.parametrize(
    ("states", "expected"),
    [(32001, (0.955209, 0.270190, 0.060653)), (50258, (0.945474, 0.237964, 0.049317))],
)
def test_curriculum_signal_probability(states, expected):
    gamma = np.array([-3.55, -2.5, -1.85])
    alpha, slope = signal_probability(gamma, states)
    assert np.allclose(alpha, expected, atol=1e-6)
    h = 1e-5
    difference = (signal_probability(gamma + h, states)[0] - signal_probability(gamma - h, states)[0]) / (
        2 * h
    )
    assert np.allclose(slope, difference, rtol=1e-6)


def test_curriculum_draws_follow_the_full_gaussian():
    """Against noise over the whole vocabulary: how often the clean token wins, how soft the mixture is."""
    config = DuoConfig(
        curriculum=CurriculumConfig(steps=1, temperature=0.1, gamma_min=-1.5, gamma_max=0.0, top_k=39)
    )
    batch = tokens(32, 2000)
    ((inputs, targets),) = corrupt(config, batch)
    mixture = inputs.mixture
    assert torch.allclose(mixture.weights_BLk.sum(-1), torch.ones(32, 2000), atol=1e-5)
    ordered = mixture.token_ids_BLk.sort(-1).values
    assert (ordered[..., 1:] != ordered[..., :-1]).all()
    assert torch.equal(mixture.token_ids_BLk[..., 0], inputs.token_ids_BL)
    t = stratified_times(batch.sample_indices, context(0, 32), time_epsilon=1e-3)[:, 0]
    gamma = -1.5 + 1.5 * t
    generator = np.random.default_rng(5)
    for row in range(0, 32, 4):
        noise = generator.standard_normal((4000, SIZE)) / np.sqrt(1 + np.exp(-gamma[row]))
        noise[:, 0] += 1 / np.sqrt(1 + np.exp(gamma[row]))
        soft = np.exp((noise - noise.max(1, keepdims=True)) / 0.1)
        largest = (soft / soft.sum(1, keepdims=True)).max(1)
        ours = mixture.weights_BLk[row, :, 0].numpy()
        assert abs(ours.mean() - largest.mean()) < 4 * np.hypot(
            ours.std() / 2000**0.5, largest.std() / 4000**0.5
        )
        kept = (inputs.token_ids_BL[row] == targets.clean_BL[row]).double().mean().item()
        assert abs(kept - (noise.argmax(1) == 0).mean()) < 4 * (0.25 / 2000 + 0.25 / 4000) ** 0.5
        alpha = targets.alpha_BL[row, 0].item()
        assert abs(kept - (alpha + (1 - alpha) / SIZE)) < 4 * (0.25 / 2000) ** 0.5


def test_curriculum_is_for_the_first_training_steps_only():
    config = DuoConfig(curriculum=CurriculumConfig(steps=2))
    batch = tokens(4, 16)
    objective = config.build(VOCABULARY)
    for start, training, soft in ((0, True, True), (4, True, True), (8, True, False), (0, False, False)):
        moved = batch_of(batch.token_ids, start + np.arange(4))
        inputs, _ = objective.corrupt(moved, context(start, 4, training=training))
        assert (inputs.mixture is not None) == soft


# ---- Eso-LM --------------------------------------------------------------------------------------


def test_eso_lm_sorts_clean_tokens_before_masked_ones():
    batch = tokens(16, 50)
    ((inputs, targets),) = corrupt(EsoLMConfig(), batch)
    order = inputs.position_ids_BL
    assert torch.equal(order.sort(1).values, torch.arange(50).expand(16, 50))
    assert torch.equal(targets.clean_BL, batch.token_ids[:, :-1].gather(1, order))
    masked = inputs.token_ids_BL == MASK
    assert (masked.int().diff(dim=1) >= 0).all()
    assert torch.equal(masked, targets.weight_BL > 0)
    assert not torch.equal(order[0], order[0].sort().values)


def test_eso_lm_divides_the_batch_and_folds_the_shares_into_the_weights():
    config = EsoLMConfig(alpha_0=0.5, batch_split=0.25, loss="elbo")
    batch = tokens(16, 200)
    (diffusion, diffusion_targets), (sequential, sequential_targets) = corrupt(config, batch)
    assert (len(diffusion.token_ids_BL), len(sequential.token_ids_BL)) == (4, 12)
    assert diffusion.token_ids_BL.shape[1] == 200 and sequential.token_ids_BL.shape[1] == 400
    assert diffusion_targets.token_count + sequential_targets.token_count == 16 * 200
    # Each part's weights, divided by all tokens, add up to the expected number of its tokens.
    share = diffusion_targets.weight_BL.sum() / (16 * 200)
    assert share == pytest.approx(0.5, abs=0.15)
    share = sequential_targets.weight_BL.sum() / (16 * 200)
    assert share == pytest.approx(0.5, abs=0.02)


def test_eso_lm_sequential_part_appends_the_clean_copy():
    ((inputs, targets),) = corrupt(EsoLMConfig(alpha_0=0.0, batch_split=0.0), tokens(3, 12))
    assert torch.equal(inputs.position_ids_BL[:, :12], inputs.position_ids_BL[:, 12:])
    assert torch.equal(targets.clean_BL[:, :12], inputs.token_ids_BL[:, 12:])
    # alpha_0 = 0: all masked, left to right.
    assert torch.equal(inputs.position_ids_BL[:, :12], torch.arange(12).expand(3, 12))
    assert (targets.weight_BL[:, :12] == 1).all() and (targets.weight_BL[:, 12:] == 0).all()


def test_a_sequential_mask_has_blocks_of_one():
    earlier = torch.ones(7, 7, dtype=torch.bool).tril(-1)
    itself = torch.eye(7, dtype=torch.bool)
    expected = torch.cat(
        [torch.cat([itself, earlier], dim=1), torch.cat([earlier & False, earlier | itself], dim=1)]
    )
    assert torch.equal(noisy_then_clean_mask(7, 1).dense()[0, 0], expected)


def test_block_mask():
    mask = noisy_then_clean_mask(4, 2).dense()[0, 0]
    noisy, clean = mask[:4], mask[4:]
    assert noisy[2].int().tolist() == [0, 0, 1, 1, 1, 1, 0, 0]
    assert noisy[0].int().tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    assert clean[1].int().tolist() == [0, 0, 0, 0, 1, 1, 0, 0]
    assert clean[2].int().tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_blocks_of_the_whole_length_are_mdlm():
    batch = tokens(8, 32)
    ((inputs, targets),) = corrupt(BlockDiffusionConfig(block_size=32), batch)
    ((plain, plain_targets),) = corrupt(MDLMConfig(loss="elbo"), batch)
    assert torch.equal(inputs.token_ids_BL[:, :32], plain.token_ids_BL)
    assert torch.equal(targets.weight_BL[:, :32], plain_targets.weight_BL)
    mask = inputs.attention_mask.dense()[0, 0]
    assert mask[:32, :32].all() and not mask[:32, 32:].any()


def test_each_block_has_its_own_time():
    ((_, targets),) = corrupt(BlockDiffusionConfig(block_size=8), tokens(4, 32))
    alpha = targets.alpha_BL[:, :32].unflatten(1, (4, 8))
    assert (alpha == alpha[..., :1]).all() and len(alpha[..., 0].unique()) == 16


# ---- truncated lengths ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "multiple"),
    [
        (MDLMConfig(ssl_ratio=0.5), 1),
        (DuoConfig(ssl_ratio=0.5), 1),
        (EsoLMConfig(ssl_ratio=0.5), 1),
        (BlockDiffusionConfig(ssl_ratio=0.5, block_size=8), 8),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_some_steps_are_cut_to_one_random_length(config, multiple):
    objective, lengths = config.build(VOCABULARY), []
    for start in range(0, 800, 2):
        batch = batch_of(tokens(2, 64).token_ids, start + np.arange(2))
        parts = [batch_of(batch.token_ids[i : i + 1], [start + i]) for i in range(2)]
        counts = {objective.corrupt(part, context(start, 2))[1].token_count for part in parts}
        assert len(counts) == 1
        lengths.append(counts.pop())
        whole = objective.corrupt(batch, context(start, 2, training=False))[1]
        assert whole.token_count == 128
    lengths = np.array(lengths)
    assert abs((lengths == 64).mean() - 0.5) < 0.1 and (lengths % multiple == 0).all()
    cut = lengths[lengths < 64]
    assert cut.min() <= 8 and abs(cut.mean() - 32) < 5


# ---- strata --------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [8, 24])
@pytest.mark.parametrize("share", [0.5, 0.25])
def test_times_are_tied_to_no_place_rank_or_dataset(n, share):
    """2,000 steps; datasets of a blend in a pseudo-random order, and in a periodic one as the worst case."""
    steps = 2000
    positions = np.arange(steps * n)
    times = np.concatenate(
        [
            stratified_times(positions[s : s + n], context(s, n), time_epsilon=0.0)[:, 0]
            for s in range(0, steps * n, n)
        ]
    ).reshape(steps, n)
    for place in range(n):
        counts, _ = np.histogram(times[:, place], bins=10, range=(0, 1))
        assert ((counts - steps / 10) ** 2 / (steps / 10)).sum() < 33  # 9 degrees of freedom, p = 1e-4
    # Every rank's share of a batch is spread: its mean varies less than that of independent times.
    assert times.reshape(steps, 4, n // 4).mean(axis=2).std() < 0.8 / (12 * n // 4) ** 0.5
    periodic = positions % int(1 / share) == 0
    shuffled = Permutation(len(positions), NoiseSource(3), "blend", 0)(positions) < share * len(positions)
    for dataset in (periodic, shuffled):
        chosen = times.ravel()[dataset]
        assert abs(chosen.mean() - 0.5) < 4 / (12 * len(chosen)) ** 0.5
        counts, _ = np.histogram(chosen, bins=10, range=(0, 1))
        assert (np.abs(counts / len(chosen) - 0.1) < 5 * (0.09 / len(chosen)) ** 0.5).all()


def test_the_reference_order_gives_rising_strata():
    times = stratified_times(np.arange(8), context(0, 8), time_epsilon=0.0, order="reference")[:, 0]
    assert np.floor(times * 8).tolist() == list(range(8))


# ---- configuration -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DuoConfig(time_conditioning=False), "objective.time_conditioning: False"),
        (lambda: EsoLMConfig(alpha_0=1.5), r"objective.alpha_0: 1.5 is outside \[0, 1\]"),
        (lambda: EsoLMConfig(alpha_0=-0.1), r"objective.alpha_0: -0.1 is outside \[0, 1\]"),
        (lambda: EsoLMConfig(alpha_0=1.0, batch_split=0.5), "objective.batch_split: 0.5 trains a part"),
        (lambda: EsoLMConfig(alpha_0=0.0), "objective.batch_split: 1.0 trains a part"),
        (
            lambda: EsoLMConfig(alpha_0=0.5, batch_split=1.0).check_sizes(8, 32),
            "both parts need at least one",
        ),
        (lambda: EsoLMConfig(alpha_0=0.5, batch_split=0.1).check_sizes(8, 32), "leaves 0 samples"),
        (lambda: MDLMConfig(ssl_ratio=2.0), r"objective.ssl_ratio: 2.0 is outside \[0, 1\]"),
        (lambda: BlockDiffusionConfig(block_size=0), "objective.block_size: 0 is below 1"),
        (
            lambda: BlockDiffusionConfig(block_size=7).check_sizes(8, 32),
            "7 does not divide data.seq_length 32",
        ),
        (lambda: CurriculumConfig(temperature=0.0), "objective.curriculum.temperature: 0.0 is not above 0"),
        (lambda: CurriculumConfig(gamma_min=0.0), "objective.curriculum.gamma_min: 0.0 is not below"),
        (
            lambda: DuoConfig(curriculum=CurriculumConfig(steps=1, top_k=50)).build(VOCABULARY),
            "objective.curriculum.top_k: 50 exceeds the 39 other states",
        ),
        (
            lambda: DuoConfig(curriculum=CurriculumConfig(steps=1, temperature=0.1)).build(VOCABULARY),
            "objective.curriculum.top_k: 16 drops",
        ),
        (
            lambda: DuoConfig(curriculum=CurriculumConfig(steps=1, gamma_min=-30.0)).build(VOCABULARY),
            "objective.curriculum.gamma_min: -30.0 leaves a token clean with probability 1",
        ),
        (
            lambda: DuoConfig(curriculum=CurriculumConfig(steps=1, gamma_max=30.0)).build(VOCABULARY),
            "objective.curriculum.gamma_max: 30.0 leaves a token clean with probability",
        ),
    ],
)
def test_impossible_configurations_are_named(build, message):
    with pytest.raises(InputError, match=message):
        build()
