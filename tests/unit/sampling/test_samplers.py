"""What every sampler of every family keeps: prompts, seeds, batches, ends; with a cache or without."""

import pytest
import torch

from megatron_dlm.conversion.hugging_face_model.family_megatron_dlm import sampler_for
from megatron_dlm.conversion.hugging_face_model.generation_megatron_dlm import ModelNetwork
from megatron_dlm.families.registry import sampler_of
from megatron_dlm.sampling.generate import sample
from megatron_dlm.sampling.settings import SamplingConfig
from megatron_dlm.sampling.start import Start, start_from
from tests.helpers.exported import FAMILIES, LENGTH, VOCABULARY, build

SETTINGS = {
    "ancestral": {"num_steps": 5},
    "psi": {"num_steps": 5, "kappa": 0.3},
    "remasking": {"num_steps": 5, "remasking": "cap", "remasking_strength": 0.4},
    "confidence": {"num_steps": 3},
    "block": {"num_steps": 3},
    "block-autoregressive": {"segment_length": 3},
    "left-to-right": {},
}
CASES = [
    (family, {"sampler": sampler} | SETTINGS[sampler])
    for family in FAMILIES
    for sampler in sampler_of(FAMILIES[family].name).samplers
]
CASES += [
    ("mdlm", {"sampler": "ancestral", "num_steps": 3, "block_length": 4}),
    ("mdlm", {"sampler": "confidence", "num_steps": 3, "block_length": 4}),
    ("mdlm", {"sampler": "confidence", "threshold": 0.3, "block_length": 4}),
    ("mdlm", {"sampler": "remasking", "num_steps": 5, "remasking": "confidence", "remasking_strength": 1.0}),
    ("mdlm", {"sampler": "remasking", "num_steps": 9, "remasking": "loop", "remasking_strength": 0.4}),
    ("mdlm", {"sampler": "ancestral", "num_steps": 5, "guidance_scale": 2.0}),
    ("duo", {"sampler": "psi", "num_steps": 3, "kappa": 0.3, "block_length": 4}),
    ("duo", {"sampler": "ancestral", "num_steps": 3, "block_length": 4, "greedy_tail": True}),
]
EOS, MASK = VOCABULARY.eos_token_id, VOCABULARY.mask_token_id


@pytest.fixture(params=CASES, ids=lambda case: "-".join(map(str, (case[0], *case[1].values()))))
def case(request):
    family, settings = request.param
    return build(FAMILIES[family]), settings


def test_prompts_are_kept_and_seeds_matter(case):
    model, settings = case
    prompts = [[1, 5, 6], [1, 7, 8]]
    samples = model.generate(prompts, max_length=LENGTH, seed=3, **settings)
    assert samples.shape == (2, LENGTH) and samples[:, :3].tolist() == prompts
    assert not (samples == MASK).any()
    assert torch.equal(samples, model.generate(prompts, max_length=LENGTH, seed=3, **settings))
    assert not torch.equal(samples, model.generate(prompts, max_length=LENGTH, seed=4, **settings))


def test_a_sample_does_not_depend_on_its_batch(case):
    """Alone, beside prompts of other lengths, and by number at another place in the batch."""
    model, settings = case
    network, process, config = ModelNetwork(model), sampler_for(model.config), SamplingConfig(**settings)
    prompts = [[1, 5, 6], [1, 2, 3, 5, 6, 7], [1, 3, 5, 9, 9, 2, 2, 1, 7], [1, 8, 2]]
    together = sample(network, process, config, start_from(prompts, LENGTH, process), seed=3)
    for number, prompt in enumerate(prompts):
        alone = sample(
            network, process, config, start_from([prompt], LENGTH, process), seed=3, samples=[number]
        )
        assert torch.equal(alone[0], together[number])
    order = [2, 0, 3]
    some = start_from([prompts[i] for i in order], LENGTH, process)
    assert torch.equal(sample(network, process, config, some, seed=3, samples=order), together[order])


def test_texts_end_at_eos(case):
    """Up to the first <eos> as without stopping, then <eos> alone."""
    model, settings = case
    with torch.no_grad():
        model.output_layer.linear.bias[EOS] += 1.5
    prompts = [[1, EOS, 6]] * 20
    if settings["sampler"] == "ancestral" and "block_length" in settings and model.config.family == "duo":
        settings = settings | {"greedy_tail": False}
    whole = model.generate(prompts, max_length=LENGTH, seed=1, **settings)
    ended = model.generate(prompts, max_length=LENGTH, seed=1, stop_at_eos=True, **settings)
    assert (ended == EOS)[:, 3:].any(1).sum() > 3
    for full, short in zip(whole.tolist(), ended.tolist(), strict=True):
        stop = short.index(EOS, 3) if EOS in short[3:] else LENGTH
        assert short[:stop] == full[:stop]
        assert all(token == EOS for token in short[stop:])


