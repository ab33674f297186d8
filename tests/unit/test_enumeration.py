"""Bounds on a vocabulary of three and two or three tokens, where everything can be enumerated in float64.

The reference side is independent: joint tables, sums over orders, and the reverse process integrated as a
Markov chain over all sequences. The package's side is its own corruption weights and row losses, summed over
every corruption and integrated over time.
"""

import itertools
import math
from functools import cache, lru_cache

import numpy as np
import pytest
import torch

from megatron_dlm.interfaces import RowTargets, TokenBatch, Vocabulary
from megatron_dlm.objectives.base import CorruptionContext
from megatron_dlm.objectives.block_diffusion import BlockDiffusionConfig
from megatron_dlm.objectives.duo import DuoConfig
from megatron_dlm.objectives.esolm import EsoLMConfig
from megatron_dlm.objectives.mdlm import MDLMConfig
from megatron_dlm.platform.rng import NoiseSource
from megatron_dlm.platform.vocab_parallel import VocabShard

TOKENS = 3
MASK = 3
VOCABULARY = Vocabulary(size=TOKENS + 1, mask_token_id=MASK, eos_token_id=0, bos_token_id=0)
SCHEDULES = ("log-linear", "linear", "cosine")


class FixedDraws(NoiseSource):
    """Draws that a test lays down, by stream."""

    def __init__(self, **draws):
        super().__init__(0)
        object.__setattr__(self, "draws", {name.replace("__", "/"): draws[name] for name in draws})

    def uniform(self, stream, positions, count):
        return np.broadcast_to(
            np.asarray(self.draws[stream], dtype=np.float64), (len(positions), count)
        ).copy()

    def integer(self, stream, position, bound):
        return self.draws.get(stream, 0)

    def integers(self, stream, positions, count, bound):
        return np.broadcast_to(np.asarray(self.draws[stream], dtype=np.int64), (len(positions), count)).copy()


def corrupt(config, x, draws, *, training=False):
    """One sample through the objective at laid-down draws; time jitter is the time itself (eps = 0)."""
    context = CorruptionContext(
        noise=FixedDraws(**draws), batch_start=0, global_batch_size=1, training=training
    )
    batch = TokenBatch(token_ids=torch.tensor([[*x, 0]]), sample_indices=np.zeros(1, dtype=np.int64))
    return config.build(VOCABULARY).corrupt(batch, context)


def nats(config, targets, logits_BLV):
    """The bound's sum over one sample, by the objective's own row losses."""
    rows = targets.weight_BL.nonzero(as_tuple=True)
    row_targets = RowTargets(
        **{f"{n.removesuffix('_BL')}_R": v[rows] for n, v in vars(targets).items() if n.endswith("_BL")}
    )
    vocab = VocabShard.of_rank(VOCABULARY, 0, None, 1)
    losses, _ = config.build(VOCABULARY).loss_and_dlogits(logits_BLV[rows].clone(), row_targets, vocab)
    return float((losses * row_targets.bound_weight_R).sum())


def with_mask_column(p):
    """Logits [.., 4] of probabilities [.., 3]; the mask's is arbitrary."""
    p = torch.as_tensor(p, dtype=torch.float64)
    return torch.cat([p.log(), torch.full((*p.shape[:-1], 1), 7.0, dtype=torch.float64)], dim=-1)


@lru_cache
def quadrature(points=64):
    """Gauss-Legendre nodes on (0, 1), crowded towards both ends, where derivatives are singular."""
    nodes, weights = np.polynomial.legendre.leggauss(points)
    s, weights = (nodes + 1) / 2, weights / 2
    for _ in range(2):
        weights = weights * 6 * s * (1 - s)
        s = s * s * (3 - 2 * s)
    return s, weights


def over_time(integrand):
    nodes, weights = quadrature()
    return sum(w * integrand(t) for t, w in zip(nodes, weights, strict=True))


def seeded_joint(length, seed=0):
    return np.random.default_rng(seed).dirichlet(np.ones(TOKENS**length)).reshape([TOKENS] * length)


