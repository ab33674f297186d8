"""Pieces of the samplers: draws have their law, posteriors are Bayes' rule, plans cover every position."""

import itertools

import numpy as np
import pytest
import torch

from megatron_dlm.sampling.categorical import CHUNK_BYTES, Sharpening, draw, keep_nucleus, logit_chunks
from megatron_dlm.sampling.decoding_plan import (
    GIVEN,
    ancestral_part,
    block_autoregressive_part,
    block_part,
    in_blocks,
    plan_of,
    reveal_shares,
)
from megatron_dlm.sampling.eos import finish_ended
from megatron_dlm.sampling.replacing import posterior_shares, psi_shares

DRAWS = 40_000


def uniform(*shape, seed=0):
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_draws_have_the_weights_law():
    weights = torch.tensor([0.0, 3.0, 1.0, 6.0, 0.0], dtype=torch.float64)
    drawn = draw(weights.expand(DRAWS, 5), uniform(DRAWS))
    counts = torch.bincount(drawn, minlength=5).double()
    assert counts[0] == counts[4] == 0
    expected = DRAWS * weights[1:4] / 10
    assert float(((counts[1:4] - expected) ** 2 / expected).sum()) < 21  # 2 degrees of freedom, p = 3e-5


def test_no_draw_has_weight_0():
    weights = torch.tensor([[0.0, 1e-300, 0.0], [0.0, 0.7, 0.0], [0.3, 0.1, 0.0]], dtype=torch.float64)
    largest = torch.full((3,), 1 - 2.0**-53, dtype=torch.float64)
    assert draw(weights, largest).tolist() == [1, 1, 1]
    assert draw(weights, torch.zeros(3, dtype=torch.float64)).tolist() == [1, 1, 0]


def test_nucleus_keeps_the_fewest_ids_that_hold_the_mass():
    logits = torch.tensor([0.4, 0.1, 0.3, 0.2]).log()
    assert torch.isfinite(keep_nucleus(logits, 0.65)).tolist() == [True, False, True, False]
    assert torch.isfinite(keep_nucleus(logits, 0.01)).tolist() == [True, False, False, False]
    assert torch.equal(keep_nucleus(logits, 1.0), logits)


def test_sharpening():
    logits = torch.tensor([[0.0, 1.0, -torch.inf]])
    assert Sharpening(temperature=0)(logits).tolist() == [[0.0, 1.0, 0.0]]
    found = Sharpening(temperature=0.5)(logits)
    assert found.dtype == torch.float64
    assert torch.allclose(found[0, :2], torch.tensor([0.0, 2.0], dtype=torch.float64).softmax(0))


def test_logits_come_in_pieces_that_cover_all_rows(monkeypatch):
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 8 * 4 * 3)
    hidden, sizes = torch.arange(10.0)[:, None], []
    pieces = list(logit_chunks(lambda h: sizes.append(len(h)) or h.expand(-1, 4), hidden, 4))
    assert torch.equal(torch.cat([logits[:, 0] for _, logits in pieces]), hidden[:, 0])
    assert sizes == [3, 3, 3, 1]


@pytest.mark.parametrize("mask_in_noise", [True, False])
def test_posterior_is_bayes_rule(mask_in_noise):
    size, mask, alpha_t, alpha_s = 5, 2, 0.3, 0.8
    states = torch.tensor([v != mask or mask_in_noise for v in range(size)])
    count, ratio = int(states.sum()), alpha_t / alpha_s
    clean, noisy = 4, 1
    forward = torch.zeros(size, size, dtype=torch.float64)
    for v in range(size):
        for w in range(size):
            forward[v, w] = ratio * (v == w) + (1 - ratio) / count * float(states[w])
    prior = alpha_s * torch.eye(size, dtype=torch.float64)[clean] + (1 - alpha_s) / count * states
    expected = prior * forward[:, noisy]
    expected = expected / expected.sum()
    p = torch.nn.functional.one_hot(torch.tensor(clean), size).double()
    levels = (torch.tensor(a, dtype=torch.float64) for a in (alpha_t, alpha_s))
    shares = posterior_shares(p[noisy], *levels, inverse_probability=count)
    assert sum(shares) == pytest.approx(1, abs=1e-15)
    found = shares.predicted * p + shares.noise * states / count
    found[noisy] += shares.stays
    assert torch.allclose(found, expected, atol=1e-14)


