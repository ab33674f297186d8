"""The trainer's model as a network for the samplers; it re-reads the whole text instead of using a cache.

Reference for verifying exports: on one process, an export must sample the same tokens as this network.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_dlm.attention_mask import AttentionMask
from megatron_dlm.interfaces import ModelInputs
from megatron_dlm.models.denoiser import Denoiser


class MegatronNetwork:
    """A whole denoiser on this process."""

    def __init__(self, denoiser: Denoiser) -> None:
        self._denoiser = denoiser
        self.device = next(denoiser.parameters()).device

    def hidden(
        self, ids_BL: Tensor, rows_BL: Tensor, sigma_B: Tensor | None = None, visible_LL: Tensor | None = None
    ) -> Tensor:
        """[R, D] in row-major order."""
        positions = torch.arange(ids_BL.shape[1], device=ids_BL.device)[None]
        return self.read(ids_BL, positions, sigma_B, visible_LL)[rows_BL]

    def read(
        self,
        ids_BL: Tensor,
        positions_BL: Tensor,
        sigma_B: Tensor | None = None,
        visible_LL: Tensor | None = None,
    ) -> Tensor:
        """Hidden states in front of the head, [B, L, D]; rows of `visible_LL` see beginnings of the text."""
        inputs = ModelInputs(
            token_ids_BL=ids_BL,
            position_ids_BL=positions_BL,
            sigma_B=torch.zeros(len(ids_BL), device=ids_BL.device) if sigma_B is None else sigma_B,
            attention_mask=None if visible_LL is None else _beginnings(visible_LL),
        )
        hidden_LBD: Tensor = self._denoiser(inputs)
        return hidden_LBD.transpose(0, 1)

    def head(self, hidden_RD: Tensor) -> Tensor:
        """[R, V] logits."""
        head = self._denoiser.head
        return head.vocab.exclude_(head.logits(hidden_RD))[:, : head.vocab.vocabulary.size]

    def start_cache(self, batch_size: int) -> RereadingCache:
        """A cache that keeps tokens instead of keys and values."""
        return RereadingCache(self, batch_size)


def _beginnings(visible_LL: Tensor) -> AttentionMask:
    """Attention mask from a dense mask in which each row attends to a prefix of the columns."""
    columns = torch.arange(len(visible_LL), dtype=torch.int32, device=visible_LL.device)
    return AttentionMask.of(reach=visible_LL.sum(1, dtype=torch.int32) - 1, order=columns)


class RereadingCache:
    """Stands in for a key-value cache: stores the tokens and re-reads all of them in every call."""

    def __init__(self, network: MegatronNetwork, batch_size: int) -> None:
        self._network = network
        empty = torch.empty(0, dtype=torch.int64, device=network.device)
        self._seen = [(empty, empty)] * batch_size

    def hidden(
        self, ids_BN: Tensor, positions_BN: Tensor, valid_BN: Tensor, kept_BN: Tensor, rows_BN: Tensor
    ) -> Tensor:
        """[R, D] in row-major order."""
        found, seen = [], []
        for (ids, positions), *fed in zip(
            self._seen, ids_BN, positions_BN, valid_BN, kept_BN, rows_BN, strict=True
        ):
            new_ids, new_positions, valid, kept, rows = fed
            if valid.any():
                text = torch.cat([ids, new_ids[valid]])[None]
                places = torch.cat([positions, new_positions[valid]])[None]
                found.append(self._network.read(text, places)[0, len(ids) :][rows[valid]])
            seen.append((torch.cat([ids, new_ids[kept]]), torch.cat([positions, new_positions[kept]])))
        self._seen = seen
        return torch.cat(found)

    def select(self, rows: Tensor) -> None:
        """Keep some of the sequences."""
        self._seen = [self._seen[row] for row in rows.tolist()]