def test_steps_are_shown_and_the_last_is_the_result(case):
    model, settings = case
    seen = []
    result = model.generate(
        [[1, 5, 6]], max_length=LENGTH, on_step=lambda step, ids: seen.append((step, ids.clone())), **settings
    )
    assert [step for step, _ in seen] == sorted({step for step, _ in seen})
    assert torch.equal(seen[-1][1], result) and len(seen) > 1
    if model.config.family != "duo":
        hidden = [int((ids == MASK).sum()) for _, ids in seen]
        only_falls = settings["sampler"] not in ("psi", "remasking")
        assert hidden[-1] == 0 and (not only_falls or hidden == sorted(hidden, reverse=True))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "ar"])
def test_gaps_are_filled_in(name):
    model = build(FAMILIES[name])
    given = torch.zeros(2, LENGTH, dtype=torch.bool)
    given[0, [0, 5, 6, 11]] = given[1, [3, 4]] = True
    given[:, 0] |= FAMILIES[name].needs_first_token
    text = torch.full((2, LENGTH), 7)
    filled = model.generate(text, given=given, num_steps=4, seed=2)
    assert (filled[given] == 7).all() and not (filled == MASK).any()
    assert (filled[~given] != 7).any()


class Recomputing:
    """A network whose cache keeps the tokens and reads all of them each time."""

    def __init__(self, model):
        self.model, self.device, self.head = model, model.device, model.head

    def start_cache(self, batch_size):
        self.seen = [([], []) for _ in range(batch_size)]
        return self

    def select(self, rows):
        self.seen = [self.seen[i] for i in rows.tolist()]

    def hidden(self, ids, positions, valid, kept, rows):
        found = []
        for i, (old_ids, old_positions) in enumerate(self.seen):
            new = valid[i].nonzero()[:, 0]
            if not len(new):
                continue
            all_ids = [*old_ids, *ids[i, new].tolist()]
            all_positions = [*old_positions, *positions[i, new].tolist()]
            hidden = self.model.hidden(torch.tensor([all_ids]), position_ids=torch.tensor([all_positions]))
            found.append(hidden[0, len(old_ids) :][rows[i, new]])
            stays = kept[i].nonzero()[:, 0]
            old_ids += ids[i, stays].tolist()
            old_positions += positions[i, stays].tolist()
        return torch.cat(found)


