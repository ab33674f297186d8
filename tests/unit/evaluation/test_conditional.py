"""Bounds of continuations: exact for AR, unbiased for the others, no more copies than a decision needs."""

import numpy as np
import pytest
import torch

from megatron_dlm.evaluation.conditional import Choice, ConditionalConfig, ConditionalScorer
from megatron_dlm.interfaces import InputError
from tests.helpers.exported import VOCABULARY, build
from tests.helpers.family_variants import FAMILIES

CONTEXT = (1, 5, 6)
ANSWERS = ((7, 8), (9,), (2, 2, 3), (10, 5))
NOISY = [name for name in FAMILIES if name not in ("ar", "esolm-sequential")]


def scorer(name, model=None, **config):
    objective = FAMILIES[name]
    fields = {"num_times": 8, "max_copies": 64, "confidence": 1.0} | config
    return ConditionalScorer(model or build(objective), objective, VOCABULARY, ConditionalConfig(**fields))


def question(answers=ANSWERS, context=CONTEXT):
    return [Choice(context, answer, weight=float(len(answer))) for answer in answers]


def test_ar_is_exact():
    model = build(FAMILIES["ar"])
    (found,) = scorer("ar", model).score([question(((7, 8), (9,)))])
    ids = torch.tensor([[1, 5, 6, 7, 8]])
    expected = model.nll(ids) - model.nll(ids[:, :3])
    assert found[0].mean == pytest.approx(expected.item(), rel=1e-6) and len(found[0].nats) == 1


@pytest.mark.parametrize("name", ["mdlm", "esolm", "block-diffusion"])
def test_one_token_costs_its_cross_entropy(name):
    """Masked with probability 0.999 t, it then weighs 1 / t: 0.999 of the model's answer on average."""
    model = build(FAMILIES[name])
    choices = [Choice((1, 5, 6), (7,))]
    (found,) = scorer(name, model, num_times=64, max_copies=4096).score([choices])
    mask = VOCABULARY.mask_token_id
    ids = torch.tensor([[1, 5, 6, mask]])
    if name == "esolm":
        # Its context comes in random orders: the mean over them.
        orders = torch.tensor([[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]])
        positions = torch.cat([orders, torch.full((6, 1), 3)], dim=1)
        logits = model(ids.expand(6, -1).gather(1, positions), position_ids=positions).logits
    else:
        visible = torch.ones(4, 4, dtype=torch.bool) if name == "block-diffusion" else None
        logits = model(ids, visible_mask=visible).logits
    expected = 0.999 * float(-logits[:, 3].double().log_softmax(-1)[:, 7].mean())
    nats = np.array(found[0].nats)
    assert abs(nats.mean() - expected) < 4 * nats.std() / len(nats) ** 0.5
    assert nats.std() / len(nats) ** 0.5 < 0.06 * expected


@pytest.mark.parametrize("name", NOISY)
def test_scores_do_not_depend_on_the_batch(name):
    questions = [question(), question(context=(1, 2, 3, 5, 6, 7)), question(((7,),), context=(1, 2))]
    alone = scorer(name).score([questions[2]])[0][0]
    first = scorer(name, batch_size=1).score(questions)
    for size in (5, 64):
        again = scorer(name, batch_size=size).score(questions)
        for ours, theirs in zip(first, again, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                assert a.nats == pytest.approx(b.nats, rel=1e-5)
    assert first[2][0].nats == pytest.approx(alone.nats, rel=1e-5)
    assert all(len(s.nats) == 64 for choices in first for s in choices)


@pytest.mark.parametrize("name", ["mdlm", "duo"])
def test_sampling_ends_when_the_choice_is_decided(name):
    """For a model that is sure of one token a few copies are enough, and the choice is that of many."""
    model = build(FAMILIES[name])
    with torch.no_grad():
        model.output_layer.linear.weight.zero_()
        model.output_layer.linear.bias.zero_()
        model.output_layer.linear.bias[7] = 6.0
    choices = [question(((9,), (7,), (8,)))]
    many = scorer(name, model, max_copies=512).score(choices)[0]
    early = scorer(name, model, max_copies=512, confidence=0.99).score(choices)[0]
    best = min(range(3), key=lambda c: many[c].mean)
    assert best == 1 == min(range(3), key=lambda c: early[c].mean)
    assert len(early[0].nats) < len(many[0].nats) == 512
    assert len({len(s.nats) for s in early}) == 1
    # What is alike is never decided.
    alike = scorer(name, model, max_copies=128, confidence=0.99).score([question(((9,), (9,)))])[0]
    assert len(alike[0].nats) == 128 and alike[0].nats == alike[1].nats


def test_progress_reaches_all_questions():
    done = []
    scorer("mdlm", max_copies=16, confidence=0.9).score([question(), question(((7,),))], done.append)
    assert sum(done) == 2


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"num_times": 0}, "num_times: 0 is below 1"),
        ({"batch_size": 0}, "batch_size: 0 is below 1"),
        ({"max_copies": 7}, "max_copies: 7 is below num_times 8"),
        ({"confidence": 0.4}, r"confidence: 0.4 is outside \[0.5, 1\]"),
    ],
)
def test_bad_numbers_are_refused(config, words):
    with pytest.raises(InputError, match=words):
        scorer("mdlm", **config)


def test_copies_that_leave_a_part_without_any_are_refused():
    with pytest.raises(InputError, match=r"num_times: 1 copies: objective\.batch_split"):
        scorer("esolm-two-parts", num_times=1)
