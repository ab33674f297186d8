"""The shards a run reads, opened and compared; needs neither a process group nor megatron-core."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from megatron_dlm.data.blending import Blend
from megatron_dlm.data.loader import DataConfig
from megatron_dlm.data.packing import TokenBlocks, split_documents
from megatron_dlm.data.shard import Shard
from megatron_dlm.interfaces import InputError, Vocabulary


@dataclass(frozen=True)
class BlendedShards:
    """Opened shards with their weights."""

    blend: Blend
    blocks: dict[str, TokenBlocks]
    """By the names of the blend."""


@dataclass(frozen=True)
class RunData:
    """Opened and checked shards."""

    train: BlendedShards
    validation: BlendedShards
    vocabulary: Vocabulary
    tokenizer_fingerprint: str
    train_sha256: str
    """Of the training tokens; of a blend of its shards and weights. Only a named change is gone on with."""
    validation_bytes_per_token: float


def open_data(config: DataConfig) -> RunData:
    """Open all shards.

    Args:
        config: prefixes, weights and sequence length.

    Returns:
        The blocks and what the manifests say.

    Raises:
        InputError: a shard is missing, damaged, too short or twice there, or made by another tokenizer.
    """
    shards = [Shard(prefix) for _, prefix in config.blend()]
    weights = [weight for weight, _ in config.blend()]
    held_out = shards if config.validation is None else [Shard(config.validation)]
    first = shards[0].manifest
    for shard in [*shards[1:], *held_out]:
        if shard.manifest.tokenizer_fingerprint != first.tokenizer_fingerprint:
            field = "validation" if shard in held_out else "train"
            raise InputError(
                f"data.{field}: {shard.prefix} was made by another tokenizer than {shards[0].prefix}"
            )
    if config.verify_checksums:
        for shard in {id(shard): shard for shard in [*shards, *held_out]}.values():
            shard.verify_checksums()
    train = _blended(shards, weights, config, part=0)
    return RunData(
        train=train,
        validation=_blended(held_out, weights if config.split else [1.0], config, part=1),
        vocabulary=first.vocabulary,
        tokenizer_fingerprint=first.tokenizer_fingerprint,
        train_sha256=first.tokens_sha256 if _is_plain(config) else _digest(train.blend),
        validation_bytes_per_token=_bytes_per_token(held_out),
    )


def _is_plain(config: DataConfig) -> bool:
    return len(config.train) == 1 and not config.split


def _digest(blend: Blend) -> str:
    return hashlib.sha256(json.dumps([blend.names, blend.weights]).encode()).hexdigest()


def _bytes_per_token(shards: list[Shard]) -> float:
    text_bytes = sum(shard.manifest.num_text_bytes for shard in shards)
    return text_bytes / sum(shard.manifest.num_tokens for shard in shards)


def _blended(shards: list[Shard], weights: list[float], config: DataConfig, *, part: int) -> BlendedShards:
    blocks = []
    for shard in shards:
        documents = None
        if config.split:
            documents = split_documents(len(shard.document_lengths), config.split)[part]
        blocks.append(
            TokenBlocks(shard, config.seq_length, document_mask=config.document_mask, documents=documents)
        )
    blend = Blend.of([block.name for block in blocks], weights)
    return BlendedShards(blend, dict(zip(blend.names, blocks, strict=True)))


def held_out_blocks(prefix: Path, seq_length: int, *, document_mask: bool) -> tuple[Shard, BlendedShards]:
    """One shard by itself, for evaluation.

    Args:
        prefix: of the shard.
        seq_length: tokens of one sample.
        document_mask: keep attention inside documents.

    Returns:
        The shard and its blocks.
    """
    shard = Shard(prefix)
    blocks = TokenBlocks(shard, seq_length, document_mask=document_mask)
    return shard, BlendedShards(Blend.of([blocks.name], [1.0]), {blocks.name: blocks})
