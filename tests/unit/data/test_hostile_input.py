"""Input that nobody meant well: every kind has a result, the same from both encoders, none a traceback."""

import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from megatron_dlm.data.preprocessing import part_files
from megatron_dlm.data.preprocessing.index import IndexConfig, build_shards
from megatron_dlm.data.shards.shard import Shard
from megatron_dlm.data.tokenizers import encoders
from megatron_dlm.data.tokenizers.tokenizer import load_tokenizer
from megatron_dlm.interfaces import InputError
from tests.helpers.hang import HANG_SECONDS
from tests.helpers.paths import ROOT
from tools import tiny


def index(corpus, path, output, **fields):
    fields = {"tokenizer": corpus and corpus.tokenizer, "workers": 1} | fields
    (manifest,) = build_shards(
        IndexConfig(input=(str(path),), output=output, **fields), lambda progress: None
    )
    return manifest


def texts_of(corpus, prefix):
    """Documents as text, without their ends."""
    shard, decode = Shard(prefix), load_tokenizer(corpus.tokenizer).decode
    pieces = np.split(np.asarray(shard.tokens), np.cumsum(shard.document_lengths)[:-1])
    return [decode(piece[:-1].tolist()) for piece in pieces]


LINES = {
    # What is taken, and the text it gives.
    b'\xef\xbb\xbf{"text": "byte order mark"}': "byte order mark",
    b'{"text": "carriage return"}\r': "carriage return",
    b'{"text": "a\\u0000b"}': "a\0b",
    b'{"text": "once", "text": "twice"}': "twice",
    b'{"text": "not a number", "x": NaN}': "not a number",
    b'{"text": "huge", "x": 1' + b"0" * 400 + b"}": "huge",
    b'{"text": "pair \\ud83d\\ude00"}': "pair \U0001f600",
    b'{"text": "elsewhere", "x": "\\ud800"}': "elsewhere",
    b'{"text": "nested", "x": ' + b"[" * 500 + b"]" * 500 + b"}": "nested",
    # What is not, and why.
    b'{"text": "a", "x": ' + b"9" * 10_000 + b"}": ("not JSON",),
    b'{"text": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}": ("not JSON",),
    b'{"text": "lone \\ud800"}': ("lone surrogate",),
    b'{"text": "\xff\xfe"}': ("not UTF-8",),
    b'{"text": 7}': ("holds int, not a string",),
    b'{"text": ["a", 7]}': ("holds list, not a string",),
    b'{"text": {"a": "b"}}': ("holds dict, not a string",),
    b'{"text": "cut': ("not JSON",),
    b'{"text": "two"} {"text": "records"}': ("not JSON",),
    b"\0\0\0": ("not JSON",),
    b'"text"': ("not a JSON object",),
}


