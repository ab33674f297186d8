"""The indexer: input formats, byte identity with Megatron-LM's scheme, any number of processes, restarts."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from megatron_dlm.data.preprocessing.index import IndexConfig, build_shards
from megatron_dlm.data.preprocessing.input_files import find_sources
from megatron_dlm.data.preprocessing.work_units import plan_units
from megatron_dlm.data.shards.manifest import shard_path
from megatron_dlm.data.shards.shard import Shard
from megatron_dlm.data.tokenizers.tokenizer import load_tokenizer
from megatron_dlm.interfaces import InputError
from tests.helpers import megatron_index
from tests.helpers.hang import HANG_SECONDS
from tests.helpers.indexing import digests, wait_for
from tests.helpers.paths import ROOT
from tools import tiny

TEXTS = [*tiny.sentences(300, seed=9), "", "naïve 漢字 \x00 tab\t", "[MASK] <eos>", "\n\n"]
SMALL_UNITS = 2000


def config_for(corpus, tmp_path, *inputs, **fields):
    fields = {"output": tmp_path / "out" / "shard", "tokenizer": corpus.tokenizer, "workers": 1} | fields
    return IndexConfig(input=tuple(map(str, inputs)), **fields)


def build(config):
    return build_shards(config, lambda progress: None)


def leftovers(config):
    return sorted(
        path.name for path in config.output.parent.iterdir() if path.suffix not in (".bin", ".idx", ".json")
    )


@pytest.fixture(scope="module")
def reference(corpus, tmp_path_factory):
    """What Megatron-LM's scheme makes of TEXTS."""
    directory = tmp_path_factory.mktemp("reference")
    loaded = load_tokenizer(corpus.tokenizer)
    text = tiny.write_jsonl(directory / "text.jsonl", TEXTS)
    megatron_index.index_texts(loaded, text, directory / "shard")
    return text, digests(directory / "shard")


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("backend", ["gigatoken", "library"])
def test_bytes_are_megatron_s_for_any_number_of_workers(corpus, tmp_path, reference, workers, backend):
    text, expected = reference
    config = config_for(corpus, tmp_path, text, workers=workers, backend=backend, unit_bytes=SMALL_UNITS)
    assert len(plan_units(find_sources([text]), SMALL_UNITS)) > 8
    (manifest,) = build(config)
    assert digests(config.output) == expected
    assert manifest.backend == {"library": "tokenizers"}.get(backend, backend) and leftovers(config) == []
    shard = Shard(config.output)
    shard.verify_checksums()
    assert manifest.num_documents == len(shard.document_lengths) == len(TEXTS) - 1
    assert manifest.num_text_bytes == sum(len(t.encode()) for t in TEXTS)


def write_format(tmp_path, name):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    path = tmp_path / f"input.{name}"
    if name == "jsonl":
        path.write_bytes(lines)
    elif name == "jsonl.gz":
        path.write_bytes(gzip.compress(lines))
    elif name == "jsonl.zst":
        zstd = pytest.importorskip("backports.zstd")
        path.write_bytes(zstd.compress(lines))
    elif name == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": TEXTS}), path, row_group_size=50)
    return path


@pytest.mark.parametrize("name", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_formats_give_the_same_bytes(corpus, tmp_path, reference, name):
    config = config_for(corpus, tmp_path, write_format(tmp_path, name), workers=2, unit_bytes=SMALL_UNITS)
    build(config)
    assert digests(config.output) == reference[1]


@pytest.mark.parametrize("name", ["jsonl.gz", "jsonl.zst"])
def test_an_archive_cut_short_is_named(corpus, tmp_path, name):
    path = write_format(tmp_path, name)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=f"{path}: cut short or damaged"):
        build(config_for(corpus, tmp_path, path))


