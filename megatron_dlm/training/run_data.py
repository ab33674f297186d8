"""The shards a run reads, opened and compared; needs neither a process group nor megatron-core."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dlm.data.loader import DataConfig
from megatron_dlm.data.packing import TokenBlocks
from megatron_dlm.data.shard import Shard
from megatron_dlm.interfaces import InputError, Vocabulary


@dataclass(frozen=True)
class RunData:
    """Opened and checked shards."""

    train: TokenBlocks
    validation: TokenBlocks
    vocabulary: Vocabulary
    tokenizer_fingerprint: str
    train_sha256: str
    """Of the training tokens; a run is not continued on others."""
    validation_bytes_per_token: float


def open_data(config: DataConfig) -> RunData:
    """Open both shards.

    Args:
        config: prefixes and sequence length.

    Returns:
        The blocks and what the manifests say.

    Raises:
        InputError: a shard is missing, damaged or too short, or the two were made by different tokenizers.
    """
    train, validation = Shard(config.train), Shard(config.validation)
    if train.manifest.tokenizer_fingerprint != validation.manifest.tokenizer_fingerprint:
        raise InputError(
            f"data.validation: {config.validation} was made by another tokenizer than {config.train}"
        )
    if config.verify_checksums:
        train.verify_checksums()
        validation.verify_checksums()
    return RunData(
        train=TokenBlocks(train, config.seq_length, document_mask=config.document_mask),
        validation=TokenBlocks(validation, config.seq_length, document_mask=config.document_mask),
        vocabulary=train.manifest.vocabulary,
        tokenizer_fingerprint=train.manifest.tokenizer_fingerprint,
        train_sha256=train.manifest.tokens_sha256,
        validation_bytes_per_token=validation.manifest.bytes_per_token,
    )
