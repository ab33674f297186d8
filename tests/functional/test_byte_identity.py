"""One corpus, one SHA-256: any number of workers and MPI ranks, and a job that was killed five times."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from megatron_dlm.data.shards.manifest import shard_path
from megatron_dlm.data.tokenizers.tokenizer import load_tokenizer
from tests.helpers import megatron_index
from tests.helpers.hang import HANG_SECONDS
from tests.helpers.indexing import wait_for
from tests.helpers.mpi import find_mpirun
from tests.helpers.paths import ROOT
from tools import tiny

pytestmark = pytest.mark.slow


def sha256(prefix):
    """Of .bin and .idx together."""
    digest = hashlib.sha256(shard_path(prefix, ".bin").read_bytes())
    digest.update(shard_path(prefix, ".idx").read_bytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def reference(corpus, tmp_path_factory):
    """A text, and what Megatron-LM's scheme makes of it, document by document."""
    directory = tmp_path_factory.mktemp("identity")
    texts = [*tiny.sentences(60_000, seed=6), "", "[MASK] <eos>"]
    text, loaded = tiny.write_jsonl(directory / "text.jsonl", texts), load_tokenizer(corpus.tokenizer)
    megatron_index.index_texts(loaded, text, directory / "megatron")
    return text, sha256(directory / "megatron")


def words(corpus, reference, output, *more):
    command = [sys.executable, "-m", "megatron_dlm", "index", "--input", reference[0], "--output", output]
    command += ["--tokenizer", corpus.tokenizer, "--unit-bytes", 200_000, *more]
    return [str(word) for word in command]


def start(arguments):
    return subprocess.Popen(
        arguments,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process):
    output, _ = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 0, output


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_workers(corpus, reference, tmp_path, record_property, workers):
    finish(start(words(corpus, reference, tmp_path / "shard", "--workers", workers)))
    assert sha256(tmp_path / "shard") == reference[1]
    record_property("table: bytes", (f"{workers} workers", reference[1][:32]))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks(corpus, reference, tmp_path, record_property, ranks):
    pytest.importorskip("mpi4py")
    if (mpirun := find_mpirun()) is None:
        pytest.skip("mpirun is not installed")
    launcher = [mpirun, "-n", str(ranks), "--allow-run-as-root", "--oversubscribe"]
    finish(start([*launcher, *words(corpus, reference, tmp_path / "shard", "--mpi")]))
    assert sha256(tmp_path / "shard") == reference[1]
    record_property("table: bytes", (f"{ranks} ranks under mpirun", reference[1][:32]))


def test_five_kills(corpus, reference, tmp_path, record_property):
    """All processes at once, at random moments; the slow encoder, so that there is time for them."""
    dice, moments = random.Random(11), []
    arguments = words(corpus, reference, tmp_path / "shard", "--workers", 2, "--backend", "library")
    for attempt in range(30):
        process, moment = start(arguments), dice.uniform(0, 0.4 * (attempt + 1))
        wait_for(process, shard_path(tmp_path / "shard", ".parts"))
        time.sleep(moment)
        if process.poll() is None and len(moments) < 5:
            os.killpg(process.pid, signal.SIGKILL)
            moments.append(f"{moment:.1f} s")
        output, _ = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), output
        if len(moments) == 5:
            break
        if process.returncode == 0:
            # Done before its turn: from the start.
            for suffix in (".bin", ".idx", ".json"):
                shard_path(tmp_path / "shard", suffix).unlink()
    assert len(moments) == 5
    finish(start(arguments))
    assert sha256(tmp_path / "shard") == reference[1]
    record_property(
        "table: bytes", (f"2 workers, killed {', '.join(moments)} after its start", reference[1][:32])
    )
