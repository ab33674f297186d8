"""50,000 samples of every sampler against the law of its own T-step chain, enumerated on a toy.

Parallel samplers are biased at few steps, so the data's law would be the wrong reference.
"""

import itertools

import numpy as np
import pytest
import torch

from megatron_dlm.families.ar.objective import ARConfig
from megatron_dlm.families.block_diffusion.objective import BlockDiffusionConfig
from megatron_dlm.families.duo.objective import DuoConfig
from megatron_dlm.families.esolm.objective import EsoLMConfig
from megatron_dlm.families.mdlm.objective import MDLMConfig
from tests.helpers.sampler_laws import LENGTH, MASK, TOKENS, VOCABULARY, Laws, ancestral_plans, p_value, toy
from tests.helpers.selection import slow
from tools.bench.naive_sampling import NAIVE

SAMPLES = 50_000
BATCH = 10_000
# Of some fifty tests; a right sampler fails one of all with probability 1 in 200.
SMALLEST_P = 1e-4
MDLM, DUO, ESOLM, AR = MDLMConfig(), DuoConfig(), EsoLMConfig(), ARConfig()
HALF = EsoLMConfig(alpha_0=0.5, batch_split=0.5)
STATES = list(range(VOCABULARY.size))
ALL_STEPS = [slow(1), 2, slow(4)]


@pytest.fixture
def follows(request, record_property):
    """Whether samples follow a law, and, where another is given, that they do not follow that one."""

    def check(samples, law, wrong=None):
        found = p_value(samples, law)
        row = [request.node.name.removeprefix("test_"), str(len(law)), f"{found:.3f}", ""]
        if wrong is not None:
            row[3] = f"{p_value(samples, wrong):.0e}"
            assert float(row[3]) < 1e-9
        record_property("table: chi-square", tuple(row))
        return found > SMALLEST_P

    return check


