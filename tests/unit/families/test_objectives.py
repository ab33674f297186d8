"""Schedules, times, corruption and losses against theory, brute force and recorded numbers."""

import itertools
import math

import numpy as np
import pytest
import torch

from megatron_dlm.diffusion.corruptions import absorb
from megatron_dlm.diffusion.cross_entropy import cross_entropy, cross_entropy_and_dlogits
from megatron_dlm.diffusion.noise_schedules import alpha_and_slope
from megatron_dlm.diffusion.time_sampling import scrambled_strata, stratified_times, van_der_corput_ranks
from megatron_dlm.families.ar.objective import ARConfig
from megatron_dlm.families.base import Objective, ObjectiveConfig, corruption_fingerprint
from megatron_dlm.families.mdlm.objective import MDLMConfig
from megatron_dlm.families.registry import OBJECTIVES
from megatron_dlm.interfaces import InputError, RowTargets
from megatron_dlm.platform.vocab_parallel import VocabShard
from tests.helpers.batches import batch_of, context, vocabulary


def whole(size, mask):
    return VocabShard.of_rank(vocabulary(size, mask), 0, None, 1)


def row_targets(clean, noisy=None, alpha=None):
    """Targets of rows with weight one."""
    ones = torch.ones(len(clean), dtype=torch.float64)
    return RowTargets(
        clean_R=clean,
        noisy_R=clean if noisy is None else noisy,
        alpha_R=0.5 * ones if alpha is None else alpha,
        weight_R=ones,
        bound_weight_R=ones,
    )