def masked_table(length, seed):
    """An arbitrary denoiser: p [L, 3] for each partly masked sequence, not from any joint."""
    generator = np.random.default_rng(seed)
    return {
        z: generator.dirichlet(np.ones(TOKENS), size=length)
        for z in itertools.product(range(TOKENS + 1), repeat=length)
    }


def true_conditionals(joint):
    """The denoiser of the joint itself."""
    length = joint.ndim
    table = {}
    for z in itertools.product(range(TOKENS + 1), repeat=length):
        kept = tuple(slice(None) if token == MASK else slice(token, token + 1) for token in z)
        part = joint[kept] / joint[kept].sum()
        rows = []
        for axis in range(length):
            marginal = part.sum(tuple(a for a in range(length) if a != axis))
            rows.append(marginal if z[axis] == MASK else np.eye(TOKENS)[z[axis]])
        table[z] = np.array(rows)
    return table


def mask_sets(length):
    return itertools.product((False, True), repeat=length)


# ---- MDLM ----------------------------------------------------------------------------------------


def mdlm_nelbo(table, x, config):
    """Integral over t in [0, 1] of the sum over mask sets of P(set | t) times the objective's loss."""

    def at(t):
        total = 0.0
        for masked in mask_sets(len(x)):
            # Masks are drawn where u < 1 - alpha.
            inputs, targets = corrupt(
                config, x, {"time__jitter": t, "mask": np.where(masked, 0.0, 1 - 1e-16)}
            )
            masking = 1.0 - float(targets.alpha_BL[0, 0])
            probability = math.prod(masking if m else 1 - masking for m in masked)
            z = tuple(inputs.token_ids_BL[0].tolist())
            total += probability * nats(config, targets, with_mask_column(table[z])[None])
        return total

    return over_time(at)


def expected_over_orders(table, x):
    """Mean and mean of the log of the sequential likelihood over all orders."""
    logs = []
    for order in itertools.permutations(range(len(x))):
        z, log_p = [MASK] * len(x), 0.0
        for place in order:
            log_p += math.log(table[tuple(z)][place][x[place]])
            z[place] = x[place]
        logs.append(log_p)
    return -math.log(np.mean(np.exp(logs))), -np.mean(logs)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("length", [2, 3])
def test_mdlm_is_the_mean_over_orders_and_bounds_the_likelihood(schedule, length):
    table = masked_table(length, seed=1)
    config = MDLMConfig(noise_schedule=schedule, time_epsilon=0.0, loss="elbo")
    for x in list(itertools.product(range(TOKENS), repeat=length))[:: 2 if length == 2 else 7]:
        true_nll, analytic = expected_over_orders(table, x)
        found = mdlm_nelbo(table, x, config)
        if schedule == "log-linear":
            # alpha(1) = 1e-3: the prior term of tokens already clean at t = 1 completes the bound.
            found += mdlm_prior(table, x)
        assert found == pytest.approx(analytic, rel=1e-9)
        assert found > true_nll + 1e-6


def mdlm_prior(table, x):
    """What the time above alpha = 1e-3 would add: the same integrand, written in alpha, from 1e-3 to 0."""
    nodes, weights = quadrature()
    total = 0.0
    for share, weight in zip(nodes, weights, strict=True):
        alpha = 1e-3 * share
        for masked in mask_sets(len(x)):
            z = tuple(MASK if m else token for m, token in zip(masked, x, strict=True))
            probability = math.prod(1 - alpha if m else alpha for m in masked)
            cost = -sum(math.log(table[z][i][x[i]]) for i in range(len(x)) if masked[i])
            total += weight * 1e-3 * probability * cost / (1 - alpha)
    return total


