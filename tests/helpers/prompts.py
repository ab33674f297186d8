"""Shards of prompts and responses."""

import json

from megatron_dlm.data.preprocessing.index import IndexConfig, build_shards
from tools import tiny

LENGTH = 192


RECORDS = [
    {"question": " ".join(words[: len(words) // 3]), "answer": " ".join(words[len(words) // 3 :])}
    for words in (sentence.split() for sentence in tiny.sentences(120, seed=5))
]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def index(corpus, path, prefix, **fields):
    fields = {"prompt_key": "question", "json_keys": ("answer",), "workers": 1} | fields
    config = IndexConfig(input=(str(path),), output=prefix, tokenizer=corpus.tokenizer, **fields)
    (manifest,) = build_shards(config, lambda progress: None)
    return manifest
