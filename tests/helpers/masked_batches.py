"""Corrupted batches of every family whose attention has a mask."""

import numpy as np
import torch

from megatron_dlm.families.ar.objective import ARConfig
from megatron_dlm.families.block_diffusion.objective import BlockDiffusionConfig
from megatron_dlm.families.documents import corrupt
from megatron_dlm.families.esolm.objective import EsoLMConfig
from megatron_dlm.families.mdlm.objective import MDLMConfig
from megatron_dlm.interfaces import TokenBatch, Vocabulary
from tests.helpers.batches import context

VOCABULARY = Vocabulary(size=40, mask_token_id=7, eos_token_id=0, bos_token_id=1)


SEQUENTIAL = EsoLMConfig(alpha_0=0.3, batch_split=0.0)


# family, length, mean length of a document or 0
MASKS = {
    "block diffusion": (BlockDiffusionConfig(block_size=16), 512, 0),
    "block diffusion, blocks beyond a table's": (BlockDiffusionConfig(block_size=256), 512, 0),
    "block diffusion, odd": (BlockDiffusionConfig(block_size=10), 330, 0),
    "sequential": (SEQUENTIAL, 384, 0),
    "sequential, documents": (SEQUENTIAL, 384, 100),
    "causal, documents": (ARConfig(), 700, 150),
    "causal, long documents": (ARConfig(), 1024, 1000),
    "bidirectional, documents": (MDLMConfig(), 700, 150),
    "bidirectional, long documents": (MDLMConfig(), 1024, 1000),
    "causal in random order, documents": (EsoLMConfig(), 512, 200),
}


def batch_of(length, mean, seed=0, size=3):
    generator = np.random.default_rng(seed)
    documents = None
    if mean:
        begins = generator.random((size, length + 1)) < 1 / mean
        # Ids of a shard's last documents, that no 32 bits hold.
        documents = torch.from_numpy(begins.cumsum(axis=1) + 2**40)
    return TokenBatch(
        token_ids=torch.from_numpy(generator.integers(8, 40, (size, length + 1))),
        sample_indices=np.arange(size) + seed * size,
        document_ids=documents,
    )


def inputs_of(name, seed=0):
    config, length, mean = MASKS[name]
    batch = batch_of(length, mean, seed)
    return config, *corrupt(config.build(VOCABULARY), batch, context(seed * 3, 3))
