"""The bound of held-out data: intervals that cover, figures that add up, what the protocol leaves out."""

import numpy as np
import pytest
import torch

from megatron_dlm.evaluation.exported_scoring import ExportedBounds
from megatron_dlm.evaluation.nelbo import RankShare, exported_copies, held_out_bound
from megatron_dlm.evaluation.nelbo_statistics import BoundConfig, summarise
from megatron_dlm.families.duo.objective import DuoConfig
from megatron_dlm.families.esolm.objective import EsoLMConfig
from megatron_dlm.families.mdlm.objective import MDLMConfig
from megatron_dlm.interfaces import InputError
from tests.helpers.exported import LENGTH, VOCABULARY, build
from tests.helpers.family_variants import FAMILIES

CONTEXT_FREE = torch.tensor([0.3, 0.05, 0.05, 0.1, 0.0, 0.2, 0.1, 0.05, 0.05, 0.05, 0.05])


class Texts:
    """Random blocks, without a shard."""

    def __init__(self, count=40):
        ids = [v for v in range(VOCABULARY.size) if v != VOCABULARY.mask_token_id]
        self._rows = np.random.default_rng(0).choice(ids, (count, LENGTH + 1))
        self.num_rows = count

    def read(self, indices):
        return self._rows[indices]

    def read_documents(self, indices):
        return None

    read_loss_mask = read_documents


