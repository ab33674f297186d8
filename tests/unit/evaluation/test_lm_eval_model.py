"""What the harness model answers, and what it says of requests that it cannot answer as asked."""

import logging
from types import SimpleNamespace

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install megatron-dlm[harness]")

from lm_eval.api.instance import Instance

from megatron_dlm.conversion.hugging_face_model.generation_megatron_dlm import ModelNetwork
from megatron_dlm.evaluation import lm_eval_model
from megatron_dlm.evaluation.lm_eval_model import HarnessModel
from megatron_dlm.families.registry import sampler_of
from megatron_dlm.interfaces import InputError
from megatron_dlm.platform.peers import Peers
from tests.helpers.exported import FAMILIES, LENGTH, VOCABULARY, build

LETTERS = "_.ab#cdefgh"
"""Text of each id; the mask token is the fifth."""


class Letters:
    """A tokenizer of letters."""

    fingerprint = "letters"

    def ids_of(self, text):
        return [LETTERS.index(letter) for letter in text if letter in LETTERS]

    def decode(self, ids):
        return "".join(LETTERS[token] for token in ids)


def harness_model(name="mdlm", **settings):
    objective = FAMILIES[name]
    model = build(objective)
    loaded = SimpleNamespace(
        model=model,
        family=sampler_of(objective.name).from_config(model.config),
        network=ModelNetwork(model),
        tokenizer=Letters(),
        vocabulary=VOCABULARY,
        config=SimpleNamespace(objective=objective, data=SimpleNamespace(seq_length=LENGTH)),
        peers=Peers(),
    )
    return HarnessModel("", loaded=loaded, num_times=4, max_copies=4, **settings)


def request(kind, *arguments, task="task", document=0):
    return Instance(
        request_type=kind,
        doc={},
        arguments=arguments,
        idx=0,
        metadata=(task, document, 1),
    )


def generate(model, context, **settings):
    return model.generate_until([request("generate_until", context, settings)], disable_tqdm=True)[0]


@pytest.mark.parametrize("name", ["max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"])
def test_every_name_of_the_number_of_tokens_is_heard(name):
    model = harness_model()
    assert len(generate(model, "abc", **{name: 4})) <= 4 and not model.notes["task"]
    assert len(model._generation(request("", "abc", {name: 4}))[0]) == 3
    assert model._generation(request("", "abc", {name: 4}))[1].length == 7


def test_a_prompt_is_kept_where_it_fits_and_its_cuts_are_counted(caplog):
    """12 tokens: the answer gets what it asks for, or half, or what the prompt leaves."""
    model = harness_model()
    lengths = {}
    for context, asked in (("abcaebc", 4), ("abcaebc", 2048), ("abcaebcfgh", 4), ("abcaebcfghdab", 2048)):
        prompt, how = model._generation(
            request("", context, {"max_gen_toks": asked}, task=f"{context} {asked}")
        )
        lengths[context, asked] = len(prompt), how.length - len(prompt)
    assert list(lengths.values()) == [(7, 4), (6, 6), (8, 4), (6, 6)]
    cut, shortened = lm_eval_model.PROMPT_CUT, lm_eval_model.ANSWER_SHORTENED
    assert {task: dict(counts) for task, counts in model.notes.items()} == {
        "abcaebc 4": {},
        "abcaebc 2048": {cut: 1, shortened: 1},
        "abcaebcfgh 4": {cut: 1},
        "abcaebcfghdab 2048": {cut: 1, shortened: 1},
    }
    with caplog.at_level(logging.WARNING):
        assert generate(model, "abca", max_gen_toks=300) != ""
    assert model.notes["task"] == {shortened: 1} and f"harness: task: 1 {shortened}" in caplog.text


def test_two_prompts_that_differ_in_their_beginning_have_two_answers():
    """A budget beyond the model's length does not leave one token of them."""
    model = harness_model(seed=3)
    answers = {
        generate(model, context, max_gen_toks=4096, until=[]) for context in ("abcab", "hhhab", "ggfab")
    }
    assert len(answers) > 1


def test_settings_without_effect_are_named():
    model = harness_model()
    generate(model, "abc", max_gen_toks=2, do_sample=True, temperature=0.5, top_p=0.9, until=["."])
    assert not model.notes["task"]
    generate(model, "abc", max_gen_toks=2, repetition_penalty=1.2, num_beams=None)
    assert model.notes["task"] == {"texts generated without the task's setting repetition_penalty": 1}
    with pytest.raises(InputError, match="harness: task: max_gen_toks: 0 is below 1"):
        generate(model, "abc", max_gen_toks=0)
    assert model.get_model_info()["notes"]["task"]


def test_temperature_and_nucleus_of_a_task_take_effect():
    model = harness_model()
    how = [
        model._generation(request("", "abc", settings))[1]
        for settings in ({"do_sample": True, "temperature": 0.5, "top_p": 0.9}, {"temperature": 0.7}, {})
    ]
    assert [(h.temperature, h.top_p) for h in how] == [(0.5, 0.9), (0.7, 1.0), (0.0, 1.0)]


def test_contexts_and_texts_that_do_not_fit_are_counted():
    model = harness_model()
    answers = model.loglikelihood(
        [request("loglikelihood", "abcaebcfghdab", "ab"), request("loglikelihood", "abc", "ef", document=1)],
        disable_tqdm=True,
    )
    assert len(answers) == 2 and model.notes["task"] == {lm_eval_model.CONTEXT_CUT: 1}
    with pytest.raises(
        InputError, match="harness: task: a continuation of 12 tokens does not fit the model's 12"
    ):
        model.loglikelihood([request("loglikelihood", "a", "abcaebcfghda")], disable_tqdm=True)
    model.loglikelihood_rolling([request("loglikelihood_rolling", "abcaebcfghdab")], disable_tqdm=True)
    assert model.notes["task"][lm_eval_model.IN_WINDOWS] == 1
    with pytest.raises(InputError, match="chat templates are not supported"):
        model.apply_chat_template([])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_last_word_that_the_model_writes_is_greedy(name):
    """So that acc of such tasks is a figure, and no 0 that nothing can change."""
    model = harness_model(name)
    # The first one whose answer does not end early.
    context, written = next(
        (context, text)
        for context in ("abca", "bcd", "fgh", "a", "hha", "ff")
        if len(text := generate(model, context, max_gen_toks=3, until=[])) == 3
    )
    other = "bcb" if written != "bcb" else "cbc"
    right, wrong = model.loglikelihood(
        [request("loglikelihood", context, text, document=i) for i, text in enumerate((written, other))],
        disable_tqdm=True,
    )
    assert right[1] is True and wrong[1] is False and model.greedy_tasks == {"task"}
