"""Windows over texts that are longer than the model, and what their perplexity is."""

import math
from types import SimpleNamespace

import pytest
import torch

from megatron_dlm.evaluation.conditional import ConditionalConfig
from megatron_dlm.evaluation.perplexity import perplexity_of, wikitext_as_plain, windows
from megatron_dlm.families.registry import sampler_of
from megatron_dlm.interfaces import InputError
from megatron_dlm.platform.peers import Peers
from tests.helpers.exported import FAMILIES, LENGTH, VOCABULARY, build

TEXTS = ["abcabbagfehdcbahgfedabca", "abc", "hhgfedc", ""]
LETTERS = {letter: number for number, letter in enumerate("_.ab#cdefgh")}


def loaded_model(name):
    objective = FAMILIES[name]
    model = build(objective)
    return SimpleNamespace(
        model=model,
        family=sampler_of(objective.name).from_config(model.config),
        tokenizer=SimpleNamespace(ids_of=lambda text: [LETTERS[letter] for letter in text]),
        vocabulary=VOCABULARY,
        config=SimpleNamespace(objective=objective, data=SimpleNamespace(seq_length=LENGTH)),
        peers=Peers(),
    )


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 20, 24])
@pytest.mark.parametrize("stride", [None, 1, 3, 7, 8])
@pytest.mark.parametrize("bos", [(), (99,)])
def test_every_token_is_scored_once_given_those_before_it(count, stride, bos):
    needs_context, ids = bool(bos), list(range(count))
    if stride == 8 and needs_context:
        with pytest.raises(InputError, match=r"stride: 8 is outside \[1, 7\], for windows of 8 tokens"):
            windows(ids, 8, stride, bos, needs_context=needs_context)
        return
    found = windows(ids, 8, stride, bos, needs_context=needs_context)
    assert [token for choice in found for token in choice.continuation] == ids
    assert all(len(choice.context) + len(choice.continuation) <= 8 for choice in found)
    given = 8 - (stride or 8 - needs_context)
    for number, choice in enumerate(found):
        first = choice.continuation[0]
        expected = list(range(first - given, first)) if number else bos
        assert list(choice.context) == list(expected) and choice.number == number


@pytest.mark.parametrize("stride", [None, 1, 5])
def test_ar_s_is_exact(stride):
    loaded = loaded_model("ar")
    found = perplexity_of(TEXTS, str, loaded, ConditionalConfig(), stride)
    expected, given = 0.0, LENGTH - (stride or LENGTH - 1)
    for text in TEXTS:
        ids = loaded.tokenizer.ids_of(text)
        for place, token in enumerate(ids):
            first = LENGTH - 1
            if place < first:
                seen = [VOCABULARY.bos_token_id, *ids[:place]]
            else:
                begin = place - (place - first) % (stride or LENGTH - 1)
                seen = ids[begin - given : place]
            with torch.no_grad():
                logits = loaded.model(torch.tensor([seen])).logits[0, -1].clone()
            logits[VOCABULARY.mask_token_id] = -math.inf
            expected -= float(logits.log_softmax(-1)[token])
    assert found.nats == pytest.approx(expected, rel=1e-5)
    assert found.tokens == found.num_bytes == sum(map(len, TEXTS)) and found.words == 3
    assert found.per_word == pytest.approx(math.exp(found.nats / 3))
    assert found.per_token == pytest.approx(math.exp(found.nats / found.tokens))
    assert found.bits_per_byte == pytest.approx(found.nats / found.num_bytes / math.log(2))


@pytest.mark.parametrize("name", ["mdlm", "duo", "esolm"])
def test_a_bound_depends_on_neither_batch_nor_processes(name):
    loaded = loaded_model(name)
    configs = [ConditionalConfig(num_times=4, max_copies=8, batch_size=size) for size in (3, 32)]
    one, other = (perplexity_of(TEXTS, str, loaded, config, 5) for config in configs)
    assert one.nats == pytest.approx(other.nats, rel=1e-6) and one.copies == 8

    class Halves(Peers):
        """Two processes, one after the other."""

        def share(self, items, answer):
            halves = [answer(items[rank::2]) for rank in (0, 1)]
            return [halves[i % 2][i // 2] for i in range(len(items))]

    loaded.peers = Halves()
    shared = perplexity_of(TEXTS, str, loaded, configs[0], 5)
    assert shared.nats == pytest.approx(one.nats, rel=1e-6)
    assert one.protocol.low < one.protocol.nats_per_token < one.protocol.high


def test_windows_of_equal_context_have_noise_of_their_own():
    loaded = loaded_model("mdlm")
    text = "abcabbagfehd" * 3
    config = ConditionalConfig(num_times=2, max_copies=2)
    choices = windows(loaded.tokenizer.ids_of(text), LENGTH, None, (), needs_context=False)
    assert len({choice.continuation for choice in choices}) == 1 and not any(c.context for c in choices)
    from megatron_dlm.evaluation.conditional import ConditionalScorer

    scorer = ConditionalScorer(loaded.model, loaded.config.objective, VOCABULARY, config)
    assert len({answer.mean for (answer,) in scorer.score([[choice] for choice in choices])}) == len(choices)


def test_equal_texts_have_noise_of_their_own():
    loaded = loaded_model("mdlm")
    config = ConditionalConfig(num_times=2, max_copies=2)
    one, two = (perplexity_of(["abcabbag"] * n, str, loaded, config, None) for n in (1, 2))
    assert two.nats != pytest.approx(2 * one.nats, rel=1e-6)


@pytest.mark.parametrize("text", ["", " "])
def test_texts_without_a_word_are_refused(text):
    loaded = loaded_model("mdlm")
    loaded.tokenizer.ids_of = lambda text: [1] * len(text)
    with pytest.raises(InputError, match="text: no text with a token and a word"):
        perplexity_of([text], str, loaded, ConditionalConfig(), None)


def test_wikitext_is_read_in_its_usual_spelling():
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install megatron-dlm[harness]")
    raw = (
        ' = Life = \n It had 1 @,@ 000 " raw " words ( or more ) , in a state @-@ of @-@ the @-@ art way . \n'
    )
    assert wikitext_as_plain(raw).split("\n")[1] == (
        'It had 1,000 "raw" words (or more), in a state-of-the-art way.'
    )
