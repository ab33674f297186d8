"""What texts are made from and where they end."""

import json

import pytest

from megatron_dlm.cli.sample import SampleConfig, _prompts
from megatron_dlm.conversion.hugging_face_model.generation_megatron_dlm import ModelNetwork
from megatron_dlm.evaluation.generation import are_greedy, before_end, start_of_parts
from megatron_dlm.families.mdlm.sampler import Sampler
from megatron_dlm.families.registry import sampler_of
from megatron_dlm.interfaces import InputError
from tests.helpers.exported import FAMILIES, build


def test_a_text_ends_at_the_first_end_that_was_sampled():
    ids = [2, 7, 2, 8, 2, 9]
    assert before_end(ids, [True, True, True, False, False, False], 2) == [2, 7, 2, 8]
    assert before_end(ids, [True] * 6, 2) == ids
    assert before_end(ids, [False] * 6, 2) == []


@pytest.mark.parametrize("gap", [0, -1, 10**12])
def test_a_gap_that_the_text_cannot_hold_is_refused(gap):
    family = Sampler(
        name="mdlm",
        alpha=lambda t: 1 - t,
        vocab_size=11,
        mask_token_id=4,
        bos_token_id=1,
        eos_token_id=2,
    )
    with pytest.raises(ValueError, match=r"parts: a gap of -?\d+ tokens is outside \[1, 8\]"):
        start_of_parts([[5], gap], 8, family)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not an object with either prompt or parts"),
        (json.dumps({"prompt": "a", "parts": ["a"]}), "not an object with either prompt or parts"),
        (json.dumps({"prompt": 3}), "prompt is not a text"),
        (json.dumps({"parts": "ab"}), "parts is not a list of texts and numbers"),
        (json.dumps({"parts": [True]}), "parts is not a list of texts and numbers"),
    ],
)
def test_hostile_prompts_are_refused(tmp_path, line, words):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "a"}) + "\n\n" + line + "\n")
    with pytest.raises(InputError, match=f"prompts: .*:3: {words}"):
        _prompts(SampleConfig(model=tmp_path, prompts=path))


def test_prompts_are_read_as_json_lines_are(tmp_path):
    path = tmp_path / "prompts.jsonl"
    prompts = [{"prompt": "a\u2028b"}, {"parts": []}, {"parts": ["a", 3]}]
    path.write_text("\n".join(json.dumps(p, ensure_ascii=False) for p in prompts), encoding="utf-8")
    assert _prompts(SampleConfig(model=tmp_path, prompts=path)) == prompts


@pytest.mark.parametrize("name", FAMILIES)
def test_a_greedy_continuation_is_what_sampling_at_temperature_0_writes(name):
    """In every family, whatever stands beside it; one other token is enough to be none."""
    model = build(FAMILIES[name])
    network, family = ModelNetwork(model), sampler_of(FAMILIES[name].name).from_config(model.config)
    texts = []
    for context, length in (([5, 6], 7), ([7], 7), ([1, 2, 3, 5], 9)):
        (written,) = model.generate(
            [context], max_length=length, sampler="left-to-right", do_sample=False, seed=0
        )
        texts.append((context, written.tolist()[len(context) :]))
    others = []
    for context, written in texts:
        for place in (0, len(written) - 1):
            changed = list(written)
            changed[place] = 3 if written[place] != 3 else 5
            others.append((context, changed))
    for batch_size in (1, 2, 9):
        found = are_greedy(network, family, texts + others + texts, batch_size=batch_size)
        # Where the start is noise, it is that of a text's row, so that one row at a time is as above.
        if batch_size == 1 or not name.startswith("duo"):
            assert found == [True] * 3 + [False] * 6 + [True] * 3, batch_size


def test_nothing_is_read_once_all_texts_differ():
    """The first token decides most of them."""
    model, calls = build(FAMILIES["mdlm"]), []
    hidden = model.hidden
    model.hidden = lambda *arguments, **more: calls.append(1) or hidden(*arguments, **more)
    family = sampler_of("mdlm").from_config(model.config)
    (written,) = model.generate([[5]], max_length=10, sampler="left-to-right", do_sample=False, seed=0)
    calls.clear()
    other = [3 if written[1] != 3 else 5, *written.tolist()[2:]]
    assert are_greedy(ModelNetwork(model), family, [([5], other)], batch_size=4) == [False]
    assert len(calls) == 1
