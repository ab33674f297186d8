"""examples/index_corpus.py: downloaded files to the prefixes that the recipes read."""

import pytest

from megatron_dlm.data.shards.manifest import read_manifest
from tests.helpers import processes
from tools import tiny


def run(*words):
    return processes.run("examples/index_corpus.py", *words, check=False)


def test_the_last_files_are_held_out_or_the_validation_directory_is(corpus, tmp_path):
    for name in ("a/1", "a/2", "b/1"):
        path = tmp_path / "flat" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        tiny.write_jsonl(path, tiny.sentences(10, seed=1))
    words = ["--tokenizer", corpus.tokenizer, "--output", tmp_path / "data", "--workers", 1]
    finished = run("nemotron-phase1", tmp_path / "flat", *words)
    assert finished.returncode == 0, finished.stderr
    train, held_out = (
        read_manifest(tmp_path / "data" / "nemotron-phase1" / name) for name in ("train", "validation")
    )
    assert (train.num_documents, held_out.num_documents) == (20, 10)
    assert [source.path for source in held_out.sources] == [str(tmp_path / "flat" / "b" / "1.jsonl")]
    (tmp_path / "split").mkdir()
    for name, source in (("train", "a"), ("validation", "b")):
        (tmp_path / "split" / name).symlink_to(tmp_path / "flat" / source)
    finished = run("slim-pajama", tmp_path / "split", *words)
    assert finished.returncode == 0, finished.stderr
    assert read_manifest(tmp_path / "data" / "slim-pajama" / "train").num_documents == 20


@pytest.mark.parametrize("name", ["nothing", "no such", "all held out", "no tokenizer"])
def test_bad_input_is_one_line_and_leaves_nothing(corpus, tmp_path, name):
    (tmp_path / "nothing").mkdir()
    (tmp_path / "files").mkdir()
    tiny.write_jsonl(tmp_path / "files" / "1.jsonl", tiny.sentences(3, seed=1))
    directory = {"nothing": "nothing", "no such": "gone"}.get(name, "files")
    tokenizer = tmp_path / "gone" if name == "no tokenizer" else corpus.tokenizer
    expected = {
        "nothing": "a directory without .jsonl",
        "no such": "no such directory",
        "all held out": "held-out-files: 1 is not in [1, 1)",
        "no tokenizer": "tokenizer: ",
    }[name]
    finished = run(
        "slim-pajama", tmp_path / directory, "--tokenizer", tokenizer, "--output", tmp_path / "data"
    )
    assert finished.returncode == 2 and expected in finished.stderr
    assert len(finished.stderr.splitlines()) == 1 and not (tmp_path / "data").exists()
