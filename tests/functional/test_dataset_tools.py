"""Tools around shards: Megatron-LM's command line, verification, merging; one job over MPI ranks."""

import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from megatron_dlm.data.shards.manifest import shard_path
from megatron_dlm.data.shards.shard import Shard
from megatron_dlm.data.tokenizers.tokenizer import load_tokenizer
from tests.helpers import megatron_index, processes
from tests.helpers.hang import HANG_SECONDS
from tests.helpers.mpi import find_mpirun
from tests.helpers.paths import ROOT
from tests.helpers.selection import slow
from tools import tiny


def run(tool, *words):
    return processes.run(f"tools/{tool}", *words, check=False)


def digests(prefix):
    return [
        hashlib.sha256(shard_path(prefix, suffix).read_bytes()).hexdigest() for suffix in (".bin", ".idx")
    ]


def megatron_words(corpus, text, output):
    words = ["--input", text, "--output-prefix", output, "--tokenizer-type", "HuggingFaceTokenizer"]
    return [*words, "--tokenizer-model", corpus.tokenizer, "--append-eod", "--workers", 2, "--partitions", 2]


def test_a_megatron_command_line_gives_megatron_s_files(corpus, tmp_path):
    loaded = load_tokenizer(corpus.tokenizer)
    records = [{"text": t, "title": t[:9]} for t in tiny.sentences(100, seed=1)]
    text = tmp_path / "t.jsonl"
    text.write_text("".join(json.dumps(record) + "\n" for record in records))
    words = [*megatron_words(corpus, text, tmp_path / "ours"), "--json-keys", "text", "title"]
    finished = run("preprocess_data.py", *words, "--log-interval", 10)
    assert finished.returncode == 0, finished.stderr
    keys = ["text", "title"]
    theirs = [tmp_path / f"theirs_{key}_document" for key in keys]
    megatron_index.index(
        text.read_text().splitlines(),
        keys,
        lambda part: loaded.tokenizer.encode(part, add_special_tokens=False).ids,
        loaded.vocabulary.eos_token_id,
        loaded.vocabulary.size,
        theirs,
    )
    for key, prefix in zip(keys, theirs, strict=True):
        assert digests(tmp_path / f"ours_{key}_document") == digests(prefix)


def test_gpt_2_s_two_files_give_megatron_s_files(tmp_path):
    """And a tokenizer folder, with which the shard is read and models are exported."""
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(tiny.sentences(200, seed=1), trainer)
    library.model.save(str(tmp_path))
    texts = [*tiny.sentences(50, seed=2), "caf\u00e9 <|endoftext|> \u4e2d  two"]
    text = tiny.write_jsonl(tmp_path / "t.jsonl", texts)
    words = ["--input", text, "--output-prefix", tmp_path / "ours", "--tokenizer-type", "GPT2BPETokenizer"]
    words += ["--vocab-file", tmp_path / "vocab.json", "--merge-file", tmp_path / "merges.txt"]
    words += ["--append-eod", "--workers", 1, "--find-optimal-num-workers", "--workers-to-check", 1, 2]
    finished = run("preprocess_data.py", *words)
    assert finished.returncode == 0, finished.stderr
    library.encode_special_tokens = True
    theirs = tmp_path / "theirs_text_document"
    encode = lambda part: library.encode(part, add_special_tokens=False).ids  # noqa: E731
    megatron_index.index(text.read_text().splitlines(), ["text"], encode, 0, 320, [theirs])
    assert digests(tmp_path / "ours_text_document") == digests(theirs)
    shard = Shard(tmp_path / "ours_text_document")
    loaded = load_tokenizer(tmp_path / "ours_tokenizer")
    assert shard.manifest.vocabulary == loaded.vocabulary and loaded.vocabulary.mask_token_id == 320
    end = int(shard.document_lengths.sum())
    length = int(shard.document_lengths[-1])
    assert loaded.decode(shard.tokens[end - length : end - 1].tolist()) == texts[-1]