@pytest.mark.parametrize("kappa", [1.0, 0.5, 0.0])
def test_psi_of_the_exact_denoiser_comes_to_the_data(kappa):
    """Two bits that are always equal: in many steps they agree, whatever the share of fresh noise."""
    states = list(itertools.product((0, 1), repeat=2))
    law = dict.fromkeys(states, 0.25)
    alphas = [1 - step / 64 for step in range(64, -1, -1)]
    for alphas_t in itertools.pairwise(alphas):
        alpha_t, alpha_s = torch.tensor(alphas_t, dtype=torch.float64)
        after = dict.fromkeys(states, 0.0)
        for z, probability in law.items():
            rows = []
            for token, other in (z, z[::-1]):
                # The clean bit given the other noisy one.
                prediction = torch.full((2,), (1 - alpha_t) / 2).double()
                prediction[other] = (1 + alpha_t) / 2
                shares = psi_shares(prediction[token], alpha_t, alpha_s, 2, kappa)
                row = shares.predicted * prediction + shares.noise / 2
                row[token] += shares.stays
                assert float(row.sum()) == pytest.approx(1)
                rows.append(row)
            for new in states:
                after[new] += probability * float(rows[0][new[0]] * rows[1][new[1]])
        law = after
    assert law[0, 0] == pytest.approx(law[1, 1]) and law[0, 0] + law[1, 1] > 0.96


def test_a_prediction_can_only_add_to_what_stays():
    p = torch.linspace(0, 1, 11, dtype=torch.float64)
    for alpha_t, alpha_s in ((0.001, 0.2), (0.5, 0.51), (0.9, 1.0)):
        levels = (torch.tensor(a, dtype=torch.float64) for a in (alpha_t, alpha_s))
        assert (posterior_shares(p, *levels, inverse_probability=7).stays.diff() > 0).all()


def test_plans_cover_every_position_once():
    order, steps = block_part(uniform(4).numpy(), 5)
    assert sorted(order) == list(range(20)) and np.bincount(steps).tolist() == [5] * 4
    assert (np.diff(order[:5]) == 4).all()
    order, steps = block_autoregressive_part(4, 2, 3)
    assert sorted(order) == list(range(24)) and len(np.bincount(steps)) == 2 * (3 + 4 - 1)
    order, steps = in_blocks(np.arange(7) // 3, lambda members: (np.arange(len(members)), members * 0), 2)
    assert order.tolist() == list(range(7)) and steps.tolist() == [0, 0, 0, 2, 2, 2, 4]


def test_a_plan_keeps_what_is_given():
    given = np.array([[True, False, True, False], [False, False, False, True]])
    plan = plan_of(given, lambda row, unknown: (np.arange(len(unknown))[::-1], np.arange(len(unknown))))
    assert plan.order_BL.tolist() == [[0, 2, 3, 1], [3, 2, 1, 0]] and plan.num_steps == 3
    assert plan.step_at_BL.tolist() == [[GIVEN, 1, GIVEN, 0], [2, 1, 0, GIVEN]]


def test_ancestral_parts_reveal_by_the_schedule_and_the_rest_left_to_right():
    shares = reveal_shares([0.0, 0.2, 0.3, 0.4])
    assert np.allclose(shares, [0.2, 0.125, 1 / 7])
    order, steps = ancestral_part(uniform(DRAWS).numpy(), shares)
    assert sorted(order) == list(range(DRAWS)) and (np.diff(steps) >= 0).all()
    counts = np.bincount(steps)
    assert np.allclose(counts[:3] / DRAWS, [0.2, 0.1, 0.1], atol=0.01)
    left_over = order[steps >= 3]
    assert (np.diff(left_over) > 0).all() and (counts[3:] == 1).all()
    assert reveal_shares([0.1, 1.0])[0] == 1.0


def test_a_text_ends_where_all_before_its_end_is_known():
    eos, mask = 9, 8
    ids = torch.tensor([[1, 9, 2, 8], [8, 9, 2, 8], [9, 1, 9, 3], [9, 8, 8, 8]])
    given = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 1]], dtype=torch.bool)
    known = ids != mask
    ended = finish_ended(ids, known, given, eos)
    assert ended.tolist() == [True, False, True, False]
    assert ids.tolist() == [[1, 9, 9, 9], [8, 9, 2, 8], [9, 1, 9, 9], [9, 8, 8, 8]]
    assert known.tolist()[0] == [True] * 4 and known.tolist()[1] == [False, True, True, False]
