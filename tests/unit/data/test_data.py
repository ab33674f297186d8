"""Tokenizer, indexer, shard reader, packing and order."""

import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_dlm.data.loading.data_config import microbatch_positions
from megatron_dlm.data.loading.packing import TokenBlocks
from megatron_dlm.data.preprocessing.index import IndexConfig, build_shards
from megatron_dlm.data.shards.manifest import shard_path
from megatron_dlm.data.shards.shard import Shard, write_index
from megatron_dlm.data.tokenizers.encoders import choose_encoder
from megatron_dlm.data.tokenizers.tokenizer import load_tokenizer, train_tokenizer
from megatron_dlm.interfaces import InputError
from tools import tiny

HOSTILE = ["a [MASK] b", "<eos>", "x<bos>y <eos>[MASK]", "[MASK][MASK]", "naïve 漢字 \u200b \x00 tab\t"]


def index(tmp_path, corpus, text, **fields):
    config = IndexConfig(
        **(
            {"input": (str(text),), "output": tmp_path / "out" / "shard", "tokenizer": corpus.tokenizer}
            | fields
        )
    )
    (manifest,) = build_shards(config, lambda progress: None)
    return manifest


def copy_shard(corpus, tmp_path):
    for suffix in (".bin", ".idx", ".json"):
        content = shard_path(corpus.train, suffix).read_bytes()
        shard_path(tmp_path / "train", suffix).write_bytes(content)
    return tmp_path / "train"


def test_special_tokens_in_text_are_plain_text(corpus):
    loaded = load_tokenizer(corpus.tokenizer)
    special = {
        loaded.vocabulary.mask_token_id,
        loaded.vocabulary.eos_token_id,
        loaded.vocabulary.bos_token_id,
    }
    for backend, name in (("gigatoken", "gigatoken"), ("library", "tokenizers")):
        found, encode = choose_encoder(loaded, HOSTILE, backend)
        assert found == name
        flat, ends = encode(HOSTILE)
        for text, ids in zip(HOSTILE, np.split(flat, ends[1:-1]), strict=True):
            assert not special & set(ids.tolist())
            assert loaded.tokenizer.decode(ids.tolist()) == text


def test_both_encoders_agree(corpus):
    loaded = load_tokenizer(corpus.tokenizer)
    texts = tiny.sentences(300, seed=3) + HOSTILE
    _, fast = choose_encoder(loaded, texts, "gigatoken")
    _, slow = choose_encoder(loaded, texts, "library")
    assert all(np.array_equal(a, b) for a, b in zip(fast(texts), slow(texts), strict=True))
    assert all(len(array) == n for array, n in zip(fast([]), (0, 1), strict=True))


