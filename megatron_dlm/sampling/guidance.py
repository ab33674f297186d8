"""Classifier-free guidance by the prompt: predictions with it are pushed away from those without it.

Without its prompt the network reads the mask token in its place (arXiv:2410.18514); no training is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Head = Callable[[Tensor], Tensor]
"""Function from [R, D] hidden states to [R, V] logits."""


@dataclass(frozen=True)
class Guidance:
    """Guidance of one batch."""

    scale: float
    """Factor of the difference that the prompt makes to the logits; 1 is no guidance."""
    given_BL: Tensor
    """bool [B, L], True at the prompt."""
    mask_token_id: int

    def without_prompt(self, ids_BL: Tensor, rows: Tensor) -> Tensor:
        """Texts without their prompts.

        Args:
            ids_BL: int64 [b, l], the texts of some sequences, up to a length.
            rows: int64 [b], which of the batch they are.

        Returns:
            int64 [b, l].
        """
        return ids_BL.masked_fill(self.given_BL[rows, : ids_BL.shape[1]], self.mask_token_id)

    def head(self, head: Head) -> Head:
        """Head of two hidden states side by side, with the prompt and without it.

        Args:
            head: head of one hidden state.

        Returns:
            Function from [R, 2 D] hidden states to [R, V] logits.
        """

        def guided(hidden_RE: Tensor) -> Tensor:
            with_prompt, without = (head(half).log_softmax(-1) for half in hidden_RE.chunk(2, dim=-1))
            # An id that is never predicted has no difference.
            difference = torch.where(with_prompt.isneginf(), 0.0, with_prompt - without)
            return with_prompt + (self.scale - 1) * difference

        return guided