def test_every_kind_of_line_has_a_result(corpus, tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(b"".join(line + b"\n" for line in LINES))
    taken = [result for result in LINES.values() if isinstance(result, str)]
    rejected = [(number, r[0]) for number, r in enumerate(LINES.values(), 1) if isinstance(r, tuple)]
    for backend in ("gigatoken", "library"):
        output = tmp_path / backend
        manifest = index(corpus, path, output, max_rejects=len(rejected), backend=backend)
        assert texts_of(corpus, output) == taken and manifest.num_documents == len(taken)
        found = [json.loads(line) for line in output.with_name(f"{backend}.rejects.jsonl").open()]
        assert [entry["line"] for entry in found] == [number for number, _ in rejected]
        for entry, (_, reason) in zip(found, rejected, strict=True):
            assert reason in entry["reason"], entry


@pytest.mark.parametrize("backend", ["gigatoken", "library"])
def test_no_text_gives_a_special_token(corpus, tmp_path, backend):
    loaded = load_tokenizer(corpus.tokenizer)
    vocabulary, generator = loaded.vocabulary, random.Random(0)
    pieces = [
        "[MASK]",
        "<eos>",
        "<bos>",
        "[MASK",
        "]",
        "<",
        "eos>",
        " ",
        "a",
        "\n",
        "[",
        "MASK]",
        "<e",
        "os>",
    ]
    lines = ["".join(generator.choices(pieces, k=generator.randint(1, 12))) for _ in range(1000)]
    index(corpus, tiny.write_jsonl(tmp_path / "t.jsonl", lines), tmp_path / "shard", backend=backend)
    tokens = np.asarray(Shard(tmp_path / "shard").tokens)
    assert not (tokens == vocabulary.mask_token_id).any() and not (tokens == vocabulary.bos_token_id).any()
    assert (tokens == vocabulary.eos_token_id).sum() == len(lines)
    assert texts_of(corpus, tmp_path / "shard") == lines


def test_a_line_of_100_mb_is_a_reject_in_little_memory(corpus, tmp_path):
    path = tmp_path / "t.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "before"}\n{"text": "')
        file.write(b"a" * 100_000_000)
        file.write(b'"}\n{"text": "behind"}\n')
    code = (
        "from megatron_dlm.cli.main import main\n"
        "try:\n    main()\n"
        # Not getrusage, which counts what the process that started this one had.
        "finally:\n    print(next(line for line in open('/proc/self/status') if 'VmHWM' in line))\n"
    )
    words = [sys.executable, "-c", code, "index", "--input", path, "--output", tmp_path / "shard"]
    words += ["--tokenizer", corpus.tokenizer, "--max-rejects", 1, "--workers", 1]
    finished = subprocess.run(
        [*map(str, words)], capture_output=True, text=True, cwd=ROOT, timeout=HANG_SECONDS
    )
    assert finished.returncode == 0, finished.stderr
    assert texts_of(corpus, tmp_path / "shard") == ["before", "behind"]
    reject = json.loads((tmp_path / "shard.rejects.jsonl").read_text())
    assert reject["line"] == 2 and reject["reason"] == f"a line above --max-line-bytes {64 << 20}"
    # The limit itself is read, and pieces behind it thrown away.
    assert int(finished.stdout.split("VmHWM:")[1].split()[0]) < 450 * 1024


def test_long_documents_without_spaces_are_taken(corpus, tmp_path):
    path = tiny.write_jsonl(tmp_path / "t.jsonl", ["a" * 1_000_000, "\u6f22" * 300_000])
    digests = []
    for backend in ("gigatoken", "library"):
        index(corpus, path, tmp_path / backend, backend=backend)
        digests.append(Shard(tmp_path / backend).manifest.tokens_sha256)
    assert digests[0] == digests[1]


def test_a_document_of_too_many_tokens_is_named(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(part_files, "MAX_DOCUMENT_TOKENS", 50)
    path = tiny.write_jsonl(tmp_path / "t.jsonl", ["the model", "a" * 200, "the"])
    with pytest.raises(InputError, match=r"t\.jsonl:2: more than 50 tokens"):
        index(corpus, path, tmp_path / "shard")


@pytest.mark.parametrize("size", [65_499, 65_500, 70_000])
def test_ids_beyond_16_bits_are_kept(tmp_path, size):
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset

    words = {"<eos>": 0, "<mask>": 1} | {f"w{i}": i for i in range(2, size)}
    model = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    directory = tmp_path / "tokenizer"
    directory.mkdir()
    model.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"eos_token": "<eos>", "mask_token": "<mask>"}')
    path = tiny.write_jsonl(tmp_path / "t.jsonl", [f"w{size - 1} w2 w{size // 2}"])
    manifest = index(None, path, tmp_path / "shard", tokenizer=directory)
    expected = [size - 1, 2, size // 2, 0]
    assert np.asarray(Shard(tmp_path / "shard").tokens).tolist() == expected
    # Its arrays must not outlive it.
    theirs = IndexedDataset(str(tmp_path / "shard"))
    assert theirs[0].tolist() == expected
    assert manifest.dtype == np.dtype(DType.optimal_dtype(size)).name


def test_links_are_followed_and_loops_end(corpus, tmp_path):
    path = tiny.write_jsonl(tmp_path / "real.jsonl", ["the model"])
    directory = tmp_path / "links"
    directory.mkdir()
    os.symlink(path, directory / "link.jsonl")
    os.symlink(directory, directory / "loop")
    assert index(corpus, directory / "link.jsonl", tmp_path / "one").num_documents == 1
    assert index(corpus, directory, tmp_path / "two").num_documents == 1
    os.symlink(tmp_path / "gone.jsonl", directory / "broken.jsonl")
    with pytest.raises(InputError, match=r"broken\.jsonl: no such file"):
        index(corpus, directory / "broken.jsonl", tmp_path / "three")


@pytest.mark.parametrize("name", ["a\nb.jsonl", "a\0b.jsonl"])
def test_names_with_line_breaks_are_refused(corpus, tmp_path, name):
    with pytest.raises(InputError, match="a path with a line break or NUL"):
        index(corpus, tmp_path / name, tmp_path / "shard")
    with pytest.raises(InputError, match="a path with a line break or NUL"):
        index(corpus, tmp_path / "t.jsonl", tmp_path / name)


def copied_tokenizer(corpus, directory, **changes):
    """The corpus's tokenizer with members of tokenizer.json or of its configuration changed."""
    directory.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = json.loads((corpus.tokenizer / name).read_text())
        content |= changes.get(name.removesuffix(".json"), {})
        (directory / name).write_text(json.dumps(content))
    return directory


def test_a_pattern_without_end_is_an_error(corpus, tmp_path):
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    directory = copied_tokenizer(corpus, tmp_path / "t", tokenizer={"pre_tokenizer": pattern})
    path = tiny.write_jsonl(tmp_path / "t.jsonl", ["a" * 60 + "b"])
    for workers in (1, 2):
        with pytest.raises(InputError, match=r"tokenizer: .*: cannot encode: .*retry-limit"):
            index(corpus, path, tmp_path / "shard", tokenizer=directory, workers=workers)


def test_code_beside_a_tokenizer_never_runs(corpus, tmp_path):
    sentinel = tmp_path / "ran"
    wanted = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    directory = copied_tokenizer(corpus, tmp_path / "t", tokenizer_config=wanted)
    (directory / "evil.py").write_text(f"open({str(sentinel)!r}, 'w')\nclass Evil: pass\n")
    path = tiny.write_jsonl(tmp_path / "t.jsonl", ["the model"])
    assert index(corpus, path, tmp_path / "shard", tokenizer=directory).num_documents == 1
    assert not sentinel.exists()


def test_a_huge_or_pickled_tokenizer_is_refused(corpus, tmp_path, monkeypatch):
    path = tiny.write_jsonl(tmp_path / "t.jsonl", ["the model"])
    directory = copied_tokenizer(corpus, tmp_path / "t")
    monkeypatch.setattr(encoders, "LARGEST_FILE_BYTES", 1000)
    with pytest.raises(InputError, match=r"tokenizer\.json: \d+ bytes are above 1000"):
        index(corpus, path, tmp_path / "shard", tokenizer=directory)
    monkeypatch.undo()
    (directory / "tokenizer.json").unlink()
    (directory / "vocab.pkl").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(InputError, match=r"tokenizer\.json: No such file"):
        index(corpus, path, tmp_path / "shard", tokenizer=directory)
    assert not (ROOT / "ran").exists()
