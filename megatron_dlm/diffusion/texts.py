"""Sequences that an exported model scores, checked, with their padding at the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Texts:
    """Clean sequences to score, padding moved to their ends."""

    ids_BL: Tensor
    """int64 [B, L]."""
    scored_BL: Tensor
    """bool [B, L], True at tokens that are noised and scored; other tokens are given."""
    real_BL: Tensor | None
    """bool [B, L], False at padding; None: there is none. An `attention_mask` for the model."""

    @classmethod
    def of(
        cls, ids_BL: Tensor, config: Any, attention_mask: Tensor | None, scored_BL: Tensor | None = None
    ) -> Texts:
        """Check sequences and move their padding to the end.

        Args:
            ids_BL: int64 [B, L] clean tokens.
            config: configuration of the exported model.
            attention_mask: [B, L], 0 at padding; None: no padding.
            scored_BL: bool [B, L]; None: all tokens are scored.

        Returns:
            The texts.

        Raises:
            ValueError: another shape or dtype, ids outside the vocabulary, the mask token,
                a text of padding alone, or padding inside a text.
        """
        if ids_BL.dim() != 2 or ids_BL.dtype not in (torch.int64, torch.int32) or not ids_BL.numel():
            raise ValueError(f"input_ids: {ids_BL.dtype} {tuple(ids_BL.shape)} instead of int64 [B, L]")
        scored_BL = torch.ones_like(ids_BL, dtype=torch.bool) if scored_BL is None else scored_BL
        real_BL = None
        if attention_mask is not None:
            if attention_mask.shape != ids_BL.shape:
                raise ValueError(
                    f"attention_mask: {tuple(attention_mask.shape)} instead of {tuple(ids_BL.shape)}"
                )
            real_BL = attention_mask.bool()
            first_B1 = real_BL.int().argmax(1, keepdim=True)
            length_B1 = real_BL.sum(1, keepdim=True)
            places = torch.arange(ids_BL.shape[1], device=ids_BL.device)
            is_one_piece = real_BL == ((places >= first_B1) & (places < first_B1 + length_B1))
            for row in (~(is_one_piece.all(1) & (length_B1[:, 0] > 0))).nonzero()[:, 0].tolist():
                raise ValueError(f"attention_mask: row {row} is all padding, or has padding inside its text")
            order_BL = (places + first_B1) % ids_BL.shape[1]
            longest = int(length_B1.max())
            ids_BL, scored_BL, real_BL = (
                x.gather(1, order_BL)[:, :longest] for x in (ids_BL, scored_BL, real_BL)
            )
            scored_BL = scored_BL & real_BL
            ids_BL = torch.where(real_BL, ids_BL, config.eos_token_id)
            real_BL = None if bool(real_BL.all()) else real_BL
        if bool(((ids_BL < 0) | (ids_BL >= config.vocab_size)).any()):
            raise ValueError(f"input_ids: a token is outside [0, {config.vocab_size})")
        if bool((scored_BL & (ids_BL == config.mask_token_id)).any()):
            raise ValueError(f"input_ids: contains the mask token {config.mask_token_id}")
        return cls(ids_BL.long(), scored_BL, real_BL)

    def without_first(self) -> Texts:
        """The texts with their first tokens given."""
        scored_BL = self.scored_BL.clone()
        scored_BL[:, 0] = False
        return Texts(self.ids_BL, scored_BL, self.real_BL)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text."""
        if self.real_BL is None:
            return [self.ids_BL.shape[1]] * len(self.ids_BL)
        lengths: list[int] = self.real_BL.sum(1).tolist()
        return lengths