@pytest.mark.parametrize("name", ["jsonl.gz", "jsonl.zst"])
def test_a_damaged_archive_is_named(corpus, tmp_path, name):
    """Whatever a codec raises for a byte that is another one: of its header, in the middle, at its end."""
    path = write_format(tmp_path, name)
    whole, refused = path.read_bytes(), 0
    for place in (0, 2, 4, 6, 12, len(whole) // 2, len(whole) - 6):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        config = config_for(corpus, tmp_path, path, output=tmp_path / str(place) / "shard", workers=1)
        try:
            build(config)
        except InputError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused >= 3


@pytest.mark.parametrize("log", [27, 28, 31])
def test_zstandard_windows_of_any_length_are_read(corpus, tmp_path, reference, log):
    """Dumps of forums are written with `--long=31`; libzstd refuses windows above 2^27 unless asked."""
    zstd = pytest.importorskip("backports.zstd")
    option = zstd.CompressionParameter
    options = {option.window_log: log, option.enable_long_distance_matching: 1}
    path = write_format(tmp_path, "jsonl.zst")
    lines = zstd.decompress(path.read_bytes())
    compressor = zstd.ZstdCompressor(options=options)
    # In pieces: of a whole text the window is cut to its length.
    path.write_bytes(compressor.compress(lines[:100]) + compressor.compress(lines[100:]) + compressor.flush())
    config = config_for(corpus, tmp_path, path)
    build(config)
    assert digests(config.output) == reference[1]


def test_directories_globs_and_several_files_are_read_by_name(corpus, tmp_path, reference):
    parts = tmp_path / "parts"
    parts.mkdir()
    lines = reference[0].read_text().splitlines(keepends=True)
    bounds = [0, 50, 51, 200, len(lines)]
    for index in range(4):
        (parts / f"{index}.jsonl").write_text("".join(lines[bounds[index] : bounds[index + 1]]))
    (parts / "README").write_text("not data")
    (parts / "empty.jsonl").touch()
    files = [parts / f"{index}.jsonl" for index in range(4)]
    for number, inputs in enumerate([[parts], [parts / "?.jsonl"], files]):
        config = config_for(corpus, tmp_path, *inputs, output=tmp_path / str(number) / "shard", workers=2)
        (manifest,) = build(config)
        assert digests(config.output) == reference[1]
        assert [source.documents for source in manifest.sources][:4] == [50, 1, 149, len(TEXTS) - 201]
    for bad, message in ((parts / "*.gz", "no such files"), (tmp_path / "none", "suffix is not one of")):
        with pytest.raises(InputError, match=message):
            build(config_for(corpus, tmp_path, bad))


def test_standard_input(command, corpus, tmp_path, reference):
    words = [sys.executable, "-m", "megatron_dlm", "index", "--input", "-", "--output", tmp_path / "shard"]
    words += ["--tokenizer", corpus.tokenizer]
    with reference[0].open() as file:
        subprocess.run([*map(str, words)], stdin=file, check=True, cwd=ROOT, capture_output=True)
    assert digests(tmp_path / "shard") == reference[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shard.bin", "shard.idx", "shard.json"]


def test_several_keys_and_lists_of_texts(corpus, tmp_path):
    loaded = load_tokenizer(corpus.tokenizer)
    records = [
        {"question": "what is noise", "answer": ["first part", "", "second"]},
        {"question": "", "answer": "one"},
        {"question": "and the model", "answer": []},
    ]
    text = tmp_path / "t.jsonl"
    text.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = config_for(corpus, tmp_path, text, json_keys=("question", "answer"))
    manifests = build(config)
    expected = [tmp_path / "q", tmp_path / "a"]
    megatron_index.index(
        text.read_text().splitlines(),
        ["question", "answer"],
        lambda part: loaded.tokenizer.encode(part, add_special_tokens=False).ids,
        loaded.vocabulary.eos_token_id,
        loaded.vocabulary.size,
        expected,
    )
    for prefix, theirs, manifest in zip(config.prefixes(), expected, manifests, strict=True):
        assert digests(prefix) == digests(theirs)
        Shard(prefix).verify_checksums()
        assert prefix.name == f"shard_{manifest.json_key}"
    assert [m.num_documents for m in manifests] == [2, 2]
    assert Shard(config.prefixes()[1]).boundaries.tolist() == [0, 2, 3, 3]


def test_special_tokens_become_tokens_only_if_asked(corpus, tmp_path):
    loaded = load_tokenizer(corpus.tokenizer)
    text = tiny.write_jsonl(tmp_path / "t.jsonl", ["a <eos> b"])
    (plain,) = build(config_for(corpus, tmp_path, text))
    config = config_for(corpus, tmp_path, text, special_tokens_as_text=False, output=tmp_path / "special")
    (special,) = build(config)
    assert special.num_tokens < plain.num_tokens and special.backend == "tokenizers"
    assert (np.asarray(Shard(config.output).tokens) == loaded.vocabulary.eos_token_id).sum() == 2
    with pytest.raises(InputError, match=r"t\.jsonl:1: encodes to the mask id"):
        build(replace(config, input=(str(tiny.write_jsonl(tmp_path / "t.jsonl", ["a [MASK]"])),)))


def test_long_lines_are_rejects_and_memory_does_not_see_them(corpus, tmp_path):
    text = tmp_path / "t.jsonl"
    with text.open("wb") as file:
        file.write(b'{"text": "good"}\n{"text": "' + b"x" * 3_000_000 + b'"}\n{"text": "fine"}\n')
    config = config_for(corpus, tmp_path, text, max_line_bytes=1_000_000, max_rejects=1)
    (manifest,) = build(config)
    assert manifest.num_documents == 2 and manifest.sources[0].rejects == 1
    entry = json.loads(shard_path(config.output, ".rejects.jsonl").read_text())
    assert entry["line"] == 2 and "a line above --max-line-bytes 1000000" in entry["reason"]


def test_rejects_of_all_units_are_counted_and_their_lines_are_the_file_s(corpus, tmp_path):
    lines = [json.dumps({"text": text}) for text in TEXTS]
    bad = (40, 150, 299)
    for index in bad:
        lines[index] = "bad"
    text = tmp_path / "t.jsonl"
    text.write_text("\n".join(lines) + "\n")
    config = config_for(corpus, tmp_path, text, max_rejects=3, workers=2, unit_bytes=SMALL_UNITS)
    build(config)
    entries = shard_path(config.output, ".rejects.jsonl").read_text().splitlines()
    assert [json.loads(entry)["line"] for entry in entries] == [index + 1 for index in bad]
    good = digests(config.output)
    for allowed, line in ((0, r"\d+"), (2, 41)):
        with pytest.raises(
            InputError, match=rf"t\.jsonl:{line}: not JSON.*more than --max-rejects {allowed}"
        ):
            build(replace(config, max_rejects=allowed))
    assert digests(config.output) == good and leftovers(config) == ["shard.rejects.jsonl"]


PLAIN = "one\ntwo\n\n\n three\n\t\n" + "long line " * 50 + "\n\nlast, without an end"


def test_plain_text_is_cut_between_documents_only(corpus, tmp_path):
    text = tmp_path / "t.txt"
    text.write_text("\n\n".join([PLAIN] * 20))
    loaded = load_tokenizer(corpus.tokenizer)
    expected = ["one\ntwo\n", " three\n", "long line " * 50 + "\n", "last, without an end"]
    for unit_bytes in (0, 50, 333):
        config = config_for(corpus, tmp_path, text, unit_bytes=unit_bytes, workers=2, append_eos=False)
        build(config)
        shard = Shard(config.output)
        pieces = np.split(np.asarray(shard.tokens), np.cumsum(shard.document_lengths)[:-1])
        found = [loaded.tokenizer.decode(piece.tolist()) for piece in pieces]
        assert found[:3] == expected[:3] and found[-1] == expected[3]
        assert len(found) == 80


def start(config, *more):
    words = [sys.executable, "-m", "megatron_dlm", "index", "--input", *config.input]
    words += ["--output", config.output, "--tokenizer", config.tokenizer]
    words += ["--unit-bytes", config.unit_bytes, "--workers", config.workers, *more]
    return subprocess.Popen(
        [*map(str, words)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture(scope="module")
def large(corpus, tmp_path_factory):
    """A text that takes a while, and its shard's digests."""
    directory = tmp_path_factory.mktemp("large")
    text = tiny.write_jsonl(directory / "large.jsonl", tiny.sentences(60_000, seed=4))
    config = config_for(corpus, directory, text)
    build(config)
    return text, digests(config.output)


def test_killed_at_any_moment_and_started_again(corpus, tmp_path, large):
    text, expected = large
    dice = random.Random(7)
    config = config_for(corpus, tmp_path, text, unit_bytes=200_000, workers=2, backend="library")
    kills = finished_units = 0
    for attempt in range(20):
        process = start(config, "--backend", "library")
        # From the moment it begins to encode, and later each time: how fast the machine is shall not matter.
        wait_for(process, tmp_path / "out" / "shard.parts")
        time.sleep(dice.uniform(0, 0.5 * (attempt + 1)))
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.communicate()
        if process.returncode == 0:
            break
        assert not shard_path(config.output, ".json").exists()
        finished_units = max(finished_units, len(list(tmp_path.glob("out/shard.parts/unit-*.json"))))
        if kills >= 5 and finished_units:
            break
    process = start(config, "--backend", "library")
    output, _ = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 0, output
    assert kills >= 1 and finished_units >= 1
    assert digests(config.output) == expected and leftovers(config) == []


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_jobs_that_share_the_work(corpus, tmp_path, large, order):
    text, expected = large
    config = config_for(corpus, tmp_path, text, unit_bytes=500_000)
    processes = [start(config, "--shard", f"{index}/3") for index in order]
    outputs = [process.communicate(timeout=HANG_SECONDS)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert digests(config.output) == expected and leftovers(config) == []
    assert sum("documents" in output and "tokens (" in output for output in outputs) == 1
    # One that comes late has nothing to do.
    output = start(config, "--shard", "0/3").communicate(timeout=HANG_SECONDS)[0]
    assert "no more to do" in output and digests(config.output) == expected


def test_a_second_process_on_the_same_output_is_refused(corpus, tmp_path, large):
    config = config_for(corpus, tmp_path, large[0], unit_bytes=100_000, workers=2)
    first = start(config, "--backend", "library")
    while not (tmp_path / "out" / "shard.parts" / "plan.json").exists():
        assert first.poll() is None, first.communicate()
        time.sleep(0.01)
    with pytest.raises(InputError, match="another process is writing there"):
        build(config)
    first.kill()
    first.communicate()


def test_a_worker_that_dies_is_an_error_and_no_hang(corpus, tmp_path, large):
    import psutil

    config = config_for(corpus, tmp_path, large[0], unit_bytes=200_000, workers=2)
    process = start(config, "--backend", "library")
    while len(list(tmp_path.glob("out/shard.parts/unit-*.json"))) < 1:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    psutil.Process(process.pid).children()[0].kill()
    output, _ = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 1 and "a worker process ended with exit code -9" in output, output
    output, _ = start(config).communicate(timeout=HANG_SECONDS)
    assert digests(config.output) == large[1], output


def test_a_full_disk_keeps_the_shard_that_was_there(corpus, tmp_path, reference, large):
    import resource

    config = config_for(corpus, tmp_path, reference[0])
    build(config)
    before = digests(config.output)
    words = [sys.executable, "-m", "megatron_dlm", "index", "--input", large[0], "--output", config.output]
    words += ["--tokenizer", corpus.tokenizer]
    finished = subprocess.run(
        [*map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)),
    )
    assert finished.returncode == 75, finished.stderr
    assert "File too large" in finished.stderr and len(finished.stderr.strip().splitlines()) == 1
    assert digests(config.output) == before
    Shard(config.output).verify_checksums()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shard": "3/3"}, "shard: '3/3' is not i/n"),
        ({"shard": "x"}, "shard: 'x' is not i/n"),
        ({"shard": "0/2", "mpi": True}, "shard: with mpi"),
        ({"json_keys": ("a", "a")}, "json_keys: a a"),
        ({"max_line_bytes": 0}, "max_line_bytes: 0 is below 1"),
        ({"workers": -1}, "workers: -1 is below 0"),
    ],
)
def test_bad_options_are_named(corpus, tmp_path, fields, message):
    with pytest.raises(InputError) as error:
        config_for(corpus, tmp_path, "t.jsonl", **fields)
    assert message in str(error.value)
