"""Thousands of damaged shards: each is refused with one line, or read as if nothing had happened."""

import json
import random
import struct
from collections import Counter

import numpy as np
import pytest

from megatron_dlm.data.loading.packing import TokenBlocks
from megatron_dlm.data.preprocessing.index import IndexConfig, build_shards
from megatron_dlm.data.shards.manifest import shard_path
from megatron_dlm.data.shards.shard import HEADER, Shard, read_index
from megatron_dlm.interfaces import InputError
from tools import tiny

EXTREMES = (0, 1, -1, 2**15, 2**31 - 1, -(2**31), 2**40, 2**63 - 1, -(2**63))


@pytest.fixture(scope="module")
def prefix(corpus, tmp_path_factory):
    """A shard with documents of several sequences and empty ones."""
    directory = tmp_path_factory.mktemp("fuzz")
    texts = tiny.sentences(40, seed=3)
    lines = [texts[0], "", [texts[1], texts[2]], *texts[3:20], ["", texts[21]], "", *texts[22:]]
    text = tiny.write_jsonl(directory / "text.jsonl", lines)
    config = IndexConfig(input=(str(text),), output=directory / "shard", tokenizer=corpus.tokenizer)
    build_shards(config, lambda progress: None)
    return directory / "shard"


def flipped(content, generator):
    content = bytearray(content)
    for _ in range(generator.choice((1, 1, 2, 8))):
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    return bytes(content)


def cut_or_longer(content, generator):
    if generator.random() < 0.5:
        return content[: generator.randrange(len(content))]
    return content + generator.randbytes(generator.choice((1, 2, 8, 4096)))


def extreme_number(content, generator):
    """A word, four or eight bytes, that is something an index must not hold."""
    form = generator.choice(("<i", "<q"))
    bits = struct.calcsize(form) * 8
    number = (generator.choice(EXTREMES) + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)
    at = generator.choice((18, 26, HEADER.size + 4 * generator.randrange(len(content) // 4 - 10)))
    return content[:at] + struct.pack(form, number) + content[at + struct.calcsize(form) :]


def swapped(content, generator):
    """Two pieces in each other's place; lengths, pointers and documents of another order."""
    size = generator.choice((4, 8, 16))
    first, second = sorted(generator.sample(range((len(content) - HEADER.size) // size), 2))
    a, b = HEADER.size + first * size, HEADER.size + second * size
    middle = content[a + size : b]
    return content[:a] + content[b : b + size] + middle + content[a : a + size] + content[b + size :]


VALUES = (None, -1, 0, 1e999, "x", "../../etc/passwd", [], {}, True, 2**70, [[[]]], "\ud800", "a\0b", 7)


def other_value(content, generator):
    """A member of the manifest, at any depth, gone or another."""
    manifest = json.loads(content)
    place = manifest
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return json.dumps(manifest).encode()
        key = generator.choice(keys)
        if isinstance(place[key], (dict, list)) and generator.random() < 0.7:
            place = place[key]
            continue
        if generator.random() < 0.2:
            del place[key]
        else:
            place[key] = generator.choice(VALUES)
        return json.dumps(manifest).encode()


def bomb(content, generator):
    """What JSON readers stumble over."""
    number = content.replace(b'"format": 1', b'"format": ' + b"9" * generator.choice((400, 10_000)))
    return generator.choice((b"[" * 100_000, b'{"format":' * 50_000, number))


KINDS = {
    "bit flips, index": (".idx", flipped, 400),
    "cut or longer, index": (".idx", cut_or_longer, 200),
    "extreme numbers, index": (".idx", extreme_number, 400),
    "pieces swapped, index": (".idx", swapped, 200),
    "bit flips, tokens": (".bin", flipped, 300),
    "cut or longer, tokens": (".bin", cut_or_longer, 100),
    "bit flips, manifest": (".json", flipped, 300),
    "cut or longer, manifest": (".json", cut_or_longer, 100),
    "other values, manifest": (".json", other_value, 400),
    "bombs, manifest": (".json", bomb, 10),
}


def reading(prefix):
    """Tokens and documents of a shard, as a run reads them, with its files' checksums compared."""
    shard = Shard(prefix)
    shard.verify_checksums()
    blocks = TokenBlocks(shard, 32, document_mask=True)
    everything = np.arange(blocks.num_rows)
    return blocks.read(everything).tobytes() + blocks.read_documents(everything).tobytes()


def within_bounds(path, bin_bytes):
    """What any index that is accepted by itself holds to, whatever its checksum."""
    index = read_index(path, bin_bytes)
    dtype, lengths, boundaries = index.dtype, index.lengths, index.boundaries
    assert lengths.sum(dtype=np.int64) * dtype.itemsize == bin_bytes and (lengths > 0).all()
    assert boundaries[0] == 0 and boundaries[-1] == len(lengths) and (np.diff(boundaries) >= 0).all()


@pytest.mark.parametrize("name", KINDS)
def test_damage_is_refused_or_without_effect(prefix, name, record_property):
    suffix, damage, count = KINDS[name]
    path = shard_path(prefix, suffix)
    good, expected = path.read_bytes(), reading(prefix)
    bin_bytes = shard_path(prefix, ".bin").stat().st_size
    generator = random.Random(name)
    outcomes: Counter[str] = Counter()
    try:
        for attempt in range(count):
            bad = damage(good, generator)
            path.write_bytes(bad)
            if suffix == ".idx":
                try:
                    within_bounds(path, bin_bytes)
                except InputError as error:
                    assert str(path) in str(error)
            try:
                found = reading(prefix)
            except InputError as error:
                assert str(prefix) in str(error) and "\n" not in str(error), (name, attempt, error)
                outcomes["refused"] += 1
            else:
                assert found == expected, (name, attempt)
                assert suffix == ".json" or bad == good, (name, attempt)
                outcomes["same tokens"] += 1
    finally:
        path.write_bytes(good)
    assert outcomes["refused"] > 0.3 * count
    record_property("table: fuzz", (name, count, outcomes["refused"], outcomes["same tokens"]))
