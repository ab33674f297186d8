"""WikiText-2 and GSM8K, where they lie beside the repository: indexed, opened by megatron-core, read back."""

import json
import re

import numpy as np
import pytest

from megatron_dlm.data.preprocessing.index import IndexConfig, build_shards
from megatron_dlm.data.tokenizers.tokenizer import load_tokenizer, train_tokenizer
from tests.helpers.paths import DATA


def index(directory, inputs, texts, **fields):
    """Train a tokenizer on texts, index, and open the shard with megatron-core."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    train_tokenizer(texts, 4096, directory / "tokenizer")
    config = IndexConfig(
        input=tuple(map(str, inputs)),
        output=directory / "shard",
        tokenizer=directory / "tokenizer",
        workers=2,
        unit_bytes=200_000,
        **fields,
    )
    (manifest,) = build_shards(config, lambda progress: None)
    return manifest, IndexedDataset(str(directory / "shard")), load_tokenizer(directory / "tokenizer")


def record(record_property, name, manifest, documents):
    figures = (f"{manifest.num_documents:,}", f"{manifest.num_tokens:,}", f"{manifest.bytes_per_token:.3f}")
    record_property("table: corpora", (name, *figures, f"{documents:,} equal"))


def corpus_files(*names):
    files = [DATA / name for name in names]
    for file in files:
        if not file.is_file():
            pytest.skip(f"no public corpus at {file}")
    return files


def test_wikitext_2(tmp_path, record_property):
    files = corpus_files("wikitext-2/valid.txt", "wikitext-2/test.txt")
    # Documents of plain text lie between blank lines.
    expected = []
    for file in files:
        blocks = re.split(r"^\s*\n", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
        expected += [block for block in blocks if block]
    manifest, dataset, loaded = index(tmp_path, files, expected)
    assert len(dataset) == len(expected) == manifest.num_documents > 2000
    for document, text in enumerate(expected):
        ids = dataset[document].tolist()
        assert ids[-1] == loaded.vocabulary.eos_token_id and loaded.decode(ids[:-1]) == text
    record(record_property, "WikiText-2 valid and test", manifest, len(expected))


def test_gsm8k(tmp_path, record_property):
    files = corpus_files("gsm8k/train.jsonl", "gsm8k/test.jsonl")
    records = [json.loads(line) for file in files for line in file.open(encoding="utf-8")]
    texts = [record[key] for record in records for key in ("question", "answer")]
    manifest, dataset, loaded = index(tmp_path, files, texts, prompt_key="question", json_keys=("answer",))
    assert len(dataset) == 2 * len(records) and manifest.num_documents == len(records) == 8792
    found = [dataset[sequence].tolist() for sequence in range(len(dataset))]
    ends = {ids.pop() for ids in found[1::2]}
    assert ends == {loaded.vocabulary.eos_token_id}
    assert [loaded.decode(ids) for ids in found] == texts
    assert np.all(dataset.document_indices == np.arange(0, len(texts) + 1, 2))
    record(record_property, "GSM8K train and test, question and answer", manifest, len(records))
