"""Statistics of shards: lengths, sources, copies inside and across shards; the command that prints them."""

import subprocess
import sys

import numpy as np
import pytest

from megatron_dlm.data.preprocessing.index import IndexConfig, build_shards
from megatron_dlm.data.shards.shard import Shard
from megatron_dlm.data.shards.statistics import statistics_of
from tests.helpers.hang import HANG_SECONDS
from tools import tiny

FIRST = [*tiny.sentences(50, seed=1), *tiny.sentences(3, seed=1), "the model"]
SECOND = [*tiny.sentences(20, seed=2), *tiny.sentences(4, seed=1)]


@pytest.fixture(scope="module")
def prefixes(corpus, tmp_path_factory):
    directory = tmp_path_factory.mktemp("statistics")
    found = []
    for name, texts in (("first", FIRST), ("second", SECOND)):
        text = tiny.write_jsonl(directory / f"{name}.jsonl", texts)
        config = IndexConfig(input=(str(text),), output=directory / name, tokenizer=corpus.tokenizer)
        build_shards(config, lambda progress: None)
        found.append(directory / name)
    return found


def test_counts(prefixes):
    shards = [Shard(prefix) for prefix in prefixes]
    first, second = statistics_of(shards)
    assert (first.repeats, second.repeats) == (3, 0)
    # Three of the four that both have are twice in the first.
    assert (first.elsewhere, second.elsewhere) == (7, 4)
    assert statistics_of(shards[:1])[0].elsewhere == 0
    lengths = shards[0].document_lengths
    assert first.quantiles["longest"] == lengths.max() and first.quantiles["shortest"] == lengths.min()
    histogram = first.histogram()
    assert sum(count for _, _, count in histogram) == len(FIRST)
    for low, high, count in histogram:
        assert count == ((lengths >= low) & (lengths < high)).sum()
    assert histogram[0][2] > 0 and histogram[-1][2] > 0


@pytest.mark.parametrize("length", [1, 2, 255, 256, 70_000])
def test_every_length_has_a_bin(prefixes, length):
    shard = Shard(prefixes[0])
    shard.document_lengths = np.array([length])
    histogram = statistics_of([Shard(prefixes[1])])[0].__class__(shard, {}, 0, 0).histogram()
    assert [count for low, high, count in histogram if low <= length < high] == [1]


def run(*arguments):
    command = [sys.executable, "-m", "megatron_dlm", "index", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS)


def test_the_command_prints_and_draws(prefixes, corpus, tmp_path):
    finished = run("--stats", *prefixes)
    assert finished.returncode == 0, finished.stderr
    assert "3 (5.56%)" in finished.stdout and "first.jsonl" in finished.stdout
    picture = prefixes[0].with_name("first.lengths.png")
    assert picture.read_bytes().startswith(b"\x89PNG") and str(picture) in finished.stdout
    text = prefixes[0].with_name("first.jsonl")
    made = run("--stats", "--tokenizer", corpus.tokenizer, "--output", tmp_path / "s", "--input", text)
    assert made.returncode == 0 and "54 documents" in made.stdout and "3 (5.56%)" in made.stdout
    again = run(prefixes[0], "--stats", "--pictures", tmp_path)
    assert again.returncode == 0 and (tmp_path / "first.lengths.png").is_file()
    unwritable = run("--stats", prefixes[0], "--pictures", tmp_path / "none")
    assert unwritable.returncode == 0 and "no picture: " in unwritable.stderr
    missing = run("--stats", tmp_path / "nothing")
    assert missing.returncode == 2 and "no such file" in missing.stderr