def score(objective, *, model=None, micro_batch_size=64, texts=None, **config):
    score_by = ExportedBounds(model or build(objective), VOCABULARY, objective.attention, 256)
    return held_out_bound(
        exported_copies(score_by, VOCABULARY),
        texts or Texts(),
        objective,
        VOCABULARY,
        BoundConfig(**({"num_sequences": 10, "num_times": 8} | config)),
        bytes_per_token=2.0,
        share=RankShare(micro_batch_size),
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_the_figure_does_not_depend_on_the_batch(name):
    first = score(FAMILIES[name], micro_batch_size=1)
    for size in (3, 8, 100):
        again = score(FAMILIES[name], micro_batch_size=size)
        assert again.protocol.nats_per_token == pytest.approx(first.protocol.nats_per_token, rel=1e-6)
        assert again.complete.nats_per_token == pytest.approx(first.complete.nats_per_token, rel=1e-6)
    assert first.tokens == 10 * LENGTH and first.bits_per_byte == pytest.approx(
        first.protocol.nats_per_token / 2 / np.log(2)
    )


def test_what_draws_nothing_is_exact():
    """AR and Eso-LM at alpha_0 = 0 see each sequence once, and have no error of noise."""
    for name in ("ar", "esolm-sequential"):
        found = score(FAMILIES[name])
        assert found.copies == 1 and found.monte_carlo_error is None and found.by_time == ()
        assert found.complete == found.protocol
        other = score(FAMILIES[name], seed=1, num_sequences=40, num_times=7)
        assert other.protocol.nats_per_token == pytest.approx(
            score(FAMILIES[name], num_sequences=40).protocol.nats_per_token, rel=1e-6
        )


def test_ar_is_the_model_s_own_nll():
    objective, texts = FAMILIES["ar"], Texts()
    model = build(objective)
    found = score(objective, model=model, num_sequences=40)
    expected = model.nll(torch.from_numpy(texts.read(np.arange(40)))).sum() / (40 * LENGTH)
    assert found.protocol.nats_per_token == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("name", ["mdlm", "duo", "esolm"])
def test_the_bands_of_time_add_up_to_the_bound(name):
    found = score(FAMILIES[name])
    assert len(found.by_time) == 8 and found.by_time[-1].last == 1.0
    mean = np.mean([band.nats_per_token for band in found.by_time])
    assert mean == pytest.approx(found.protocol.nats_per_token, rel=1e-9)
    assert found.by_time[0].first == 1e-3 and found.by_time[0].last == found.by_time[1].first


def without_context(objective, p):
    """A model that predicts p [V] everywhere."""
    model = build(objective)
    with torch.no_grad():
        model.output_layer.linear.weight.zero_()
        model.output_layer.linear.bias.copy_(p.clamp_min(1e-9).log())
    return model


@pytest.mark.parametrize("name", ["mdlm", "esolm", "block-diffusion", "esolm-two-parts"])
def test_the_complete_bound_of_a_model_without_context_is_its_cross_entropy(name):
    """Each token's cost is known then; the schedule's integral and the prior make up the rest."""
    objective = FAMILIES[name]
    texts = Texts(20).read(np.arange(20))[:, :-1]
    nats = float(-CONTEXT_FREE.log()[torch.from_numpy(texts)].mean())
    model = without_context(objective, CONTEXT_FREE)
    found = score(objective, model=model, texts=Texts(20), num_sequences=20, num_times=64, replicates=4)
    alpha_0 = getattr(objective, "alpha_0", 1.0)
    alpha_1 = 1e-3 * alpha_0
    expected = (alpha_0 - alpha_1 + 1 - alpha_0) * nats + alpha_1 * np.log(VOCABULARY.size - 1)
    error = found.monte_carlo_error
    assert abs(found.complete.nats_per_token - expected) < 4 * error and error < 0.02 * expected
    assert found.protocol.nats_per_token != found.complete.nats_per_token


def test_the_sequential_part_is_whole_in_the_complete_bound():
    """Where diffusion makes next to nothing, both bounds are the cross-entropy, without noise."""
    objective = EsoLMConfig(alpha_0=1e-9, batch_split=0.5)
    texts = Texts(20).read(np.arange(20))[:, :-1]
    nats = float(-CONTEXT_FREE.log()[torch.from_numpy(texts)].mean())
    model = without_context(objective, CONTEXT_FREE)
    found = score(objective, model=model, texts=Texts(20), num_sequences=20)
    for mean in (found.protocol, found.complete):
        assert mean.nats_per_token == pytest.approx(nats, rel=1e-5)


def test_duo_s_complete_bound_of_a_model_without_context():
    """Above the cross-entropy by what its shape costs, whatever the schedule: cosine ends in pure noise."""
    figures = {}
    for schedule in ("log-linear", "linear", "cosine"):
        objective = DuoConfig(noise_schedule=schedule)
        model = without_context(objective, torch.linspace(-1, 1, VOCABULARY.size).exp())
        figures[schedule] = score(objective, model=model, num_sequences=20, num_times=64, replicates=4)
    reference = figures["linear"].complete.nats_per_token
    for found in figures.values():
        # The NELBO in continuous time is the same for every schedule.
        assert abs(found.complete.nats_per_token - reference) < 5 * (
            found.monte_carlo_error + figures["linear"].monte_carlo_error
        )
    assert figures["log-linear"].protocol.nats_per_token < figures["log-linear"].complete.nats_per_token


def test_the_noise_s_own_error_is_that_of_repeated_grids():
    generator = np.random.default_rng(0)
    tokens, errors, means = np.full(20, 10), [], []
    for _ in range(300):
        bounds = 20.0 + generator.normal(size=(20, 2, 8))
        found = summarise(
            bounds,
            tokens,
            early_N=np.zeros(20),
            strata_NRK=None,
            time_epsilon=1e-3,
            prior_nats=0.0,
            bytes_per_token=1.0,
        )
        errors.append(found.monte_carlo_error)
        means.append(found.protocol.nats_per_token)
    assert np.mean(np.square(errors)) == pytest.approx(np.var(means), rel=0.25)
    # One run tells it, though there are but two grids: sequences have draws of their own.
    assert np.std(errors) < 0.25 * np.mean(errors)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"num_sequences": 0}, "num_sequences: 0 is below 1"),
        ({"num_sequences": 41}, "num_sequences: 41 exceed the 40 sequences"),
        ({"num_times": 0}, "num_times: 0 is below 1"),
        ({"replicates": 0}, "replicates: 0 is below 1"),
    ],
)
def test_bad_numbers_are_refused(config, words):
    with pytest.raises(InputError, match=words):
        score(MDLMConfig(), **config)


def test_copies_that_leave_a_part_without_any_are_refused():
    with pytest.raises(InputError, match=r"num_times: 1 copies: objective\.batch_split"):
        score(FAMILIES["esolm-two-parts"], num_times=1)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 9, 16])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("micro_batch_size", [1, 3, 4])
def test_copies_need_not_divide_among_processes(size, ranks, micro_batch_size):
    from megatron_dlm.execution.microbatches import BatchAddress

    shares = [RankShare(micro_batch_size, rank, ranks) for rank in range(ranks)]
    found = [share.positions(BatchAddress(0, 20, size, training=False)) for share in shares]
    assert len({len(batches) for batches in found}) == 1, "pipelines wait for each other's microbatches"
    for batches in found:
        for places in batches:
            # A batch that had one twice would count it once.
            assert 0 < len(set(places)) == len(places) <= micro_batch_size
    everyone = np.concatenate([places for batches in found for places in batches]) - 20
    assert (np.bincount(everyone, minlength=size) == shares[0].times_scored(size)).all()