def test_unreadable_tokenizers_are_named(tmp_path, corpus):
    with pytest.raises(InputError, match=r"tokenizer: .*tokenizer\.json: No such file"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(InputError, match="not a readable tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text((corpus.tokenizer / "tokenizer.json").read_text())
    with pytest.raises(InputError, match="names no eos_token"):
        load_tokenizer(tmp_path)


def test_vocabulary_size_must_be_reachable(tmp_path):
    with pytest.raises(InputError, match="vocab-size: 100 is below 259"):
        train_tokenizer(["text"], 100, tmp_path)
    with pytest.raises(InputError, match="the text yields only"):
        train_tokenizer(["text"], 5000, tmp_path)


def test_bytes_are_those_of_megatron_core(tmp_path):
    """Same .bin and .idx as IndexedDatasetBuilder, and IndexedDataset reads them back."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    generator = np.random.default_rng(0)
    for dtype, high in ((np.uint16, 65000), (np.int32, 130000)):
        documents = [generator.integers(0, high, size=n).astype(np.uint32) for n in (5, 1, 300, 7)]
        theirs = tmp_path / "theirs"
        builder = IndexedDatasetBuilder(f"{theirs}.bin", dtype=dtype)
        for document in documents:
            builder.add_document(torch.from_numpy(document.astype(np.int64)), [len(document)])
        builder.finalize(f"{theirs}.idx")
        ours = tmp_path / "ours"
        lengths = [np.array([len(d) for d in documents], dtype=np.int32)]
        ones = [np.ones(len(documents), dtype=np.int32)]
        np.concatenate(documents).astype(dtype).tofile(shard_path(ours, ".bin"))
        write_index(
            shard_path(ours, ".idx"), np.dtype(dtype), lambda n=lengths: iter(n), lambda n=ones: iter(n)
        )
        for suffix in (".bin", ".idx"):
            assert shard_path(ours, suffix).read_bytes() == shard_path(theirs, suffix).read_bytes()
        dataset = IndexedDataset(str(ours))
        assert [dataset[i].tolist() for i in range(len(dataset))] == [d.tolist() for d in documents]


def test_index_counts_and_round_trip(tmp_path, corpus):
    texts = ["first document", "", "second [MASK] document"]
    text = tiny.write_jsonl(tmp_path / "t.jsonl", texts)
    manifest = index(tmp_path, corpus, text)
    loaded = load_tokenizer(corpus.tokenizer)
    shard = Shard(tmp_path / "out" / "shard")
    shard.verify_checksums()
    assert manifest.num_documents == len(shard.document_lengths) == 2  # the empty one gives nothing
    assert manifest.num_tokens == len(shard.tokens)
    assert manifest.num_text_bytes == sum(len(t.encode()) for t in texts)
    pieces = np.split(np.asarray(shard.tokens), np.cumsum(shard.document_lengths)[:-1])
    assert [loaded.tokenizer.decode(p.tolist()) for p in pieces] == [
        "first document",
        "second [MASK] document",
    ]
    assert all(p[-1] == loaded.vocabulary.eos_token_id for p in pieces)
    counts = np.bincount(shard.tokens) / len(shard.tokens)
    assert manifest.unigram_entropy_nats == pytest.approx(-sum(p * np.log(p) for p in counts if p))


def test_text_files_split_at_blank_lines(tmp_path, corpus):
    (tmp_path / "t.txt").write_text("one\ntwo\n\n\n three\n")
    manifest = index(tmp_path, corpus, tmp_path / "t.txt")
    assert manifest.num_documents == 2


BAD_LINES = {
    b"{not json}": "not JSON",
    b'{"body": "x"}': "no key 'text'",
    b'{"text": null}': "holds NoneType, not a string",
    b'["text"]': "a JSON array, not an object",
    b'{"text": "\xff"}': "not UTF-8",
    b'{"text": "\\ud800"}': "lone surrogate",
    b'{"text": ' + b"[" * 100_000: "not JSON",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:20].decode("latin-1"))
def test_a_bad_line_stops_the_run_and_leaves_nothing(tmp_path, corpus, line):
    text = tmp_path / "t.jsonl"
    text.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(InputError) as error:
        index(tmp_path, corpus, text)
    assert f"{text}:2: " in str(error.value) and BAD_LINES[line] in str(error.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_allowed_rejects_are_listed(tmp_path, corpus):
    text = tmp_path / "t.jsonl"
    text.write_bytes(b'{"text": "good"}\nbad\n{"text": "fine"}\n')
    manifest = index(tmp_path, corpus, text, max_rejects=1)
    assert manifest.num_documents == 2 and manifest.sources[0].rejects == 1
    entry = json.loads((tmp_path / "out" / "shard.rejects.jsonl").read_text())
    assert entry["line"] == 2 and "not JSON" in entry["reason"]


def test_a_failed_run_keeps_the_previous_shard(tmp_path, corpus):
    good = tiny.write_jsonl(tmp_path / "good.jsonl", ["good text"])
    index(tmp_path, corpus, good)
    (tmp_path / "bad.jsonl").write_text("bad\n")
    with pytest.raises(InputError):
        index(tmp_path, corpus, tmp_path / "bad.jsonl")
    Shard(tmp_path / "out" / "shard").verify_checksums()


@pytest.mark.parametrize("name", ["missing.jsonl", "file.csv"])
def test_bad_input_paths(tmp_path, corpus, name):
    with pytest.raises(InputError, match=r"input: .*(no such file|suffix)"):
        index(tmp_path, corpus, tmp_path / name)


def test_no_documents_is_an_error(tmp_path, corpus):
    with pytest.raises(InputError, match="no documents"):
        index(tmp_path, corpus, tiny.write_jsonl(tmp_path / "t.jsonl", ["", ""]))


def truncate(path, count):
    path.write_bytes(path.read_bytes()[:-count])


def patch(path, offset, content):
    data = bytearray(path.read_bytes())
    data[offset : offset + len(content)] = content
    path.write_bytes(bytes(data))


HEADER = 34
DAMAGE = {
    "bin missing": (".bin", Path.unlink, "no such file"),
    "bin cut": (".bin", lambda p: truncate(p, 10), "the manifest says"),
    "idx cut": (".idx", lambda p: truncate(p, 8), "the manifest says"),
    "idx magic": (".idx", lambda p: patch(p, 0, b"XX"), "not a Megatron-LM index: begins with b'XX"),
    "idx version": (".idx", lambda p: patch(p, 9, struct.pack("<Q", 2)), "index, version 2 is not 1"),
    "idx dtype": (".idx", lambda p: patch(p, 17, b"\x63"), "type 99 of tokens is none of 4"),
    "idx big-endian": (
        ".idx",
        lambda p: patch(p, 9, struct.pack(">Q", 1)),
        "written on a big-endian machine",
    ),
    "idx other dtype": (".idx", lambda p: patch(p, 17, b"\x04"), "lengths and pointers"),
    "idx huge count": (".idx", lambda p: patch(p, 18, struct.pack("<Q", 1 << 40)), "do not hold"),
    "idx negative length": (
        ".idx",
        lambda p: patch(p, HEADER, struct.pack("<i", -5)),
        "lengths and pointers",
    ),
    "idx points outside": (
        ".idx",
        lambda p: patch(p, HEADER, struct.pack("<i", 2**31 - 1)),
        "lengths and pointers",
    ),
    "manifest missing": (".json", Path.unlink, "no such file"),
    "manifest not json": (".json", lambda p: p.write_text("{"), "unreadable manifest"),
    "manifest other format": (".json", lambda p: p.write_text('{"format": 9}'), "format 9 is not 1"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_shards_are_refused(tmp_path, corpus, name):
    suffix, damage, message = DAMAGE[name]
    prefix = copy_shard(corpus, tmp_path)
    damage(shard_path(prefix, suffix))
    with pytest.raises(InputError) as error:
        Shard(prefix)
    assert message in str(error.value) and str(prefix) in str(error.value)


def test_a_file_cut_while_in_use_is_an_error(tmp_path, corpus):
    """Mapped into memory it would end the process with a bus error."""
    prefix = copy_shard(corpus, tmp_path)
    blocks = TokenBlocks(Shard(prefix), 32)
    last = np.array([blocks.num_rows - 1])
    assert blocks.read(last).shape == (1, 33)
    truncate(shard_path(prefix, ".bin"), 100)
    with pytest.raises(InputError, match=r"train\.bin: ends at byte \d+ of \d+; was it cut while in use"):
        blocks.read(last)


def edit_manifest(prefix, **changes):
    path = shard_path(prefix, ".json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"files": []}, "the manifest lists [], not its .bin and .idx"),
        ({"num_tokens": 0}, "the manifest says ('uint16', 400, 0)"),
        ({"dtype": "int32"}, "the manifest says ('int32', 400, "),
        ({"vocabulary": 5}, "vocabulary: expected an object"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(tmp_path, corpus, changes, message):
    prefix = copy_shard(corpus, tmp_path)
    edit_manifest(prefix, **changes)
    with pytest.raises(InputError) as error:
        Shard(prefix)
    assert message in str(error.value)


def test_a_missing_second_input_is_found_before_any_work(tmp_path, corpus):
    good = tiny.write_jsonl(tmp_path / "good.jsonl", ["good text"])
    with pytest.raises(InputError, match="no such file"):
        index(tmp_path, corpus, good, input=(str(good), str(tmp_path / "none.jsonl")))
    assert not (tmp_path / "out").exists()


def test_a_flipped_token_is_found_by_checksum(tmp_path, corpus):
    prefix = copy_shard(corpus, tmp_path)
    patch(shard_path(prefix, ".bin"), 100, b"\x05")
    shard = Shard(prefix)
    with pytest.raises(InputError, match="SHA-256 differs"):
        shard.verify_checksums()


@pytest.mark.parametrize(
    ("token", "message"), [(301, r"token id 301 is outside \[0, 301\)"), (2, "contains the mask id 2")]
)
def test_bad_ids_are_refused_before_the_model_sees_them(tmp_path, corpus, token, message):
    prefix = copy_shard(corpus, tmp_path)
    patch(shard_path(prefix, ".bin"), 2 * 40, struct.pack("<H", token))
    blocks = TokenBlocks(Shard(prefix), 32)
    blocks.read(np.array([0]))
    with pytest.raises(InputError, match=message):
        blocks.read(np.array([0, 1]))


def test_blocks_have_stride_and_look_ahead(corpus):
    shard = Shard(corpus.train)
    blocks = TokenBlocks(shard, 32)
    rows = blocks.read(np.array([0, 1, blocks.num_rows - 1]))
    assert rows.shape == (3, 33)
    assert rows[0, -1] == rows[1, 0]
    assert np.array_equal(rows[1], shard.tokens[32:65])
    assert blocks.num_rows == (len(shard.tokens) - 1) // 32


def test_sequence_longer_than_the_data(corpus):
    with pytest.raises(InputError, match=r"data.seq_length: 1000000 needs 1000001 tokens"):
        TokenBlocks(Shard(corpus.train), 1_000_000)


@pytest.mark.parametrize(("micro", "ranks"), [(1, 1), (4, 1), (2, 2), (1, 4)])
def test_positions_cover_the_batch_for_any_layout(micro, ranks):
    found = [
        np.concatenate(
            list(
                microbatch_positions(
                    80, global_batch_size=16, micro_batch_size=micro, data_rank=r, data_size=ranks
                )
            )
        )
        for r in range(ranks)
    ]
    assert np.array_equal(np.concatenate(found), np.arange(80, 96))


def test_config_defaults_end_documents(corpus, tmp_path):
    text = tiny.write_jsonl(tmp_path / "t.jsonl", ["some text"])
    with_end = index(tmp_path, corpus, text)
    without = index(tmp_path, corpus, text, append_eos=False)
    assert with_end.num_tokens == without.num_tokens + 1
    assert replace(with_end, append_eos=False).append_eos is False