def draw(objective, prompt=(), samples=SAMPLES, **settings):
    model = toy(objective)
    return torch.cat(
        [
            model.generate([list(prompt)] * BATCH, max_length=LENGTH, seed=seed, **settings)
            for seed in range(samples // BATCH)
        ]
    ).numpy()


def alpha(t):
    return 1 - 0.999 * t


def grid(steps):
    return [*np.linspace(1, 1e-5, steps + 1), 0.0]


def absorbing_alphas(steps):
    return [alpha(t) for t in grid(steps)]


@pytest.mark.parametrize("steps", ALL_STEPS)
def test_mdlm_ancestral(steps, follows):
    law = Laws(toy(MDLM)).by_plan(ancestral_plans(absorbing_alphas(steps)), "mdlm")
    # Reveals at another rate: the law of one step more, which the test must tell apart.
    wrong = Laws(toy(MDLM)).by_plan(ancestral_plans(absorbing_alphas(steps + 1)), "mdlm")
    assert follows(draw(MDLM, sampler="ancestral", num_steps=steps), law, wrong)


@pytest.mark.slow
def test_mdlm_with_another_schedule_and_the_noise_level(follows):
    """Time-conditioned: each step's own sigma."""
    objective = MDLMConfig(noise_schedule="cosine", time_conditioning=True)
    model = toy(objective)
    cosine = [float(1 - np.cos(np.pi / 2 * (1 - t))) for t in grid(2)]

    class Conditioned(Laws):
        def by_steps(self):
            law = {(MASK,) * LENGTH: 1.0}
            for alpha_t, alpha_s in itertools.pairwise(cosine):
                share, after = (alpha_s - alpha_t) / (1 - alpha_t), {}
                sigma = -float(np.log(max(alpha_t, 1e-9)))
                for state, probability in law.items():
                    rows = self.predict(state, sigma=sigma)
                    cells = [
                        {v: share * rows[i][v] for v in TOKENS} | {MASK: 1 - share}
                        if state[i] == MASK
                        else {state[i]: 1.0}
                        for i in range(LENGTH)
                    ]
                    for values in itertools.product(*cells):
                        p = probability * np.prod([cell[v] for cell, v in zip(cells, values, strict=True)])
                        if p > 0:
                            after[values] = after.get(values, 0.0) + float(p)
                law = after
            return law

    assert follows(draw(objective, num_steps=2), Conditioned(model).by_steps())


def test_mdlm_nucleus_and_temperature(follows):
    laws = Laws(toy(MDLM), temperature=0.7, top_p=0.6)
    law = laws.by_plan(ancestral_plans(absorbing_alphas(2)), "mdlm")
    samples = draw(MDLM, num_steps=2, temperature=0.7, top_p=0.6)
    assert follows(samples, law)


@pytest.mark.parametrize("steps", [1, 2, slow(3)])
def test_mdlm_confidence(steps, follows):
    law = Laws(toy(MDLM)).confidence(steps)
    assert follows(draw(MDLM, sampler="confidence", num_steps=steps), law)


@pytest.mark.parametrize("threshold", [slow(0.3), 0.5, slow(1.0)])
def test_mdlm_above_a_threshold(threshold, follows):
    """Threshold 1 is one at a time: confidence with as many steps as tokens."""
    laws = Laws(toy(MDLM))
    law, one_by_one = laws.above_threshold(threshold), laws.confidence(LENGTH)
    if threshold == 1:
        assert law == pytest.approx(one_by_one)
    samples = draw(MDLM, sampler="confidence", threshold=threshold)
    assert follows(samples, law, one_by_one if threshold < 1 else None)


class Guided(Laws):
    """Predictions pushed away from those without the first token, as Hugging Face's guidance_scale does."""

    SCALE = 2.5

    def predict(self, ids, positions=None, sigma=None):
        own = super().predict(ids, positions, sigma)
        other = super().predict((MASK, *ids[1:]), positions, sigma)
        guided = []
        for p, q in zip(own, other, strict=True):
            raw = np.array([q[v] * (p[v] / q[v]) ** self.SCALE if v != MASK else 0.0 for v in range(len(p))])
            guided.append(raw / raw.sum())
        return guided


@pytest.mark.parametrize("sampler", ["left-to-right", slow("confidence"), slow("ancestral")])
def test_mdlm_guided_by_its_prompt(sampler, follows):
    laws, plain = Guided(toy(MDLM)), Laws(toy(MDLM))
    more = {"confidence": {"threshold": 1.0}, "ancestral": {"num_steps": 2}}.get(sampler, {})

    def law(laws):
        if sampler == "confidence":
            return laws.above_threshold(1.0, (0,))
        plans = {
            "left-to-right": [(1.0, [[1], [2]])],
            "ancestral": list(_plans_of(absorbing_alphas(2), [1, 2])),
        }
        return laws.by_plan(plans[sampler], "mdlm", (0,))

    samples = draw(MDLM, (0,), sampler=sampler, guidance_scale=Guided.SCALE, **more)
    assert follows(samples, law(laws), law(plain))


@pytest.mark.slow
def test_mdlm_in_blocks(follows):
    """Blocks of 2 and 1 tokens, each by 2 steps."""
    plans = [(p, [*first, [2]]) for p, first in _plans_of(absorbing_alphas(2), [0, 1])]
    law = Laws(toy(MDLM)).by_plan(plans, "mdlm")
    assert follows(draw(MDLM, num_steps=2, block_length=2), law)


def _plans_of(alphas, positions):
    """Plans of some positions alone."""
    reveal = [(s - t) / (1 - t) for t, s in itertools.pairwise(alphas)]
    for steps in itertools.product(range(len(reveal)), repeat=len(positions)):
        probability = 1.0
        for step in steps:
            probability *= np.prod([1 - r for r in reveal[:step]]) * reveal[step]
        groups = [
            [p for p, s in zip(positions, steps, strict=True) if s == step] for step in range(len(reveal))
        ]
        yield float(probability), [group for group in groups if group]


@pytest.mark.parametrize(
    ("family", "steps"), [slow("mdlm", 1), ("mdlm", 3), slow("esolm", 1), slow("esolm", 3)]
)
def test_block(family, steps, follows):
    """All columns in one random order: with 3 steps every permutation, with 1 the text's own order."""
    objective = {"mdlm": MDLM, "esolm": ESOLM}[family]
    orders = list(itertools.permutations(range(LENGTH))) if steps == 3 else [(0, 1, 2)]
    groups = [[[p] for p in order] if steps == 3 else [list(order)] for order in orders]
    plans = [(1 / len(orders), group) for group in groups]
    samples = draw(objective, sampler="block", num_steps=steps)
    assert follows(samples, Laws(toy(objective)).by_plan(plans, family))


@pytest.mark.parametrize("family", [slow("mdlm"), "esolm"])
def test_block_autoregressive(family, follows):
    """Segments of 1 token, all in one group: one by one; and one segment: left to right."""
    objective = {"mdlm": MDLM, "esolm": ESOLM}[family]
    law = Laws(toy(objective)).by_plan([(1.0, [[0], [1], [2]])], family)
    for length in (1, 3):
        samples = draw(objective, sampler="block-autoregressive", segment_length=length)
        assert follows(samples, law)


@pytest.mark.parametrize("family", [slow("ar"), "mdlm", "esolm"])
def test_left_to_right(family, follows):
    objective = {"ar": AR, "mdlm": MDLM, "esolm": ESOLM}[family]
    given = (0,) if family == "ar" else ()
    groups = [[p] for p in range(len(given), LENGTH)]
    laws = Laws(toy(objective), temperature=1.3, top_p=0.9)
    law = laws.by_plan([(1.0, groups)], family, given)
    samples = draw(objective, given, sampler="left-to-right", temperature=1.3, top_p=0.9)
    assert follows(samples, law)


@pytest.mark.parametrize("steps", ALL_STEPS)
@pytest.mark.parametrize("objective", [slow(ESOLM, id="alpha_0=1"), pytest.param(HALF, id="alpha_0=0.5")])
def test_esolm_ancestral(objective, steps, follows):
    alphas = [objective.alpha_0 * alpha(t) for t in np.linspace(1, 0, steps + 1)]
    law = Laws(toy(objective)).by_plan(ancestral_plans(alphas), "esolm")
    assert follows(draw(objective, sampler="ancestral", num_steps=steps), law)


@pytest.mark.parametrize("steps", ALL_STEPS)
@pytest.mark.parametrize("greedy", [slow(False), True])
def test_duo_ancestral(steps, greedy, follows):
    law = Laws(toy(DUO)).uniform(grid(steps), states=STATES, greedy_tail=greedy)
    samples = draw(DUO, sampler="ancestral", num_steps=steps, greedy_tail=greedy)
    wrong = Laws(toy(DUO)).uniform(grid(steps), states=STATES, greedy_tail=greedy, wrong=True)
    assert follows(samples, law, wrong)


@pytest.mark.parametrize("kappa", [slow(0.0), 0.3, slow(1.0)])
@pytest.mark.parametrize("greedy", [False, slow(True)])
def test_duo_psi(kappa, greedy, follows):
    """kappa = 1 is ancestral, bit for bit; kappa = 0 draws each step afresh."""
    laws = Laws(toy(DUO))
    law = laws.uniform(grid(2), states=STATES, greedy_tail=greedy, kappa=kappa)
    samples = draw(DUO, sampler="psi", num_steps=2, kappa=kappa, greedy_tail=greedy)
    if kappa == 1:
        assert (samples == draw(DUO, sampler="ancestral", num_steps=2, greedy_tail=greedy)).all()
    wrong = laws.uniform(grid(2), states=STATES, greedy_tail=greedy, kappa=kappa, wrong=True)
    assert follows(samples, law, wrong)


def remasking_of(alphas, sigma_of):
    """(alpha_t, alpha_s, sigma) of each step; `sigma_of` takes alpha_s and the largest sigma."""
    pairs = itertools.pairwise(alphas)
    return [(t, s, sigma_of(s, min(1.0, (1 - s) / t))) for t, s in pairs]


@pytest.mark.slow
@pytest.mark.parametrize("kappa", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("greedy", [False, True])
def test_mdlm_psi(kappa, greedy, follows):
    """kappa = 1 is ancestral."""
    laws, alphas = Laws(toy(MDLM)), absorbing_alphas(3)
    law = laws.remasking(remasking_of(alphas, lambda s, _: (1 - kappa) * (1 - s)), greedy_tail=greedy)
    ancestral = laws.by_plan(ancestral_plans(alphas), "mdlm")
    if kappa == 1 and not greedy:
        assert law == pytest.approx(ancestral)
    samples = draw(MDLM, sampler="psi", num_steps=3, kappa=kappa, greedy_tail=greedy)
    assert follows(samples, law, ancestral if kappa < 1 else None)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["cap", "rescale", "confidence"])
@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_mdlm_remasking(rule, strength, follows):
    """Strength 0 is ancestral."""
    laws, alphas = Laws(toy(MDLM)), absorbing_alphas(3)
    ancestral = laws.by_plan(ancestral_plans(alphas), "mdlm")
    steps = remasking_of(
        alphas, lambda _, largest: min(strength, largest) if rule == "cap" else strength * largest
    )
    law = laws.remasking(steps, by_confidence=rule == "confidence")
    if strength == 0:
        assert law == pytest.approx(ancestral)
    samples = draw(MDLM, sampler="remasking", num_steps=3, remasking=rule, remasking_strength=strength)
    assert follows(samples, law, ancestral if strength else None)


@pytest.mark.slow
def test_mdlm_remasking_in_a_loop(follows):
    """Of the edges at times 1, 2/3, 1/3 and 1e-5, the two in the middle are on the plateau."""
    near_data = 1 - 0.6 * 1e-5 / 0.3
    steps = [(0.0, 0.4, 0.0), (0.4, 0.4, 0.5), (0.4, near_data, 0.0), (near_data, 1.0, 0.0)]
    laws = Laws(toy(MDLM))
    wrong = laws.remasking([(t, s, 0.0) for t, s, _ in steps])
    samples = draw(
        MDLM,
        **{"sampler": "remasking", "num_steps": 3, "remasking": "loop", "remasking_strength": 0.5},
        remasking_loop=(0.7, 0.3, 0.4),
    )
    assert follows(samples, laws.remasking(steps), wrong)


@pytest.mark.slow
def test_duo_without_the_mask_among_its_states_with_a_nucleus(follows):
    objective = DuoConfig(mask_in_noise=False)
    laws = Laws(toy(objective), temperature=0.8, top_p=0.8)
    law = laws.uniform(grid(2), states=TOKENS)
    samples = draw(objective, num_steps=2, temperature=0.8, top_p=0.8)
    assert follows(samples, law)


def test_block_diffusion(follows):
    """Blocks of 2 tokens that see themselves and what is before them."""
    objective = BlockDiffusionConfig(block_size=2)

    class Windowed(Laws):
        def _of_group(self, group, family, known):
            stop = 2 if group[0] < 2 else LENGTH
            block = torch.arange(stop) // 2
            with torch.no_grad():
                logits = self._model(
                    torch.tensor([[known.get(p, MASK) for p in range(stop)]]),
                    visible_mask=block[:, None] >= block,
                ).logits[0]
            return [self.sharpened(logits[p].double().numpy()) for p in group]

    plans = [(p, [*first, [2]]) for p, first in _plans_of(absorbing_alphas(2), [0, 1])]
    law = Windowed(toy(objective)).by_plan(plans, "block-diffusion")
    assert follows(draw(objective, num_steps=2), law)


@pytest.mark.parametrize("family", ["mdlm", "duo", "esolm", "ar"])
def test_the_benchmark_s_naive_samplers_have_the_same_laws(family, follows):
    """So that both sides of tools/bench/sample.py draw from one law."""
    objective = {"mdlm": MDLM, "duo": DUO, "esolm": ESOLM, "ar": AR}[family]
    model, generator = toy(objective), torch.Generator().manual_seed(0)
    steps = LENGTH if family == "esolm" else 2
    drawn = [NAIVE[family](model, BATCH, LENGTH, steps, generator) for _ in range(SAMPLES // BATCH)]
    laws = Laws(model)
    law = {
        "mdlm": lambda: laws.by_plan(ancestral_plans(absorbing_alphas(2)), "mdlm"),
        "duo": lambda: laws.uniform(grid(2), states=STATES),
        "esolm": lambda: laws.by_plan(
            [(1 / 6, [[p] for p in order]) for order in itertools.permutations(range(LENGTH))], "esolm"
        ),
        "ar": lambda: laws.by_plan([(1.0, [[1], [2]])], "ar", (VOCABULARY.bos_token_id,)),
    }[family]()
    assert follows(torch.cat(drawn).numpy(), law)
