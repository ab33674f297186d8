"""Megatron-LM's shards as they are: checked, described, and then trained on as our own."""

import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_dlm.data.preprocessing.adopt import adopt_shard
from megatron_dlm.data.preprocessing.index import IndexConfig, build_shards
from megatron_dlm.data.shards.manifest import read_manifest, shard_path
from megatron_dlm.data.shards.shard import Shard
from megatron_dlm.data.tokenizers.tokenizer import load_tokenizer
from megatron_dlm.interfaces import InputError
from tools.tiny import sentences


def without_manifest(prefix, directory):
    """The two files that Megatron-LM writes."""
    directory.mkdir(exist_ok=True)
    for suffix in (".bin", ".idx"):
        shutil.copyfile(shard_path(Path(prefix), suffix), directory / f"shard{suffix}")
    return directory / "shard"


def adopt(prefix, loaded):
    told = []
    return adopt_shard(prefix, loaded, lambda *progress: told.append(progress)), told


def test_an_adopted_shard_is_described_as_when_it_was_indexed(corpus, tmp_path):
    loaded = load_tokenizer(corpus.tokenizer)
    prefix = without_manifest(corpus.train, tmp_path / "there")
    adopted, told = adopt(prefix, loaded)
    ours = read_manifest(Path(corpus.train))
    found = read_manifest(prefix)
    assert found == adopted.manifest
    for field in (
        *("vocabulary", "tokenizer_fingerprint", "tokenizer_directory", "dtype", "append_eos"),
        *("num_documents", "num_tokens", "num_text_bytes", "unigram_entropy_nats", "tokens_sha256"),
    ):
        assert getattr(found, field) == getattr(ours, field), field
    size = shard_path(prefix, ".bin").stat().st_size
    assert told[-1] == (size, size) and adopted.unended == 0
    assert len(adopted.samples) == 2 and all(adopted.samples)
    shard = Shard(prefix)
    shard.verify_checksums()
    assert np.array_equal(shard.tokens, Shard(corpus.train).tokens)


KINDS = ["byte-level", "bytes", "sentencepiece", "word-piece"]


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_text_are_those_of_the_decoded_documents(tmp_path, kind, request):
    """Counted by id where that is exact, else by decoding; spaces at the edges count as they are decoded."""
    text = tmp_path / "text.jsonl"
    texts = [*sentences(40, seed=1), "caf\u00e9 \u4e2d\u6587 <eos> \U0001f600", "  two  spaces "]
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in texts))
    tokenizer = request.getfixturevalue("tokenizers")(kind)
    config = IndexConfig(input=(str(text),), output=tmp_path / "ours", tokenizer=tokenizer, workers=1)
    build_shards(config, lambda progress: None)
    loaded = load_tokenizer(tokenizer)
    adopted, _ = adopt(without_manifest(tmp_path / "ours", tmp_path / "there"), loaded)
    shard = Shard(tmp_path / "ours")
    ends = np.cumsum(shard.document_lengths)
    decoded = [
        loaded.decode(shard.tokens[int(end - length) : int(end) - 1].tolist())
        for end, length in zip(ends, shard.document_lengths, strict=True)
    ]
    assert adopted.manifest.num_text_bytes == sum(len(text.encode()) for text in decoded)


@pytest.fixture
def tokenizers(corpus, tmp_path):
    """Tokenizers by kind."""

    def make(kind):
        if kind == "byte-level":
            return corpus.tokenizer
        if kind == "bytes":
            return Path("bytes")
        if kind == "sentencepiece":
            sentencepiece = pytest.importorskip("sentencepiece")
            (tmp_path / "lines.txt").write_text("\n".join(sentences(200, seed=4)))
            sentencepiece.SentencePieceTrainer.train(
                input=str(tmp_path / "lines.txt"),
                model_prefix=str(tmp_path / "pieces"),
                vocab_size=300,
                byte_fallback=True,
                model_type="bpe",
                minloglevel=2,
            )
            return tmp_path / "pieces.model"
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        library = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        library.pre_tokenizer, library.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        special = ["[UNK]", "[SEP]", "[MASK]"]
        trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
        library.train_from_iterator(sentences(100, seed=2), trainer)
        (tmp_path / "words").mkdir()
        library.save(str(tmp_path / "words" / "tokenizer.json"))
        named = {"eos_token": "[SEP]", "bos_token": None, "mask_token": "[MASK]"}
        (tmp_path / "words" / "tokenizer_config.json").write_text(json.dumps(named))
        return tmp_path / "words"

    return make


