"""Tokenizers that are one file, and inputs that are URLs."""

import base64
import json
from pathlib import Path

import numpy as np
import pytest

from megatron_dlm.data.preprocessing.index import IndexConfig, build_shards
from megatron_dlm.data.shards.shard import Shard
from megatron_dlm.data.tokenizers.encoders import choose_encoder
from megatron_dlm.data.tokenizers.tokenizer import load_tokenizer
from megatron_dlm.interfaces import InputError
from tools import tiny

TEXTS = [*tiny.sentences(50, seed=8), "naïve 漢字 <s> [MASK] <mask>"]


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    sentencepiece = pytest.importorskip("sentencepiece")
    directory = tmp_path_factory.mktemp("sentencepiece")
    (directory / "text").write_text("\n".join(tiny.sentences(500, seed=0)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "text"),
        model_prefix=str(directory / "tiny"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    return directory / "tiny.model"


def index(tmp_path, tokenizer, *inputs, **fields):
    config = IndexConfig(input=inputs, output=tmp_path / "shard", tokenizer=tokenizer, workers=1, **fields)
    (manifest,) = build_shards(config, lambda progress: None)
    return manifest, Shard(config.output)


def documents(shard):
    return np.split(np.asarray(shard.tokens), np.cumsum(shard.document_lengths)[:-1])


def test_sentencepiece_models(tmp_path, sentencepiece_model):
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    loaded = load_tokenizer(sentencepiece_model)
    assert loaded.vocabulary.size == 321 and loaded.vocabulary.mask_token_id == 320
    text = tiny.write_jsonl(tmp_path / "t.jsonl", TEXTS)
    for backend in ("auto", "library"):
        manifest, shard = index(tmp_path, sentencepiece_model, str(text), backend=backend)
        expected = [[*model.encode(part), model.eos_id()] for part in TEXTS]
        assert [d.tolist() for d in documents(shard)] == expected
        assert manifest.backend == ("sentencepiece" if backend == "library" else "gigatoken")


def test_megatron_s_tiktoken_vocabularies(tmp_path):
    pytest.importorskip("tiktoken")
    from megatron.core.tokenizers.text.libraries.tiktoken_tokenizer import TikTokenTokenizer

    pairs = [bytes([a, b]) for a in b"abcdefghijklmnopqrstuvwxyz " for b in b"abcdefghijklmnopqrstuvwxyz "]
    ranks = [*(bytes([i]) for i in range(256)), *pairs]
    ranks += [bytes([a, b]) for a in range(128, 256) for b in range(256)]
    ranks += [bytes([a, b, c]) for a in range(200, 256) for b in range(128, 256) for c in range(128, 256)]
    ranks = ranks[: 2**17 - 1000]
    vocabulary = tmp_path / "vocabulary.json"
    vocabulary.write_text(
        json.dumps(
            [
                {"rank": i, "token_bytes": base64.b64encode(b).decode(), "token_str": None}
                for i, b in enumerate(ranks)
            ]
        )
    )
    theirs = TikTokenTokenizer(str(vocabulary))
    loaded = load_tokenizer(vocabulary)
    assert (loaded.vocabulary.size, loaded.vocabulary.mask_token_id) == (2**17, 3)
    text = tiny.write_jsonl(tmp_path / "t.jsonl", TEXTS[:-1])
    manifest, shard = index(tmp_path, vocabulary, str(text))
    assert [d.tolist() for d in documents(shard)] == [
        [*theirs.tokenizer.encode(part), theirs.eos_id] for part in TEXTS[:-1]
    ]
    assert manifest.dtype == "int32" and manifest.backend == "tiktoken"
    # Text that spells a special token, at which theirs raises, is plain text.
    assert 3 not in choose_encoder(loaded, [], "auto")[1](["a <mask> b"])[0]


def test_bytes(tmp_path):
    text = tiny.write_jsonl(tmp_path / "t.jsonl", [*TEXTS, "\x00\x01"])
    manifest, shard = index(tmp_path, Path("bytes"), str(text))
    assert [d.tolist() for d in documents(shard)] == [[*t.encode(), 256] for t in [*TEXTS, "\x00\x01"]]
    assert (manifest.vocabulary.size, manifest.vocabulary.mask_token_id) == (259, 258)


def test_a_tokenizer_without_mask_gets_one(tmp_path, corpus):
    directory = tmp_path / "tokenizer"
    directory.mkdir()
    config = json.loads((corpus.tokenizer / "tokenizer_config.json").read_text())
    del config["mask_token"], config["bos_token"]
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text((corpus.tokenizer / "tokenizer.json").read_text())
    vocabulary = load_tokenizer(directory).vocabulary
    assert (vocabulary.size, vocabulary.mask_token_id) == (302, 301)
    assert vocabulary.bos_token_id == vocabulary.eos_token_id == 0


def test_bad_tokenizer_files_are_named(tmp_path):
    (tmp_path / "bad.model").write_bytes(b"not a model")
    (tmp_path / "bad.json").write_text("{}")
    for name, message in (
        ("bad.model", "not a readable tokenizer"),
        ("bad.json", "not a readable tokenizer"),
        ("none.model", "no such file"),
        ("bad.txt", "not a directory, bytes, or a .model, .json file"),
    ):
        with pytest.raises(InputError, match=message):
            load_tokenizer(tmp_path / name)


def test_urls_are_read_like_files(tmp_path, corpus):
    import fsspec

    text = "".join(json.dumps({"text": part}) + "\n" for part in TEXTS)
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/a.jsonl", text.encode())
    memory.pipe("/bucket/more/b.jsonl", text.encode())
    (tmp_path / "t.jsonl").write_text(text + text)
    local, _ = index(tmp_path, corpus.tokenizer, str(tmp_path / "t.jsonl"))
    for name in ("memory://bucket", "memory://bucket/**/*.jsonl"):
        remote, _ = index(tmp_path, corpus.tokenizer, name, unit_bytes=1000)
        assert remote.files == local.files
        assert remote.sources[0].path == "memory:///bucket/a.jsonl"
    with pytest.raises(InputError, match=r"input: memory://none/x\.jsonl: no such file"):
        index(tmp_path, corpus.tokenizer, "memory://none/x.jsonl")
    with pytest.raises(InputError, match="input: nonsense://x"):
        index(tmp_path, corpus.tokenizer, "nonsense://x/a.jsonl")