# ---- times -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 8, 12, 64, 100])
def test_strata_are_a_permutation_whose_slices_are_spread(n):
    for scramble in {0, n // 3, n - 1}:
        strata = scrambled_strata(n, scramble)
        assert sorted(strata) == list(range(n))
        if n in (8, 64):  # any aligned slice of 4 has one stratum in each quarter
            for start in range(0, n, 4):
                assert sorted(strata[start : start + 4] * 4 // n) == [0, 1, 2, 3]


@pytest.mark.parametrize(("n", "per_sample"), [(8, 1), (24, 1), (64, 1), (100, 1), (8, 4), (6, 4)])
def test_every_contiguous_slice_is_balanced(n, per_sample):
    """Aligned or not, of any length: a quarter of it in each quarter of the times, give or take one."""
    for step in range(20):
        positions = np.arange(step * n, step * n + n)
        times = stratified_times(positions, context(step * n, n), time_epsilon=0.0, per_sample=per_sample)
        quarters = np.eye(4)[np.floor(4 * times.ravel()).astype(int)]
        before = np.concatenate([np.zeros((1, 4)), quarters.cumsum(axis=0)])
        for length in range(1, n * per_sample + 1):
            counts = before[length:] - before[:-length]
            # Rotated orders, for n no power of two, join two such sequences.
            assert np.abs(counts - length / 4).max() < (
                1 if n * per_sample & (n * per_sample - 1) == 0 else 2
            )


def test_van_der_corput_order():
    assert van_der_corput_ranks(8).tolist() == [0, 4, 2, 6, 1, 5, 3, 7]


@pytest.mark.parametrize("n", [8, 12])
def test_times_are_uniform_at_every_place_over_steps(n):
    steps = 2000
    times = np.stack(
        [
            stratified_times(np.arange(s * n, s * n + n), context(s * n, n), time_epsilon=0.0)[:, 0]
            for s in range(steps)
        ]
    )
    for place in range(n):
        counts, _ = np.histogram(times[:, place], bins=10, range=(0, 1))
        assert ((counts - steps / 10) ** 2 / (steps / 10)).sum() < 33  # 9 degrees of freedom, p = 1e-4
    parity = times[:, 0::2].mean() - times[:, 1::2].mean()
    assert abs(parity) < 0.02


def test_each_batch_has_one_time_in_every_stratum():
    times = stratified_times(np.arange(32, 64), context(32, 32), time_epsilon=1e-3)
    strata = np.floor((times - 1e-3) / (1 - 1e-3) * 32).astype(int)
    assert sorted(strata[:, 0]) == list(range(32))
    assert np.array_equal(times[5:9], stratified_times(np.arange(37, 41), context(32, 32), time_epsilon=1e-3))


def test_time_epsilon_is_checked():
    with pytest.raises(InputError, match=r"time_epsilon: 1\.0 is outside"):
        MDLMConfig(time_epsilon=1.0)


# ---- schedules and corruption --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "end"),
    [("log-linear", 1e-3), ("linear", 0.0), ("cosine", 0.0)],
    ids=lambda value: str(value),
)
def test_schedule_value_and_derivative(schedule, end):
    t = np.linspace(0, 1, 11)
    alpha, dalpha = alpha_and_slope(schedule, t)
    assert alpha[0] == pytest.approx(1, rel=1e-15) and alpha[-1] == pytest.approx(end, abs=1e-15)
    assert (np.diff(alpha) < 0).all()
    h = 1e-6
    difference = (alpha_and_slope(schedule, t + h)[0] - alpha_and_slope(schedule, t - h)[0]) / (2 * h)
    assert np.allclose(difference, dalpha, atol=1e-8)
    scaled, slope = alpha_and_slope(schedule, t, alpha_0=0.5)
    assert np.allclose(scaled, alpha / 2) and np.allclose(slope, dalpha / 2)


def test_absorb_at_the_ends_and_in_between():
    clean = np.arange(12).reshape(3, 4)
    uniform = np.full((3, 4), 0.5)
    noisy, masked = absorb(clean, np.array([[1.0], [0.0], [0.5]]), uniform, 99)
    assert not masked[0].any() and masked[1].all() and not masked[2].any()
    assert np.array_equal(noisy[0], clean[0]) and (noisy[1] == 99).all()


def test_mdlm_masks_at_the_right_rate_and_weights_by_one_over_t():
    config = MDLMConfig()
    batch = batch_of(np.full((64, 2001), 5), np.arange(64))
    inputs, targets = config.build(vocabulary(9, 3)).corrupt(batch, context(0, 64))
    t = stratified_times(np.arange(64), context(0, 64), time_epsilon=1e-3)[:, 0]
    masked = inputs.token_ids_BL.numpy() == 3
    assert np.abs(masked.mean(1) - (1 - 1e-3) * t).max() < 0.05
    assert np.array_equal(targets.weight_BL.numpy(), masked)
    assert np.allclose(targets.bound_weight_BL.numpy(), masked / t[:, None], rtol=1e-12)
    assert targets.token_count == 64 * 2000
    # In expectation the bound's weights add up to one a token.
    assert targets.bound_weight_BL.mean() == pytest.approx(1.0, abs=0.05)


def test_low_variance_weights_are_for_training_only():
    batch = batch_of(np.full((8, 65), 5), np.arange(8))
    low, elbo = (MDLMConfig(loss=name).build(vocabulary(9, 3)) for name in ("low-variance", "elbo"))
    _, training = low.corrupt(batch, context(training=True))
    _, validation = low.corrupt(batch, context(training=False))
    _, exact = elbo.corrupt(batch, context(training=True))
    assert set(training.weight_BL.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(validation.weight_BL, validation.bound_weight_BL)
    assert torch.equal(exact.weight_BL, exact.bound_weight_BL)
    assert torch.equal(training.bound_weight_BL, exact.bound_weight_BL)


def test_ar_shifts_and_scores_the_look_ahead():
    tokens = np.arange(10).reshape(2, 5)
    inputs, targets = ARConfig().build(vocabulary(99, 98)).corrupt(batch_of(tokens, [0, 1]), context())
    assert inputs.token_ids_BL.tolist() == [[0, 1, 2, 3], [5, 6, 7, 8]]
    assert targets.clean_BL.tolist() == [[1, 2, 3, 4], [6, 7, 8, 9]]
    assert targets.token_count == 8 and (targets.weight_BL == 1).all()


@pytest.mark.parametrize("config", [config() for config in OBJECTIVES.values()], ids=OBJECTIVES)
def test_corruption_does_not_depend_on_how_the_batch_is_cut(config):
    objective = config.build(vocabulary(50, 7))
    tokens = np.random.default_rng(0).integers(8, 50, (16, 33))

    def corrupt(positions):
        batch = batch_of(tokens[positions], 160 + positions)
        return batch, *objective.corrupt(batch, context(160, 16))

    batch, inputs, targets = corrupt(np.arange(16))
    fingerprints = 0
    for start in range(0, 16, 4):
        part, part_inputs, part_targets = corrupt(np.arange(start, start + 4))
        assert torch.equal(part_inputs.token_ids_BL, inputs.token_ids_BL[start : start + 4])
        assert torch.equal(part_targets.bound_weight_BL, targets.bound_weight_BL[start : start + 4])
        fingerprints += corruption_fingerprint(part_inputs, part_targets, part)
    assert fingerprints % 2**63 == corruption_fingerprint(inputs, targets, batch)


def test_fingerprint_sees_a_single_changed_token():
    objective = MDLMConfig().build(vocabulary(50, 7))
    batch = batch_of(np.full((2, 9), 11), [0, 1])
    inputs, targets = objective.corrupt(batch, context())
    before = corruption_fingerprint(inputs, targets, batch)
    inputs.token_ids_BL[1, 4] = 12
    assert corruption_fingerprint(inputs, targets, batch) != before


def test_no_family_is_an_error():
    with pytest.raises(TypeError, match="is no family"):
        ObjectiveConfig().build(vocabulary(9, 3))


# ---- cross-entropy -------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [0, 3, 10])
def test_cross_entropy_leaves_the_mask_out(mask):
    torch.manual_seed(0)
    logits = torch.randn(20, 11, dtype=torch.float64)
    clean = torch.tensor([i for i in range(11) if i != mask] * 2)
    keep = [i for i in range(11) if i != mask]
    expected = torch.stack([logits[r, keep].logsumexp(0) - logits[r, c] for r, c in enumerate(clean)])
    assert torch.allclose(cross_entropy(logits.clone(), clean, whole(11, mask)), expected, rtol=1e-12)


def test_closed_form_gradient_equals_autograd_and_finite_differences():
    torch.manual_seed(1)
    logits = torch.randn(6, 9, dtype=torch.float64)
    targets = row_targets(torch.tensor([0, 1, 2, 4, 5, 8]))
    vocab = whole(9, 3)
    objective = MDLMConfig().build(vocab.vocabulary)
    losses, dlogits = cross_entropy_and_dlogits(logits.clone(), targets.clean_R, vocab)
    default_losses, default_dlogits = Objective.loss_and_dlogits(objective, logits.clone(), targets, vocab)
    assert torch.allclose(losses, default_losses, rtol=1e-12)
    assert torch.allclose(dlogits, default_dlogits, rtol=1e-9, atol=1e-14)
    assert (dlogits[:, 3] == 0).all()
    step = 1e-6
    for row, column in itertools.product(range(6), (0, 4, 8)):
        up, down = logits.clone(), logits.clone()
        up[row, column] += step
        down[row, column] -= step
        difference = (
            cross_entropy(up, targets.clean_R, vocab) - cross_entropy(down, targets.clean_R, vocab)
        )[row]
        assert dlogits[row, column].item() == pytest.approx(difference.item() / (2 * step), abs=1e-8)


def test_perfect_logits_cost_nothing():
    clean = torch.tensor([1, 2])
    logits = torch.full((2, 5), -1e4)
    logits[torch.arange(2), clean] = 1e4
    losses, dlogits = cross_entropy_and_dlogits(logits, clean, whole(5, 3))
    assert losses.tolist() == [0, 0] and (dlogits == 0).all()


# ---- the bound -----------------------------------------------------------------------------------


def test_bound_is_above_the_true_nll_and_tight_for_the_true_model():
    """V = 3 + mask, L = 2: the NELBO with the true conditionals, enumerated, equals -log p(x)."""
    rng = np.random.default_rng(0)
    joint = rng.dirichlet(np.ones(9)).reshape(3, 3)

    def conditional(visible):
        table = joint
        for axis, token in visible.items():
            table = np.take(table, [token], axis=axis)
        table = table / table.sum()
        return [table.sum(axis=1 - axis).ravel() for axis in range(2)]

    def bound(x, spoil):
        """Integral over t of sum over masks of P(mask | t) sum_masked CE / t, in closed form per mask."""
        total = 0.0
        for masked in ([0], [1], [0, 1]):
            visible = {axis: x[axis] for axis in range(2) if axis not in masked}
            nats = 0.0
            for axis in masked:
                p = conditional(visible)[axis]
                p = (1 - spoil) * p + spoil / len(p) if len(p) == 3 else p
                nats -= math.log(p[x[axis]])
            # integral of t^(m-1) (1-t)^(2-m) dt
            m = len(masked)
            total += nats * math.gamma(m) * math.gamma(3 - m) / math.gamma(3)
        return total

    for x in itertools.product(range(3), repeat=2):
        nll = -math.log(joint[x])
        # The exact bound averages the chain rule over both orders: equal to the NLL for the true model.
        assert bound(x, spoil=0.0) == pytest.approx(nll, rel=1e-12)
    expected_nll = -sum(joint[x] * math.log(joint[x]) for x in itertools.product(range(3), repeat=2))
    spoiled = sum(joint[x] * bound(x, spoil=0.3) for x in itertools.product(range(3), repeat=2))
    assert spoiled > expected_nll + 1e-4


def test_monte_carlo_bound_of_our_corruption_equals_the_enumerated_one():
    """A fixed context-free model: the NELBO is L times the cross-entropy, whatever the masks."""
    p = np.array([0.5, 0.3, 0.2])
    objective = MDLMConfig(time_epsilon=0.0).build(vocabulary(4, 3))
    tokens = np.random.default_rng(1).choice(3, p=p, size=(4096, 9))
    _, targets = objective.corrupt(batch_of(tokens, np.arange(4096)), context(0, 4096, training=False))
    nats = -np.log(p)[targets.clean_BL.numpy()]
    estimate = (nats * targets.bound_weight_BL.numpy()).sum() / targets.token_count
    # The dropped interval of the schedule: weights integrate to 1 - 1e-3 over t in (0, 1].
    assert estimate == pytest.approx(nats.mean(), rel=0.03)