def test_shards_of_megatron_are_adopted_and_merged_by_directory(corpus, tmp_path):
    (tmp_path / "parts").mkdir()
    for name in ("b", "a.c"):
        for suffix in (".bin", ".idx"):
            shutil.copyfile(shard_path(corpus.train, suffix), tmp_path / "parts" / f"{name}{suffix}")
    refused = run("merge_datasets.py", "--input", tmp_path / "parts", "--output-prefix", tmp_path / "both")
    assert refused.returncode == 2 and f"index --adopt {tmp_path}/parts/a.c" in refused.stderr
    prefixes = [tmp_path / "parts" / name for name in ("a.c", "b")]
    words = [*prefixes, "--write-manifest", "--tokenizer", corpus.tokenizer]
    finished = run("verify_dataset.py", *words)
    assert finished.returncode == 0 and finished.stdout.count(", adopted\n") == 2, finished.stderr
    finished = run("verify_dataset.py", *prefixes)
    assert finished.returncode == 0 and finished.stdout.count("as the manifest says") == 2
    finished = run("merge_datasets.py", "--input", tmp_path / "parts", "--output-prefix", tmp_path / "both")
    assert finished.returncode == 0, finished.stderr
    once = Shard(corpus.train).manifest
    assert Shard(tmp_path / "both").manifest.num_tokens == 2 * once.num_tokens
    assert run("merge_datasets.py", "--input", tmp_path, "--output", tmp_path / "x").returncode == 0
    assert run("verify_dataset.py", tmp_path / "nowhere").stdout.count("missing") == 1


@pytest.mark.parametrize("tool", sorted(path.name for path in (ROOT / "tools").glob("*.py")))
def test_helps_are_laid_out_as_written(tool):
    """No line of a description runs on into the next."""
    source = (ROOT / "tools" / tool).read_text()
    description = ast.get_docstring(ast.parse(source), clean=False) or ""
    assert not re.search(r"\S {4,}[a-z-]", description.replace(" #", "#")), description


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--split-sentences"], "--split-sentences: not supported"),
        (["--tokenizer-type", "BertWordPieceCase"], "BertWordPieceCase is not supported: it is not one of"),
        (["--tokenizer-type", "NullTokenizer"], "NullTokenizer is not supported: write ids with"),
        (["--tokenizer-type", "GPT2BPETokenizer"], "GPT2BPETokenizer needs --vocab-file and --merge-file"),
        (["--input", "none.jsonl"], "input: none.jsonl: no such file"),
    ],
)
def test_what_is_not_supported_is_named(corpus, tmp_path, more, message):
    words = [*megatron_words(corpus, "t.jsonl", tmp_path / "o"), *more]
    finished = run("preprocess_data.py", *words)
    assert finished.returncode == 2 and message in finished.stderr
    assert len(finished.stderr.strip().splitlines()) == 1


def copied(corpus, tmp_path, name="shard"):
    for suffix in (".bin", ".idx", ".json"):
        shutil.copyfile(shard_path(corpus.train, suffix), shard_path(tmp_path / name, suffix))
    prefix = tmp_path / name
    manifest = json.loads(shard_path(prefix, ".json").read_text())
    for entry, suffix in zip(manifest["files"], (".bin", ".idx"), strict=True):
        entry["name"] = f"{name}{suffix}"
    shard_path(prefix, ".json").write_text(json.dumps(manifest))
    return prefix


def with_tokens(prefix, change):
    """Change the tokens and make the checksums fit, as a faulty writer would."""
    path = shard_path(prefix, ".bin")
    tokens = np.fromfile(path, dtype=np.uint16)
    change(tokens)
    tokens.tofile(path)
    manifest = json.loads(shard_path(prefix, ".json").read_text())
    manifest["files"][0]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    shard_path(prefix, ".json").write_text(json.dumps(manifest))


def flip(prefix):
    path = shard_path(prefix, ".bin")
    content = bytearray(path.read_bytes())
    content[999] ^= 1
    path.write_bytes(content)


def cut(prefix):
    path = shard_path(prefix, ".idx")
    path.write_bytes(path.read_bytes()[:-8])


