"""What texts are made from and where they end."""

import json

import pytest

from megatron_dlm.cli.sample import SampleConfig, _prompts
from megatron_dlm.evaluation.generation import before_end, start_of_parts
from megatron_dlm.families.mdlm.sampler import Sampler
from megatron_dlm.interfaces import InputError


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