@pytest.mark.parametrize("name", ["ar", "esolm", "esolm-two-parts"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_cache_gives_what_reading_all_again_gives(name, attention):
    model = build(FAMILIES[name])
    model.config._attn_implementation = attention
    process = sampler_for(model.config)
    start = start_from([[1, 5], [1, 2, 3, 5, 6, 7], [1]], LENGTH, process)
    for stop in (False, True):
        config = SamplingConfig(num_steps=None if name == "ar" else 4, stop_at_eos=stop)
        cached = sample(ModelNetwork(model), process, config, start, seed=5)
        assert torch.equal(cached, sample(Recomputing(model), process, config, start, seed=5))


class Counting(ModelNetwork):
    """Counts what the network is asked."""

    def __init__(self, model):
        super().__init__(model)
        self.sequences = self.rows = 0

    def hidden(self, ids, rows, sigma=None, visible=None):
        self.sequences += len(ids)
        self.rows += int(rows.sum())
        return super().hidden(ids, rows, sigma, visible)


def test_the_network_reads_sequences_that_change_and_the_head_runs_on_rows_that_may():
    mdlm, duo = build(FAMILIES["mdlm"]), build(FAMILIES["duo"])
    start = start_from([[]] * 8, LENGTH, sampler_for(mdlm.config))
    network = Counting(mdlm)
    sample(network, sampler_for(mdlm.config), SamplingConfig(num_steps=200), start)
    # Each token is revealed once; of 200 steps at most 12 reveal anything in a sequence.
    assert network.rows == 8 * LENGTH and network.sequences <= 8 * LENGTH
    network = Counting(duo)
    sample(network, sampler_for(duo.config), SamplingConfig(num_steps=200), start)
    assert network.rows < 0.15 * 8 * LENGTH * 201


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("ar", {"sampler": "ancestral"}, "sampler: ancestral"),
        ("mdlm", {"sampler": "nonsense"}, "sampler: nonsense"),
        ("mdlm", {"num_steps": 0}, "num_steps: 0 is below 1"),
        ("mdlm", {"temperature": -1.0}, "temperature: -1.0 is not 0 and not in"),
        ("mdlm", {"temperature": 1e-310}, "temperature: 1e-310 is not 0 and not in"),
        ("mdlm", {"temperature": float("inf")}, "temperature: inf is not 0 and not in"),
        ("mdlm", {"top_p": 0.0}, r"top_p: 0.0 is outside \(0, 1\]"),
        ("mdlm", {"greedy_tail": True}, "greedy_tail: not used by sampler ancestral of mdlm"),
        ("mdlm", {"sampler": "psi"}, "kappa: sampler psi needs it"),
        ("duo", {"sampler": "psi", "kappa": 1.5}, r"kappa: 1.5 is outside \[0, 1\]"),
        ("duo", {"sampler": "remasking", "remasking_strength": 0.1}, "sampler: remasking is none of duo"),
        ("esolm", {"sampler": "psi", "kappa": 0.5}, "sampler: psi is none of esolm"),
        ("mdlm", {"sampler": "remasking"}, "remasking_strength: sampler remasking needs it"),
        (
            "mdlm",
            {"sampler": "remasking", "remasking_strength": -0.1},
            r"remasking_strength: -0.1 is outside \[0, 1\]",
        ),
        (
            "mdlm",
            {"sampler": "remasking", "remasking_strength": 0.1, "remasking_loop": (0.5, 0.1, 0.9)},
            "remasking_loop: only used by remasking loop",
        ),
        (
            "mdlm",
            {"sampler": "remasking", "remasking": "loop", "remasking_loop": (0.1, 0.5, 0.9)},
            "remasking_loop: 0.1 0.5 0.9 are not a time",
        ),
        (
            "mdlm",
            {"sampler": "remasking", "remasking": "cpa", "remasking_strength": 0.1},
            "remasking: 'cpa' is none of cap, rescale, confidence, loop",
        ),
        (
            "mdlm",
            {"sampler": "remasking", "num_steps": 3, "remasking": "loop", "remasking_strength": 0.1},
            "remasking_loop: 0.55 0.05 0.9 has no whole step of num_steps 3",
        ),
        ("mdlm", {"kappa": 0.5}, "kappa: not used by sampler ancestral of mdlm"),
        ("mdlm", {"sampler": "confidence", "threshold": 0.0}, r"threshold: 0.0 is outside \(0, 1\]"),
        (
            "mdlm",
            {"sampler": "confidence", "threshold": 0.5, "num_steps": 4},
            "num_steps: 4 with threshold 0.5",
        ),
        ("mdlm", {"threshold": 0.5}, "threshold: not used by sampler ancestral of mdlm"),
        ("mdlm", {"guidance_scale": 2.0}, "guidance_scale: 2 needs prompts, and text 0 has none"),
        ("mdlm", {"guidance_scale": -1.0}, r"guidance_scale: -1.0 is not in \[0, inf\)"),
        (
            "block-diffusion",
            {"guidance_scale": 2.0},
            "guidance_scale: not used by sampler ancestral of block-",
        ),
        ("duo", {"guidance_scale": 2.0}, "guidance_scale: not used by sampler ancestral of duo"),
        (
            "mdlm",
            {"sampler": "left-to-right", "num_steps": 4},
            "num_steps: not used by sampler left-to-right",
        ),
        ("esolm", {"block_length": 4}, "block_length: not used by sampler ancestral of esolm"),
        ("esolm", {"sampler": "block"}, "num_steps: sampler block needs it"),
        ("esolm", {"sampler": "block", "num_steps": 5}, "num_steps: 5 does not divide 12 tokens"),
        (
            "mdlm",
            {"sampler": "block-autoregressive", "segment_length": 5},
            "segment_length: 5 x num_groups 1",
        ),
        (
            "mdlm",
            {"sampler": "block-autoregressive"},
            "segment_length: sampler block-autoregressive needs it",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(name, settings, words):
    with pytest.raises(ValueError, match=words):
        build(FAMILIES[name]).generate(max_length=LENGTH, **settings)


@pytest.mark.parametrize(
    ("name", "prompts", "words"),
    [
        ("mdlm", [[1] * (LENGTH + 1)], "prompt 0: 13 tokens exceed the length 12"),
        ("mdlm", [[1, MASK]], f"prompt: contains the mask token {MASK}"),
        ("duo", [[1, VOCABULARY.size]], r"prompt: a token is outside \[0, 11\)"),
        ("ar", [[-1]], "prompt: a token is outside"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(name, prompts, words):
    with pytest.raises(ValueError, match=words):
        build(FAMILIES[name]).generate(prompts, max_length=LENGTH)


def test_ar_cannot_fill_gaps():
    model = build(FAMILIES["ar"])
    given = torch.zeros(1, LENGTH, dtype=torch.bool)
    given[0, [0, 5]] = True
    with pytest.raises(ValueError, match="ar continues a text"):
        model.generate(torch.ones(1, LENGTH, dtype=torch.int64), given=given)
    with pytest.raises(ValueError, match="ar needs at least its first token"):
        model.generate(torch.ones(1, LENGTH, dtype=torch.int64), given=torch.zeros_like(given))
    with pytest.raises(ValueError, match=r"prompt: torch\.float32"):
        Start(torch.ones(1, LENGTH), given)