def test_documents_without_an_end_are_named(corpus, tmp_path):
    loaded = load_tokenizer(corpus.tokenizer)
    prefix = without_manifest(corpus.train, tmp_path / "there")
    ends = np.cumsum(Shard(corpus.train).document_lengths)
    tokens = np.fromfile(shard_path(prefix, ".bin"), dtype=np.uint16)
    tokens[ends[[3, 5]] - 1] = tokens[0]
    tokens.tofile(shard_path(prefix, ".bin"))
    adopted, _ = adopt(prefix, loaded)
    assert (adopted.unended, adopted.first_unended, adopted.manifest.append_eos) == (2, 3, False)


def patch(path, place, content):
    with path.open("r+b") as file:
        file.seek(place)
        file.write(content)


BAD = {
    "an id above the vocabulary": (
        lambda prefix, size: patch(shard_path(prefix, ".bin"), 20, struct.pack("<H", size)),
        r"token 10 has id \d+, outside \[0, \d+\) of .*another tokenizer",
    ),
    "the mask id": (
        lambda prefix, size: patch(shard_path(prefix, ".bin"), 30, struct.pack("<H", 2)),
        "token 15 is the mask id 2.*--mask-token none",
    ),
    "a truncated index": (
        lambda prefix, size: shard_path(prefix, ".idx").write_bytes(
            shard_path(prefix, ".idx").read_bytes()[:-9]
        ),
        "bytes do not hold",
    ),
    "a big-endian index": (
        lambda prefix, size: patch(shard_path(prefix, ".idx"), 9, struct.pack(">Q", 1)),
        "written on a big-endian machine",
    ),
    "a truncated .bin": (
        lambda prefix, size: shard_path(prefix, ".bin").write_bytes(b"\0\0" * 100),
        "points at",
    ),
    "no .bin": (lambda prefix, size: shard_path(prefix, ".bin").unlink(), "no such file"),
    "a manifest": (lambda prefix, size: shard_path(prefix, ".json").write_text("{}"), "exists already"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_adopted_is_named_and_gets_no_manifest(corpus, tmp_path, name):
    loaded = load_tokenizer(corpus.tokenizer)
    prefix = without_manifest(corpus.train, tmp_path / "there")
    spoil, message = BAD[name]
    spoil(prefix, loaded.vocabulary.size)
    with pytest.raises(InputError, match=message):
        adopt(prefix, loaded)
    assert shard_path(prefix, ".json").exists() == (name == "a manifest")


def test_a_file_that_changes_meanwhile_is_refused(corpus, tmp_path):
    prefix = without_manifest(corpus.train, tmp_path / "there")

    def change(done, total):
        patch(shard_path(prefix, ".bin"), 0, b"\1")

    with pytest.raises(InputError, match="changed while it was read"):
        adopt_shard(prefix, load_tokenizer(corpus.tokenizer), change)
    assert not shard_path(prefix, ".json").exists()


def test_another_tokenizer_s_shard_is_refused(corpus, tmp_path):
    """One with fewer ids; one with as many cannot be told, and the samples show it."""
    loaded = load_tokenizer(corpus.tokenizer)
    small = replace(loaded, vocabulary=replace(loaded.vocabulary, size=260))
    with pytest.raises(InputError, match="was another tokenizer used"):
        adopt(without_manifest(corpus.train, tmp_path / "there"), small)


def test_a_shard_without_manifest_says_how_to_adopt_it(corpus, tmp_path):
    prefix = without_manifest(corpus.train, tmp_path / "there")
    with pytest.raises(InputError, match=f"index --adopt {prefix} --tokenizer TOKENIZER"):
        Shard(prefix)
    with pytest.raises(InputError, match="no such file; `megatron-dlm index` writes shards"):
        Shard(tmp_path / "nowhere")
