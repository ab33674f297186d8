"""The tokenizer that an export ships: the model's ids, every special token among them, no code."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_dlm.conversion.export_tokenizer import padding_id, write_tokenizer
from megatron_dlm.data.tokenizers.tokenizer import load_tokenizer
from megatron_dlm.interfaces import InputError
from tools.tiny import sentences

END = "<|endoftext|>"
CONFIGS = {
    "its class": {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END},
    "GPT-2's class": {"tokenizer_class": "GPT2Tokenizer", "eos_token": END, "model_max_length": 1024},
    "objects, padding, a template": {
        "eos_token": {"content": END, "special": True},
        "bos_token": END,
        "pad_token": "<pad>",
        "chat_template": "{{ messages }}",
        "auto_map": {"AutoTokenizer": ["there.Tokenizer", None]},
    },
    "a mask beside its file": {"tokenizer_class": "GPT2Tokenizer", "eos_token": END, "mask_token": "<M>"},
    "a mask of its own": {"eos_token": END, "mask_token": "<pad>"},
}


def tokenizer_in(directory, config, change=lambda description: None):
    """A byte-level BPE without a mask token, as GPT-2's."""
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[END, "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(sentences(100, seed=1), trainer)
    description = json.loads(library.to_str())
    change(description)
    directory.mkdir()
    (directory / "tokenizer.json").write_text(json.dumps(description))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(directory)


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_reads_it_without_code(tmp_path, name):
    from transformers import AutoTokenizer

    loaded = tokenizer_in(tmp_path / "given", CONFIGS[name])
    vocabulary, out = loaded.vocabulary, tmp_path / "out"
    out.mkdir()
    write_tokenizer(loaded.path, vocabulary, 128, out)
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=False)
    assert len(tokenizer) == vocabulary.size == (300 if name == "a mask of its own" else 301)
    assert tokenizer.mask_token_id == vocabulary.mask_token_id
    assert tokenizer.eos_token_id == vocabulary.eos_token_id
    assert tokenizer.bos_token_id == vocabulary.bos_token_id
    padding = 1 if "pad_token" in CONFIGS[name] else vocabulary.eos_token_id
    assert tokenizer.pad_token_id == padding_id(out) == padding
    assert tokenizer.model_max_length == 128 and tokenizer.padding_side == "left"
    assert (tokenizer.chat_template is None) == ("chat_template" not in CONFIGS[name])
    for text in (*sentences(20, seed=2), "a  b\n\tc \u00e9"):
        assert tokenizer(text)["input_ids"] == loaded.ids_of(text)
        assert tokenizer.decode(loaded.ids_of(text)) == text
    assert name != "a mask beside its file" or tokenizer.mask_token == "<M>"
    # To fill in by text.
    ids = tokenizer(f"the {tokenizer.mask_token} reads")["input_ids"]
    assert ids.count(vocabulary.mask_token_id) == 1
    again = load_tokenizer(out)
    assert again.vocabulary == vocabulary and again.ids_of("the model") == loaded.ids_of("the model")
    # The bytes, and so the fingerprint, are the data's where nothing had to be added.
    assert (again.fingerprint == loaded.fingerprint) == (name == "a mask of its own")


def test_a_mask_token_in_the_text_s_words_gets_another_name(tmp_path):
    def with_the_word(description):
        description["added_tokens"].append(description["added_tokens"][0] | {"id": 300, "content": "[MASK]"})

    loaded = tokenizer_in(tmp_path / "given", {"eos_token": END}, with_the_word)
    (tmp_path / "out").mkdir()
    write_tokenizer(loaded.path, loaded.vocabulary, 128, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["mask_token"] == "<[MASK]>" and loaded.vocabulary.mask_token_id == 301


def test_gaps_at_the_end_are_filled(tmp_path):
    """So that the mask token gets the id that it has in the model."""
    from transformers import AutoTokenizer

    def with_a_gap(description):
        vocabulary = description["model"]["vocab"]
        last = max(vocabulary, key=vocabulary.get)
        description["model"]["merges"] = [
            pair for pair in description["model"]["merges"] if "".join(pair).replace(" ", "") != last
        ]
        del vocabulary[last]
        description["added_tokens"].append(description["added_tokens"][0] | {"id": 303, "content": "<far>"})

    loaded = tokenizer_in(tmp_path / "given", {"eos_token": END}, with_a_gap)
    (tmp_path / "out").mkdir()
    write_tokenizer(loaded.path, loaded.vocabulary, 128, tmp_path / "out")
    assert load_tokenizer(tmp_path / "out").vocabulary == loaded.vocabulary
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=False)
    assert tokenizer.mask_token_id == loaded.vocabulary.mask_token_id
    assert len(tokenizer) <= loaded.vocabulary.size


def test_gaps_that_leave_no_place_for_a_mask_token_are_refused(tmp_path):
    def with_a_gap(description):
        vocabulary = description["model"]["vocab"]
        last = max(vocabulary, key=vocabulary.get)
        vocabulary[last] += 1

    loaded = tokenizer_in(tmp_path / "given", {"eos_token": END}, with_a_gap)
    assert loaded.vocabulary.mask_token_id == 301
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="its ids have gaps, so that \\[MASK\\] cannot be added as id 301"):
        write_tokenizer(loaded.path, loaded.vocabulary, 128, tmp_path / "out")
