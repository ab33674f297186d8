"""Corpora and shards in an object store: a real S3 server on this machine."""

import gzip
import shutil

import numpy as np
import pytest

from megatron_dlm.data.loading.packing import TokenBlocks
from megatron_dlm.data.loading.prefetch import Prefetcher
from megatron_dlm.data.preprocessing.index import IndexConfig, build_shards
from megatron_dlm.data.shards.manifest import shard_path
from megatron_dlm.data.shards.shard import Shard
from megatron_dlm.interfaces import InputError
from tests.helpers.indexing import digests
from tests.helpers.runs import arguments_for, finish, start, train_metrics
from tools import tiny

pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'megatron-dlm[data]'")
server = pytest.importorskip("moto.server", reason="moto is not installed: pip install 'moto[s3,server]'")
SUFFIXES = (".bin", ".idx", ".json")


@pytest.fixture(scope="module")
def bucket():
    """An empty bucket; the environment says where its server is, as a user's would."""
    import s3fs

    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            # Newer checksums of uploads are not the server's.
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "NO_PROXY": "127.0.0.1",
        }.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        store = s3fs.S3FileSystem()
        store.mkdir("corpus")
        yield store
        s3fs.S3FileSystem.clear_instance_cache()
    running.stop()


def put_shard(store, prefix, name):
    for suffix in SUFFIXES:
        store.put_file(str(shard_path(prefix, suffix)), f"corpus/{name}{suffix}")
    return f"s3://corpus/{name}"


def index(corpus, output, *inputs):
    config = IndexConfig(
        input=tuple(map(str, inputs)), output=output, tokenizer=corpus.tokenizer, workers=2, unit_bytes=3000
    )
    build_shards(config, lambda progress: None)
    return digests(output)


def test_corpora_are_read_from_there(corpus, bucket, tmp_path):
    first = tiny.write_jsonl(tmp_path / "a.jsonl", tiny.sentences(100, seed=1))
    second = tmp_path / "b.jsonl.gz"
    text = tiny.write_jsonl(tmp_path / "b.jsonl", tiny.sentences(50, seed=2))
    second.write_bytes(gzip.compress(text.read_bytes()))
    for path in (first, second):
        bucket.put_file(str(path), f"corpus/raw/{path.name}")
    expected = index(corpus, tmp_path / "local", first, second)
    for number, name in enumerate(("s3://corpus/raw", "s3://corpus/raw/*.jsonl*")):
        assert index(corpus, tmp_path / f"remote{number}", name) == expected
    with pytest.raises(InputError, match=r"^input: s3://corpus/raw/none\.jsonl: no such file$"):
        index(corpus, tmp_path / "none", "s3://corpus/raw/none.jsonl")


def test_shards_are_read_from_there(corpus, bucket):
    url = put_shard(bucket, corpus.train, "shards/train")
    local, remote = Shard(corpus.train), Shard(url)
    remote.verify_checksums()
    assert remote.manifest == local.manifest and str(remote.prefix) == url
    blocks, far = TokenBlocks(local, 32), TokenBlocks(remote, 32)
    some = np.array([5, 0, blocks.num_rows - 1])
    assert blocks.name == far.name
    assert np.array_equal(far.read(some), blocks.read(some))
    source = Prefetcher(lambda n: far.read(np.array([n])), lambda n: n + 1, workers=2)
    assert all(np.array_equal(source.get(n), blocks.read(np.array([n]))) for n in range(6))
    source.close()


def test_megatron_core_reads_them_too(corpus, bucket, tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.object_storage_utils import ObjectStorageConfig

    url = put_shard(bucket, corpus.train, "shards/train")
    cache = ObjectStorageConfig(path_to_idx_cache=str(tmp_path))
    (tmp_path / "corpus" / "shards").mkdir(parents=True)
    theirs = IndexedDataset(url, mmap=False, object_storage_config=cache)
    shard = Shard(url)
    assert len(theirs) == len(shard.document_lengths)
    assert np.array_equal(np.concatenate([theirs[i] for i in range(len(theirs))]), np.asarray(shard.tokens))


def test_what_is_missing_or_cut_is_named(corpus, bucket, tmp_path):
    with pytest.raises(InputError, match=r"^data: s3://corpus/shards/none\.json: no such file"):
        Shard("s3://corpus/shards/none")
    url = put_shard(bucket, corpus.train, "cut/train")
    shard = Shard(url)
    content = bucket.cat_file("corpus/cut/train.bin")
    bucket.pipe_file("corpus/cut/train.bin", content[:100])
    with pytest.raises(InputError, match=r"s3://corpus/cut/train\.bin: ends at byte 100 of"):
        shard.tokens[:200]
    with pytest.raises(InputError, match=r"s3://corpus/cut/train\.bin: 100 bytes, the manifest says"):
        Shard(url)
    bucket.rm("corpus/cut/train.bin")
    with pytest.raises(InputError, match=r"s3://corpus/cut/train\.bin: no such file"):
        shard.tokens[:200]


def test_an_unreachable_store_is_one_line(corpus, bucket, monkeypatch):
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(InputError, match=r"^data: s3://corpus/shards/far"):
        Shard("s3://corpus/shards/far")
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.slow
def test_a_run_reads_from_there(corpus, bucket, tmp_path):
    urls = [put_shard(bucket, prefix, f"run/{prefix.name}") for prefix in (corpus.train, corpus.validation)]
    runs = []
    for name, (train, validation) in {"near": (corpus.train, corpus.validation), "far": urls}.items():
        data = ["--data.train", train, "--data.validation", validation, "--data.workers", 1]
        code, output = finish(start(arguments_for(corpus, tmp_path / name, *data)))
        assert code == 0, output
        runs.append(train_metrics(tmp_path / name))
    assert runs[0] == runs[1]
    shutil.rmtree(tmp_path)
