"""Batches of tokens, contexts and vocabularies for objectives."""

import numpy as np
import torch

from megatron_dlm.diffusion.context import CorruptionContext
from megatron_dlm.interfaces import TokenBatch, Vocabulary
from megatron_dlm.platform.rng import NoiseSource


def vocabulary(size, mask):
    return Vocabulary(size=size, mask_token_id=mask, eos_token_id=0, bos_token_id=1)


def context(batch_start=0, size=8, training=True, seed=1):
    return CorruptionContext(
        noise=NoiseSource(seed),
        step=batch_start // size,
        batch_start=batch_start,
        global_batch_size=size,
        training=training,
    )


def batch_of(tokens, positions):
    return TokenBatch(token_ids=torch.as_tensor(tokens), sample_indices=np.asarray(positions))