def test_the_protocol_bound_misses_the_analytic_part():
    """eps = 1e-3: times below it are never drawn and the rest stands for the whole interval."""
    table, x = masked_table(2, seed=2), (0, 2)
    complete = MDLMConfig(time_epsilon=0.0, loss="elbo")
    protocol = MDLMConfig(time_epsilon=1e-3, loss="elbo")
    reported = mdlm_nelbo(table, x, protocol)
    # Both masked tokens' costs with the closed form of integral w t^(m-1) (1-t)^(2-m) dt, w = 0.999^m.
    missing = 0.0
    for masked in mask_sets(2):
        z = tuple(MASK if m else token for m, token in zip(masked, x, strict=True))
        cost = -sum(math.log(table[z][i][x[i]]) for i in range(2) if masked[i])
        m = sum(masked)
        if m == 1:
            missing += cost * 0.999 * (1e-3 - 0.999 * 1e-6 / 2)
        elif m == 2:
            missing += cost * 0.999**2 * 1e-6 / 2
    full = mdlm_nelbo(table, x, complete)
    assert reported * (1 - 1e-3) == pytest.approx(full - missing, rel=1e-9)
    assert full + mdlm_prior(table, x) == pytest.approx(expected_over_orders(table, x)[1], rel=1e-9)


def test_mdlm_of_the_true_conditionals_is_tight():
    joint = seeded_joint(2)
    table = true_conditionals(joint)
    config = MDLMConfig(noise_schedule="linear", time_epsilon=0.0, loss="elbo")
    for x in itertools.product(range(TOKENS), repeat=2):
        assert mdlm_nelbo(table, x, config) == pytest.approx(-math.log(joint[x]), rel=1e-9)


# ---- Duo -----------------------------------------------------------------------------------------


def uniform_rate(alpha, dalpha):
    """Rate at which one token jumps to each state of K."""
    return -dalpha / alpha / TOKENS


def exact_denoiser(joint, alpha):
    """P(x_l = v | the other noisy token) for every z, from the joint, as {z: [L, K]}.

    The rates of the loss divide mixtures of the prediction, so the exact reverse process needs the posterior
    that leaves out the position's own noisy token: only then is the ratio of means the mean of ratios.
    """
    kernel = alpha * np.eye(TOKENS) + (1 - alpha) / TOKENS
    means = {}
    for z in itertools.product(range(TOKENS), repeat=2):
        first, second = (joint * kernel[:, z[1]]).sum(1), (joint * kernel[:, z[0], None]).sum(0)
        means[z] = np.array([first / first.sum(), second / second.sum()])
    return means


def tilted_means(joint, alpha):
    """A wrong denoiser: the right one mixed with a fixed table that depends on z."""
    return {
        z: 0.7 * p + 0.3 * np.random.default_rng(sum(z) + 10).dirichlet(np.ones(TOKENS), size=2)
        for z, p in exact_denoiser(joint, alpha).items()
    }


def duo_nelbo(denoiser, joint, x):
    """The objective's own loss over all replaced tokens, integrated over t; linear schedule, mask out."""
    config = DuoConfig(noise_schedule="linear", time_epsilon=0.0, mask_in_noise=False)

    def at(t):
        alpha, total = 1 - t, 0.0
        means = denoiser(joint, alpha)
        for z in itertools.product(range(TOKENS), repeat=2):
            draws = {"time__jitter": t, "duo__replace": 0.0, "duo__token": z}
            inputs, targets = corrupt(config, x, draws)
            assert tuple(inputs.token_ids_BL[0].tolist()) == z
            kept = [alpha * (a == b) + (1 - alpha) / TOKENS for a, b in zip(x, z, strict=True)]
            total += math.prod(kept) * nats(config, targets, with_mask_column(means[z])[None])
        return total

    return over_time(at)


def duo_rate_divergence(denoiser, joint, x):
    """The same bound from jump rates alone: sum over jumps of R_m - R + R ln(R / R_m)."""

    def ratio(p, alpha, z, v):
        return (TOKENS * alpha * p[v] + 1 - alpha) / (TOKENS * alpha * p[z] + 1 - alpha)

    def at(t):
        alpha, total = 1 - t, 0.0
        means, rate = denoiser(joint, alpha), uniform_rate(1 - t, -1.0)
        for z in itertools.product(range(TOKENS), repeat=2):
            kept = [alpha * (a == b) + (1 - alpha) / TOKENS for a, b in zip(x, z, strict=True)]
            cost = 0.0
            for place, v in itertools.product(range(2), range(TOKENS)):
                if v == z[place]:
                    continue
                true = rate * ratio(np.eye(TOKENS)[x[place]], alpha, z[place], v)
                model = rate * ratio(means[z][place], alpha, z[place], v)
                cost += model - true + true * math.log(true / model)
            total += math.prod(kept) * cost
        return total

    return over_time(at)


