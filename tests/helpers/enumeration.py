"""Every corruption of a few tokens over a vocabulary of three, and integrals over time, in float64."""

import itertools
from functools import lru_cache

import numpy as np
import torch

from megatron_dlm.diffusion.context import CorruptionContext
from megatron_dlm.interfaces import TokenBatch, Vocabulary
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
        noise=FixedDraws(**draws), step=0, batch_start=0, global_batch_size=1, training=training
    )
    batch = TokenBatch(token_ids=torch.tensor([[*x, 0]]), sample_indices=np.zeros(1, dtype=np.int64))
    return config.build(VOCABULARY).corrupt(batch, context)


def nats(config, targets, logits_BLV):
    """The bound's sum over one sample, by the objective's own row losses."""
    rows = targets.weight_BL.nonzero(as_tuple=True)
    row_targets = targets.rows(lambda values: values[rows])
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
