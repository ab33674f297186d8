"""What samplers ask of a network.

Shape legend: B sequences, L tokens, N tokens fed at a time, R rows that reach the head, D hidden size, V ids.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Cache(Protocol):
    """Keys and values of the tokens a causal network has read; the network's own affair otherwise."""

    def hidden(
        self, ids_BN: Tensor, positions_BN: Tensor, valid_BN: Tensor, kept_BN: Tensor, rows_BN: Tensor
    ) -> Tensor:
        """Read tokens behind those in the cache, each looking back only.

        Args:
            ids_BN: int64 [B, N].
            positions_BN: int64 [B, N], places in the text.
            valid_BN: bool [B, N]; what is not valid is padding that no token looks at.
            kept_BN: bool [B, N], valid ones that later calls look at, ahead of all others of their sequence.
            rows_BN: bool [B, N], where hidden states are wanted.

        Returns:
            [R, D] in row-major order.
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
            rows_BL: bool [B, L], where hidden states are wanted.
            sigma_B: float32 [B] noise level -ln(alpha), for networks that are told it.
            visible_LL: bool [L, L], True where a row may look at a column; the family's own where absent.

        Returns:
            [R, D] in row-major order.
        """

    def head(self, hidden_RD: Tensor) -> Tensor:
        """[R, V] logits, at least float32; -inf where an id is never predicted."""

    def start_cache(self, batch_size: int) -> Cache:
        """An empty cache, for networks that only look back."""
