"""Special tokens of Hugging Face folders as they are published: AutoTokenizer's, or named by hand."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_dlm.data.tokenizers import special_tokens
from megatron_dlm.data.tokenizers.special_tokens import SpecialTokens
from megatron_dlm.data.tokenizers.tokenizer import load_tokenizer
from megatron_dlm.interfaces import InputError

TEXT = [f"some words to learn from, number {n}" for n in range(200)]


def byte_level(*special):
    """A small byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def word_piece():
    """A small WordPiece with BERT's tokens."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        TEXT, trainers.WordPieceTrainer(vocab_size=100, special_tokens=special, show_progress=False)
    )
    return tokenizer


def entry(content):
    """A special token as an object, as save_pretrained writes it."""
    return {"content": content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


END, SPECIAL = "<|endoftext|>", {"special": True}
FOLDERS = {
    "GPT-2's, of 2019": (
        [END],
        {"tokenizer_config": {"model_max_length": 1024}, "config": {"model_type": "gpt2", "eos_token_id": 0}},
    ),
    "no tokenizer_config": ([END], {"config": {"model_type": "gpt2"}}),
    "class alone": ([END], {"tokenizer_config": {"tokenizer_class": "GPT2Tokenizer"}}),
    "fast class alone": ([END], {"tokenizer_config": {"tokenizer_class": "GPT2TokenizerFast"}}),
    "class of config.json": (
        [END],
        {"tokenizer_config": {}, "config": {"model_type": "mpt", "tokenizer_class": "GPT2Tokenizer"}},
    ),
    "special_tokens_map": (
        ["<s>", "</s>"],
        {"tokenizer_config": {}, "special_tokens_map": {"eos_token": "</s>", "bos_token": entry("<s>")}},
    ),
    "map beside another name": (
        ["<s>", "</s>", "<end>"],
        {"tokenizer_config": {"eos_token": "<end>"}, "special_tokens_map": {"eos_token": "</s>"}},
    ),
    "added_tokens_decoder": (
        [END],
        {
            "tokenizer_config": {
                "eos_token": END,
                "mask_token": "<M>",
                "added_tokens_decoder": {
                    "0": entry(END) | SPECIAL,
                    "300": entry("<extra>") | SPECIAL,
                    "301": entry("<M>") | SPECIAL,
                },
            }
        },
    ),
    "added_tokens.json": (
        [END],
        {"tokenizer_config": {"eos_token": END, "mask_token": "<M>"}, "added_tokens": {"<M>": 300}},
    ),
    "token that is nowhere": ([END], {"tokenizer_config": {"eos_token": END, "mask_token": "<M>"}}),
    "objects": ([END], {"tokenizer_config": {"eos_token": entry(END) | {"__type": "AddedToken"}}}),
    "Roberta's": (
        ["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        {"tokenizer_config": {}, "config": {"model_type": "roberta"}},
    ),
}


def write(directory, tokenizer, files):
    directory.mkdir(parents=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize("name", FOLDERS)
def test_the_ids_are_those_of_autotokenizer(name, tmp_path):
    AutoTokenizer = pytest.importorskip("transformers").AutoTokenizer

    special, files = FOLDERS[name]
    folder = write(tmp_path / "folder", byte_level(*special), files)
    expected = AutoTokenizer.from_pretrained(folder)
    loaded = load_tokenizer(folder)
    found = loaded.vocabulary
    assert found.eos_token_id == expected.eos_token_id
    assert found.bos_token_id == (
        expected.eos_token_id if expected.bos_token_id is None else expected.bos_token_id
    )
    size = max(expected.get_vocab().values()) + 1
    assert found.mask_token_id == (size if expected.mask_token_id is None else expected.mask_token_id)
    assert found.size == max(size, found.mask_token_id + 1)
    assert loaded.ids_of("some words") == expected.encode("some words", add_special_tokens=False)


def test_a_tokenizer_without_eos_says_how_to_name_one(tmp_path):
    pytest.importorskip("transformers")
    files = {"tokenizer_config": {"tokenizer_class": "BertTokenizer"}, "config": {"model_type": "bert"}}
    folder = write(tmp_path / "bert", word_piece(), files)
    with pytest.raises(InputError, match=r"names no eos_token.*--eos-token.*\[SEP\]"):
        load_tokenizer(folder)
    found = load_tokenizer(folder, named=SpecialTokens(eos_token="[SEP]", bos_token="[CLS]")).vocabulary
    assert (found.eos_token_id, found.bos_token_id, found.mask_token_id) == (3, 2, 4)


def test_tokens_named_by_hand_need_no_transformers(tmp_path, monkeypatch):
    monkeypatch.setattr(special_tokens, "find_spec", lambda name: None)
    folder = write(tmp_path / "folder", byte_level(END, "<m>"), {"config": {"model_type": "gpt2"}})
    with pytest.raises(InputError, match=r"leaves special tokens to its class.*\[hf\].*--eos-token"):
        load_tokenizer(folder)
    named = SpecialTokens(eos_token=END, bos_token="none", mask_token="<m>")
    loaded = load_tokenizer(folder, named=named)
    found = loaded.vocabulary
    assert (found.size, found.eos_token_id, found.bos_token_id, found.mask_token_id) == (300, 0, 0, 1)
    # A model that was trained with them knows them.
    assert load_tokenizer(folder, known={loaded.fingerprint: found}).vocabulary == found
    without = load_tokenizer(folder, named=SpecialTokens(eos_token=END, bos_token="none", mask_token="none"))
    assert (without.vocabulary.size, without.vocabulary.mask_token_id) == (301, 300)


def test_a_named_token_must_be_in_the_vocabulary(tmp_path):
    folder = write(tmp_path / "folder", byte_level(END), {"tokenizer_config": {}})
    named = SpecialTokens(eos_token="<gone>", bos_token="none", mask_token="none")
    with pytest.raises(InputError, match="eos_token '<gone>' is not in the vocabulary"):
        load_tokenizer(folder, named=named)
    with pytest.raises(InputError, match="eos_token: none"):
        SpecialTokens(eos_token="none")
    with pytest.raises(InputError, match="bytes has its own"):
        load_tokenizer(Path("bytes"), named=SpecialTokens(eos_token=END))


def test_hub_names_are_found_in_the_cache_and_never_downloaded(tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.file_download, "HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    for name in ("no-one/none", "gpt2"):
        with pytest.raises(InputError, match=rf"{name}: no such directory.*`hf download {name} "):
            load_tokenizer(Path(name))
    with pytest.raises(InputError, match="no/such/directory: no such file or directory"):
        load_tokenizer(Path("no/such/directory"))
    snapshot = tmp_path / "hub" / "models--gpt2" / "snapshots" / "0123"
    files = {"tokenizer_config": {"eos_token": END, "bos_token": END, "mask_token": None}}
    write(snapshot, byte_level(END), files)
    (tmp_path / "hub" / "models--gpt2" / "refs").mkdir()
    (tmp_path / "hub" / "models--gpt2" / "refs" / "main").write_text("0123")
    loaded = load_tokenizer(Path("gpt2"))
    assert loaded.path == snapshot and loaded.vocabulary.eos_token_id == 0


def test_a_model_s_tokens_named_by_hand_have_names(tmp_path):
    """So that text can be indexed for a model whose tokenizer does not say them itself."""
    folder = write(tmp_path / "folder", byte_level(END, "<m>"), {"config": {"model_type": "gpt2"}})
    for named in (
        SpecialTokens(eos_token=END, bos_token="none", mask_token="<m>"),
        SpecialTokens(eos_token=END, bos_token="<m>", mask_token="none"),
    ):
        vocabulary = load_tokenizer(folder, named=named).vocabulary
        again = load_tokenizer(folder, named=special_tokens.names_of(vocabulary, folder))
        assert again.vocabulary == vocabulary
    assert special_tokens.names_of(vocabulary, Path("bytes")) == SpecialTokens()
