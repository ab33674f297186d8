"""The shards a run reads, opened and compared; needs neither a process group nor megatron-core."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace

from megatron_dlm.data.loading.blending import Blend
from megatron_dlm.data.loading.data_config import DataConfig
from megatron_dlm.data.loading.packing import Rows, TokenBlocks, split_documents
from megatron_dlm.data.loading.prompt_rows import PromptRows
from megatron_dlm.data.shards.shard import Shard
from megatron_dlm.interfaces import InputError, Vocabulary


@dataclass(frozen=True)
class BlendedShards:
    """Opened shards with their weights."""

    blend: Blend
    rows: dict[str, Rows]
    """Rows of each shard, by its name in the blend."""
    has_prompts: bool
    """Whether some are records of prompts and responses."""


@dataclass(frozen=True)
class RunData:
    """Opened and checked shards."""

    train: BlendedShards
    validation: BlendedShards
    vocabulary: Vocabulary
    tokenizer_fingerprint: str
    train_sha256: str
    """SHA-256 of the training tokens, or for a blend, of its shard names and weights. A resumed run refuses
    another hash unless the change is allowed."""
    validation_bytes_per_token: float

    @property
    def has_prompts(self) -> bool:
        """Whether some data are records of prompts and responses."""
        return self.train.has_prompts or self.validation.has_prompts


def open_data(config: DataConfig) -> RunData:
    """Open all shards.

    Args:
        config: prefixes, weights and sequence length.

    Returns:
        Training and validation rows, with vocabulary, tokenizer fingerprint and hash from the manifests.

    Raises:
        InputError: a shard is missing, damaged, too short, listed twice, or made by another tokenizer.
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
    return text_bytes / sum(s.manifest.num_tokens - s.manifest.num_prompt_tokens for s in shards)


def _blended(shards: list[Shard], weights: list[float], config: DataConfig, *, part: int) -> BlendedShards:
    rows = []
    for shard in shards:
        documents = None
        if config.split:
            documents = split_documents(len(shard.document_lengths), config.split)[part]
        rows.append(_rows(shard, config, documents))
    blend = Blend.of([row.name for row in rows], weights)
    has_prompts = any(shard.turn_lengths is not None for shard in shards)
    return BlendedShards(blend, dict(zip(blend.names, rows, strict=True)), has_prompts)


def _rows(shard: Shard, config: DataConfig, documents: tuple[int, int] | None) -> Rows:
    length = config.seq_length
    if shard.turn_lengths is not None:
        return PromptRows(shard, length, drop_long=config.drop_long_records, documents=documents)
    return TokenBlocks(shard, length, document_mask=config.document_mask, documents=documents)


def held_out_rows(prefix: str, config: DataConfig) -> tuple[Shard, BlendedShards]:
    """Open one shard by itself, for evaluation.

    Args:
        prefix: path prefix of the shard.
        config: data configuration of the run, which decides how the shard is cut into rows.

    Returns:
        The shard and its rows.
    """
    shard = Shard(prefix)
    return shard, _blended([shard], [1.0], replace(config, split=(), validation=prefix), part=1)


def open_held_out(fingerprint: str, data: str, config: DataConfig) -> tuple[Shard, BlendedShards]:
    """Open the shard at `data` and check that the model's tokenizer made it.

    Args:
        fingerprint: fingerprint of the model's tokenizer.
        data: prefix or URL of the shard.
        config: data configuration, which decides how the shard is cut into rows.

    Returns:
        The shard and its rows.

    Raises:
        InputError: the shard is unreadable or was made by another tokenizer.
    """
    shard, shards = held_out_rows(data, config)
    if shard.manifest.tokenizer_fingerprint != fingerprint:
        raise InputError(f"data: {data} was made by another tokenizer than the model's data")
    return shard, shards
