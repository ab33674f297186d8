"""Protocols that a network and its key-value cache implement to be sampled from.

Shape legend: B sequences, L tokens, N tokens fed at a time, R rows that reach the head, D hidden size, V ids.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Cache(Protocol):
    """Key-value cache of the tokens a causal network has read; its contents are up to the network."""

    def hidden(
        self, ids_BN: Tensor, positions_BN: Tensor, valid_BN: Tensor, kept_BN: Tensor, rows_BN: Tensor
    ) -> Tensor:
        """Read tokens that follow those in the cache, with causal attention.

        Args:
            ids_BN: int64 [B, N].
            positions_BN: int64 [B, N], places in the text.
            valid_BN: bool [B, N], False at padding, which no token attends to.
            kept_BN: bool [B, N], True at valid tokens to keep in the cache; they precede all other tokens of
                their sequence.
            rows_BN: bool [B, N], True where hidden states are returned.

        Returns:
            [R, D] hidden states in row-major order.
        """

    def select(self, rows: Tensor) -> None:
        """Keep some of the sequences (int64 indices) and forget the others."""


class Network(Protocol):
    """A trained network; `head` turns its hidden states into logits, a few rows at a time."""

    device: torch.device

    def hidden(
        self, ids_BL: Tensor, rows_BL: Tensor, sigma_B: Tensor | None = None, visible_LL: Tensor | None = None
    ) -> Tensor:
        """Read whole sequences.

        Args:
            ids_BL: int64 [B, L].
            rows_BL: bool [B, L], True where hidden states are returned.
            sigma_B: float32 [B] noise level -ln(alpha), for networks conditioned on it.
            visible_LL: bool [L, L], True where a row attends to a column; None: the family's pattern.

        Returns:
            [R, D] hidden states in row-major order.
        """

    def head(self, hidden_RD: Tensor) -> Tensor:
        """[R, V] logits, at least float32; -inf where an id is never predicted."""

    def start_cache(self, batch_size: int) -> Cache:
        """An empty key-value cache, for causal networks."""