def test_duo_is_the_divergence_of_jump_rates():
    joint = seeded_joint(2)
    for x in [(0, 0), (1, 2)]:
        found = duo_nelbo(tilted_means, joint, x)
        assert found == pytest.approx(duo_rate_divergence(tilted_means, joint, x), rel=1e-9)


def test_duo_of_the_exact_denoiser_has_the_entropy_of_the_data():
    """alpha(1) = 0 makes the prior exact, so the mean bound of the exact reverse process is the entropy."""
    joint = seeded_joint(2, seed=3)
    sequences = list(itertools.product(range(TOKENS), repeat=2))
    bound = sum(joint[x] * duo_nelbo(exact_denoiser, joint, x) for x in sequences)
    assert bound == pytest.approx(-(joint * np.log(joint)).sum(), rel=1e-9)


def posterior_mean(joint, alpha):
    """E[x_l = v | all of z]: what a classifier of the noisy text would learn."""
    kernel = alpha * np.eye(TOKENS) + (1 - alpha) / TOKENS
    means = {}
    for z in itertools.product(range(TOKENS), repeat=2):
        weight = joint * np.outer(kernel[:, z[0]], kernel[:, z[1]])
        weight = weight / weight.sum()
        means[z] = np.array([weight.sum(1), weight.sum(0)])
    return means


def test_duo_of_the_posterior_mean_is_not_tight():
    joint = seeded_joint(2, seed=3)
    sequences = list(itertools.product(range(TOKENS), repeat=2))
    bound = sum(joint[x] * duo_nelbo(posterior_mean, joint, x) for x in sequences)
    assert bound > -(joint * np.log(joint)).sum() + 0.1


def model_likelihood(denoiser, joint):
    """The law of the reverse chain at t = 0, from uniform at t = 1, by its master equation."""
    sequences = list(itertools.product(range(TOKENS), repeat=2))
    index = {z: i for i, z in enumerate(sequences)}

    def generator(t):
        alpha, rates = 1 - t, np.zeros((len(sequences), len(sequences)))
        means, rate = denoiser(joint, alpha), uniform_rate(alpha, -1.0)
        for z in sequences:
            for place, v in itertools.product(range(2), range(TOKENS)):
                if v != z[place]:
                    p = means[z][place]
                    up = TOKENS * alpha * p[v] + 1 - alpha
                    down = TOKENS * alpha * p[z[place]] + 1 - alpha
                    y = tuple(v if i == place else z[i] for i in range(2))
                    rates[index[z], index[y]] += rate * up / down
        return rates - np.diag(rates.sum(1))

    # Runge-Kutta in the log-odds of alpha, in which no rate is large; dt = -alpha (1 - alpha) d log-odds.
    def flow(log_odds):
        alpha = 1 / (1 + math.exp(-log_odds))
        return alpha * (1 - alpha) * generator(1 - alpha)

    law, h = np.full(len(sequences), 1 / len(sequences)), 0.1
    for log_odds in np.arange(-16, 16, h):
        middle = flow(log_odds + h / 2)
        k1 = law @ flow(log_odds)
        k2 = (law + h / 2 * k1) @ middle
        k3 = (law + h / 2 * k2) @ middle
        k4 = (law + h * k3) @ flow(log_odds + h)
        law = law + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return {z: law[index[z]] for z in sequences}