DAMAGE = {
    "flipped bit": (flip, "SHA-256 differs"),
    "cut index": (cut, "the manifest says"),
    "mask id": (lambda p: with_tokens(p, lambda t: t.__setitem__(70, 2)), "token 70 is the mask id 2"),
    "id out of range": (lambda p: with_tokens(p, lambda t: t.__setitem__(7, 400)), "id 400 is outside"),
    "no end": (lambda p: with_tokens(p, lambda t: t.__setitem__(-1, 5)), "does not end with <eos>"),
}


def test_good_and_damaged_shards_are_told_apart(corpus, tmp_path):
    finished = run("verify_dataset.py", corpus.train, corpus.validation)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("as the manifest says") == 2 and "document 399: " in finished.stdout
    for name, (damage, message) in DAMAGE.items():
        prefix = copied(corpus, tmp_path, name.replace(" ", "-"))
        assert run("verify_dataset.py", prefix, "--documents", 1).returncode == 0
        damage(prefix)
        finished = run("verify_dataset.py", corpus.validation, prefix)
        assert finished.returncode == 2 and "DAMAGED" in finished.stdout, name
        assert message in finished.stderr and str(prefix) in finished.stderr, (name, finished.stderr)


def test_merged_shards_are_one_after_the_other(corpus, tmp_path):
    both = tmp_path / "both"
    finished = run("merge_datasets.py", "--input", corpus.train, corpus.validation, "--output", both)
    assert finished.returncode == 0, finished.stderr
    merged, parts = Shard(both), [Shard(corpus.train), Shard(corpus.validation)]
    merged.verify_checksums()
    assert np.array_equal(merged.tokens, np.concatenate([part.tokens for part in parts]))
    assert np.array_equal(merged.document_lengths, np.concatenate([p.document_lengths for p in parts]))
    assert merged.manifest.num_documents == 500 and len(merged.manifest.sources) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both.bin", "both.idx", "both.json"]
    finished = run("merge_datasets.py", "--input", corpus.train, both, "--output", both)
    assert finished.returncode == 2 and "is one of the inputs" in finished.stderr
    other = copied(corpus, tmp_path)
    path = shard_path(other, ".json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"append_eos": False}))
    finished = run("merge_datasets.py", "--input", corpus.train, other, "--output", tmp_path / "new")
    assert finished.returncode == 2 and "append_eos False is not the True of" in finished.stderr
    assert not (tmp_path / "new.bin").exists()


@pytest.mark.parametrize("ranks", [1, slow(2), slow(3)])
def test_mpi_ranks_share_one_job(corpus, tmp_path, ranks):
    mpirun = find_mpirun()
    pytest.importorskip("mpi4py")
    if mpirun is None:
        pytest.skip("mpirun is not installed")
    text = tiny.write_jsonl(tmp_path / "t.jsonl", tiny.sentences(5000, seed=2))
    index = ["index", "--input", text, "--tokenizer", corpus.tokenizer, "--unit-bytes", 50_000]
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    python = [sys.executable, *processes.TRAINER, *index]
    processes.run(*python[1:], "--output", alone, "--workers", 1)
    words = [
        mpirun,
        "-n",
        ranks,
        "--allow-run-as-root",
        "--oversubscribe",
        *python,
        "--output",
        shared,
        "--mpi",
    ]
    finished = subprocess.run(
        [*map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert finished.returncode == 0, finished.stderr
    assert digests(shared) == digests(alone)
    assert finished.stdout.count("5,000 documents") == 1
    assert not shard_path(shared, ".parts").exists()
    bad = tiny.write_jsonl(tmp_path / "bad.jsonl", tiny.sentences(5000, seed=2))
    bad.write_text(bad.read_text() + "bad\n")
    words[words.index(text)] = bad
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMPI")}
    finished = subprocess.run(
        [*map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=HANG_SECONDS, env=environment
    )
    assert finished.returncode == 2 and "bad.jsonl:5001: not JSON" in finished.stderr, finished.stderr
    assert digests(shared) == digests(alone)
