"""Megatron-LM's way to index a corpus, document by document, with megatron-core's builder."""

import json

import torch


def index(lines, keys, encode, eod, vocabulary_size, prefixes):
    """Write one shard for each key.

    Args:
        lines: JSON lines, bytes or str.
        keys: members that hold text or a list of texts.
        encode: ids of one text.
        eod: id that ends a document, or None.
        vocabulary_size: decides the dtype.
        prefixes: of the shards, in the order of the keys.
    """
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    dtype = DType.optimal_dtype(vocabulary_size)
    builders = [IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype) for prefix in prefixes]
    for line in lines:
        record = json.loads(line)
        for key, builder in zip(keys, builders, strict=True):
            text = record[key]
            encoded = [encode(part) for part in (text if isinstance(text, list) else [text])]
            lengths = [len(ids) for ids in encoded if ids]
            ids = [token for part in encoded for token in part]
            if ids and eod is not None:
                ids.append(eod)
                lengths[-1] += 1
            builder.add_document(torch.tensor(ids, dtype=torch.int64), lengths)
    for prefix, builder in zip(prefixes, builders, strict=True):
        builder.finalize(f"{prefix}.idx")


def index_texts(loaded, text, prefix):
    """Write the shard of a file of JSON lines with a Hugging Face tokenizer and its end of documents."""
    index(
        text.read_text().splitlines(),
        ["text"],
        lambda part: loaded.tokenizer.encode(part, add_special_tokens=False).ids,
        loaded.vocabulary.eos_token_id,
        loaded.vocabulary.size,
        [prefix],
    )