def test_duo_bounds_the_likelihood_of_its_reverse_chain():
    joint = seeded_joint(2)
    law = model_likelihood(tilted_means, joint)
    assert sum(law.values()) == pytest.approx(1.0, abs=1e-6)
    for x in itertools.product(range(TOKENS), repeat=2):
        bound = duo_nelbo(tilted_means, joint, x)
        assert bound > -math.log(law[x]) - 1e-6
    exact = model_likelihood(exact_denoiser, joint)
    for x in itertools.product(range(TOKENS), repeat=2):
        assert exact[x] == pytest.approx(joint[x], rel=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_duo_does_not_depend_on_the_schedule(schedule):
    """The bound is an integral over alpha; what log-linear leaves out lies below alpha = 1e-3."""
    joint, x = seeded_joint(2), (1, 2)
    config = DuoConfig(noise_schedule=schedule, time_epsilon=0.0, mask_in_noise=False)

    def at(t):
        total = 0.0
        for z in itertools.product(range(TOKENS), repeat=2):
            _, targets = corrupt(config, x, {"time__jitter": t, "duo__replace": 0.0, "duo__token": z})
            alpha = float(targets.alpha_BL[0, 0])
            kept = [alpha * (a == b) + (1 - alpha) / TOKENS for a, b in zip(x, z, strict=True)]
            logits = with_mask_column(tilted_means(joint, alpha)[z])[None]
            total += math.prod(kept) * nats(config, targets, logits)
        return total

    expected = duo_nelbo(tilted_means, joint, x)
    if schedule == "log-linear":
        assert 0 < expected - over_time(at) < 1e-5
    else:
        assert over_time(at) == pytest.approx(expected, rel=1e-9)


# ---- Eso-LM --------------------------------------------------------------------------------------


def ordered_table(length, seed):
    """A denoiser that sees tokens in an order: p of the next place given (place, token) pairs before it."""

    @cache
    def predict(seen, place):
        key = hash((seed, seen, place)) % 2**32
        return np.random.default_rng(key).dirichlet(np.ones(TOKENS))

    return predict


def eso_diffusion(config, predict, x, order_draws):
    """Integral over t and sum over mask sets of the objective's diffusion loss at one order of draws.

    Causal attention: a masked place sees the clean tokens and the masked places before it, and masks carry
    no news; so its prediction depends on the clean set alone.
    """

    def at(t):
        total = 0.0
        for masked in mask_sets(len(x)):
            draws = {"time__jitter": t, "mask": np.where(masked, 0.0, 1 - 1e-16), "esolm__order": order_draws}
            inputs, targets = corrupt(config, x, draws)
            masking = 1.0 - float(targets.alpha_BL[0, 0])
            probability = math.prod(masking if m else 1 - masking for m in masked)
            order = inputs.position_ids_BL[0].tolist()
            clean = tuple((i, x[i]) for i in order if not masked[i])
            p = np.stack([predict(tuple(sorted(clean)), i) for i in order])
            total += probability * nats(config, targets, with_mask_column(p)[None])
        return total

    return over_time(at)


def eso_sequential(config, predict, x):
    """Sum over the masks of z_0 of the objective's sequential loss."""
    total = 0.0
    for masked in mask_sets(len(x)):
        draws = {
            "esolm__sequential-mask": np.where(masked, 0.0, 1 - 1e-16),
            "esolm__sequential-order": np.linspace(0, 0.9, len(x)),
        }
        inputs, targets = corrupt(config, x, draws)
        masking = 1 - config.alpha_0
        probability = math.prod(masking if m else 1 - masking for m in masked)
        order = inputs.position_ids_BL[0, : len(x)].tolist()
        mask = inputs.attention_mask[0, 0]
        rows = []
        for row in range(2 * len(x)):
            # What the row may see of the clean half, by the objective's own mask.
            seen = [j for j in range(len(x)) if mask[row, len(x) + j] and row < len(x)]
            clean = tuple(sorted((order[j], x[order[j]]) for j in seen))
            rows.append(predict(clean, order[row % len(x)]))
        total += probability * nats(config, targets, with_mask_column(np.stack(rows))[None])
    return total


def eso_likelihood(predict, x, alpha_0):
    """-ln p(x) of the two-stage model, and the mean of its -ln over masks and orders."""
    places = range(len(x))
    mean, mean_log = 0.0, 0.0
    for masked in mask_sets(len(x)):
        probability = math.prod(1 - alpha_0 if m else alpha_0 for m in masked)
        first = [i for i in places if not masked[i]]
        rest = [i for i in places if masked[i]]
        orders = list(itertools.permutations(first))
        for order in orders:
            seen, log_p = [], 0.0
            for place in (*order, *rest):
                log_p += math.log(predict(tuple(sorted(seen)), place)[x[place]])
                seen.append((place, x[place]))
            mean += probability / len(orders) * math.exp(log_p)
            mean_log += probability / len(orders) * log_p
    return -math.log(mean), -mean_log


@pytest.mark.parametrize("alpha_0", [0.0, 0.3, 1.0])
def test_eso_lm_bounds_its_two_stage_likelihood(alpha_0):
    predict, x = ordered_table(3, seed=5), (0, 2, 1)
    found = 0.0
    if alpha_0 > 0:
        config = EsoLMConfig(
            alpha_0=alpha_0, batch_split=1.0, noise_schedule="linear", time_epsilon=0.0, loss="elbo"
        )
        found += eso_diffusion(config, predict, x, np.array([0.2, 0.5, 0.1]))
    if alpha_0 < 1:
        found += eso_sequential(EsoLMConfig(alpha_0=alpha_0, batch_split=0.0, loss="elbo"), predict, x)
    true_nll, analytic = eso_likelihood(predict, x, alpha_0)
    assert found == pytest.approx(analytic, rel=1e-9)
    if alpha_0 == 0:
        # Left to right: the exact autoregressive likelihood.
        assert found == pytest.approx(true_nll, rel=1e-9)
    else:
        assert found > true_nll + 1e-6


def test_eso_lm_without_sequential_part_is_mdlm():
    """The same diffusion bound as MDLM's, of a denoiser that reads sets of clean tokens."""
    predict, x = ordered_table(3, seed=6), (2, 0, 1)
    table = {}
    for z in itertools.product(range(TOKENS + 1), repeat=3):
        clean = tuple((i, token) for i, token in enumerate(z) if token != MASK)
        table[z] = np.stack([predict(clean, i) for i in range(3)])
    config = EsoLMConfig(noise_schedule="linear", time_epsilon=0.0, loss="elbo")
    mdlm = MDLMConfig(noise_schedule="linear", time_epsilon=0.0, loss="elbo")
    found = eso_diffusion(config, predict, x, np.array([0.3, 0.2, 0.8]))
    assert found == pytest.approx(mdlm_nelbo(table, x, mdlm), rel=1e-9)


# ---- Block diffusion -----------------------------------------------------------------------------


def block_nelbo(config, predict, x):
    """The objective's loss: mean over strata, sum over mask sets, integral over the jitter."""
    length = len(x)
    num_blocks = length // config.block_size

    def at(jitter):
        total = 0.0
        for scramble, masked in itertools.product(range(num_blocks), mask_sets(length)):
            mask_draws = np.where(masked, 0.0, 1 - 1e-16)
            draws = {"time__jitter": jitter, "time__scramble": scramble, "mask": mask_draws}
            inputs, targets = corrupt(config, x, draws)
            alphas = targets.alpha_BL[0, :length].tolist()
            probability = math.prod(1 - a if m else a for m, a in zip(masked, alphas, strict=True))
            mask, ids = inputs.attention_mask[0, 0], inputs.token_ids_BL[0].tolist()
            rows = []
            for row in range(2 * length):
                seen = {(j % length, ids[j]) for j in range(2 * length) if mask[row, j] and ids[j] != MASK}
                rows.append(predict(tuple(sorted(seen)), row % length))
            logits = with_mask_column(np.stack(rows))[None]
            total += probability * nats(config, targets, logits) / num_blocks
        return total

    return over_time(at)


def test_block_diffusion_runs_from_autoregression_to_mdlm():
    predict, x = ordered_table(2, seed=7), (2, 1)
    fields = {"noise_schedule": "linear", "time_epsilon": 0.0, "loss": "elbo"}
    sequential = -math.log(predict((), 0)[x[0]]) - math.log(predict(((0, x[0]),), 1)[x[1]])
    found = block_nelbo(BlockDiffusionConfig(block_size=1, **fields), predict, x)
    assert found == pytest.approx(sequential, rel=1e-9)
    table = {}
    for z in itertools.product(range(TOKENS + 1), repeat=2):
        clean = tuple((i, token) for i, token in enumerate(z) if token != MASK)
        table[z] = np.stack([predict(clean, i) for i in range(2)])
    found = block_nelbo(BlockDiffusionConfig(block_size=2, **fields), predict, x)
    assert found == pytest.approx(mdlm_nelbo(table, x, MDLMConfig(**fields)), rel=1e-9)
