"""Likelihood of sequences under an exported model: the NELBO from noisy copies of the forward process.

A family's `likelihood.py` derives a class `Likelihood` from `FamilyLikelihood` or `DiffusionLikelihood`.
Shape legend: B sequences, L tokens, V ids.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from megatron_dlm.diffusion.draws import Draws, FreeDraws, SeededDraws
from megatron_dlm.diffusion.noise_schedules import alpha_and_slope
from megatron_dlm.diffusion.texts import Texts

IGNORED = -100
"""Label of tokens that are given, as in PyTorch's cross-entropy."""


class FamilyLikelihood(ABC):
    """Scores sequences by a model of one family."""

    unread_tokens: ClassVar[int] = 0
    """Tokens at the end of a text that the network scores without reading them."""

    def __init__(self, config: Any) -> None:
        """Keep the configuration.

        Args:
            config: configuration of the exported model.
        """
        self.config = config

    def token_nats(
        self, logits_BLV: Tensor, noisy_BL: Tensor, clean_BL: Tensor, sigma_B: Tensor | None
    ) -> Tensor:
        """Loss of each position in nats, before its weight in the NELBO.

        Args:
            logits_BLV: float32 [B, L, V].
            noisy_BL: int64 [B, L], noisy tokens that the network has read.
            clean_BL: int64 [B, L], tokens to predict.
            sigma_B: [B] noise levels -ln(alpha), for families whose loss depends on them.

        Returns:
            float64 [B, L]; the cross-entropy, unless a family has another loss.
        """
        return cross_entropy_nats(logits_BLV, clean_BL)

    def nll(
        self,
        model: Any,
        ids_BL: Tensor,
        num_samples: int,
        seed: int,
        t_grid: Sequence[float] | None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Negative log-likelihood of sequences, or for diffusion its upper bound.

        A sequence's value depends on its tokens and the seed, not on its batch.

        Args:
            model: exported model.
            ids_BL: int64 [B, L] clean tokens.
            num_samples: noisy copies of each sequence.
            seed: random seed of the draws.
            t_grid: diffusion times in (0, 1] to use instead of random ones.
            attention_mask: [B, L], 0 at padding; None: no padding.

        Returns:
            float64 [B] nats.

        Raises:
            ValueError: no times, or one outside (0, 1]; tokens or padding that cannot be scored.
        """
        if t_grid is not None:
            num_samples = len(t_grid)
            for t in t_grid:
                if not 0 < t <= 1:
                    raise ValueError(f"t_grid: {t} is outside (0, 1]")
        if num_samples < 1:
            raise ValueError(f"num_samples, t_grid: {num_samples} times; at least one is needed")
        texts = Texts.of(ids_BL, self.config, attention_mask)
        self._check_length(texts, self.config.max_position_embeddings + self.unread_tokens)
        return self.estimate(model, texts, num_samples, seed, t_grid)

    def training_loss(
        self,
        model: Any,
        ids_BL: Tensor | None,
        labels_BL: Tensor,
        attention_mask: Tensor | None,
        num_items: Tensor | int | None,
    ) -> tuple[Tensor, Tensor]:
        """Loss for training: the bound from one draw of time and noise, from torch's random state.

        Args:
            model: exported model.
            ids_BL: int64 [B, L] clean tokens; None is refused.
            labels_BL: int64 [B, L], the tokens again where they are noised and scored, -100 elsewhere.
            attention_mask: [B, L], 0 at padding; None: no padding.
            num_items: divisor of the sum; None: the number of labels.

        Returns:
            Loss in nats per label, and the logits it was computed from, [B, L, V].

        Raises:
            ValueError: no tokens, or labels that are neither the tokens nor -100, or none at all.
        """
        if ids_BL is None:
            raise ValueError("labels: given without input_ids")
        if labels_BL.shape != ids_BL.shape:
            raise ValueError(f"labels: {tuple(labels_BL.shape)} instead of {tuple(ids_BL.shape)}")
        scored_BL = labels_BL != IGNORED
        if bool((scored_BL & (labels_BL != ids_BL)).any()):
            raise ValueError("labels: they are input_ids, clean, or -100; the noise is drawn by the model")
        texts = Texts.of(ids_BL, self.config, attention_mask, scored_BL)
        self._check_length(texts, self.config.max_position_embeddings)
        count = int(texts.scored_BL.sum())
        if not count:
            raise ValueError("labels: all are -100")
        nats_B, logits = self.one_draw(model, texts)
        return nats_B.sum() / (count if num_items is None else num_items), logits

    def _check_length(self, texts: Texts, longest: int) -> None:
        if texts.ids_BL.shape[1] > longest:
            raise ValueError(f"input_ids: {texts.ids_BL.shape[1]} tokens, and the model takes {longest}")

    @abstractmethod
    def estimate(
        self, model: Any, texts: Texts, num_samples: int, seed: int, t_grid: Sequence[float] | None
    ) -> Tensor:
        """Compute `nll` after its arguments have been checked."""

    @abstractmethod
    def one_draw(self, model: Any, texts: Texts) -> tuple[Tensor, Tensor]:
        """Nats of each text from one random draw, [B] with gradients, and the logits behind them."""


class DiffusionLikelihood(FamilyLikelihood):
    """Monte Carlo estimate of the NELBO: the mean over noisy copies, stratified over the diffusion time."""

    def estimate(
        self, model: Any, texts: Texts, num_samples: int, seed: int, t_grid: Sequence[float] | None
    ) -> Tensor:
        """Mean of `copy` over the noisy copies."""
        draws = SeededDraws(texts, seed, num_samples, self.config.time_epsilon, t_grid)
        total_B = torch.zeros(len(texts.ids_BL), dtype=torch.float64, device=texts.ids_BL.device)
        for index in range(num_samples):
            total_B += self.copy(model, texts, draws, index)[0]
        return total_B / num_samples

    def one_draw(self, model: Any, texts: Texts) -> tuple[Tensor, Tensor]:
        """`copy` with noise from torch's random state, times stratified over the batch."""
        return self.copy(model, texts, FreeDraws(texts, self.config.time_epsilon), 0)

    @abstractmethod
    def copy(self, model: Any, texts: Texts, draws: Draws, index: int) -> tuple[Tensor, Tensor]:
        """NELBO estimate from one noisy copy of each sequence.

        Args:
            model: exported model.
            texts: clean tokens.
            draws: random draws of the copies.
            index: index of the copy.

        Returns:
            float64 [B] nats, and the logits [B, L, V] that they come from.
        """

    def alpha_and_slope(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Noise schedule: alpha_t and d alpha / dt at float64 `times`, in their shape and on their device."""
        pair = alpha_and_slope(self.config.noise_schedule, times.cpu().numpy(), alpha_0=self.alpha_0)
        alpha, slope = (torch.from_numpy(values).to(times.device) for values in pair)
        return alpha, slope

    @property
    def alpha_0(self) -> float:
        """Alpha at time 0, the share of tokens generated by diffusion; 1 unless the family is Eso-LM."""
        return 1.0

    def mask(self, texts: Texts, draws: Draws, times: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Apply the masked (absorbing-state) forward process to the scored tokens.

        Args:
            texts: clean tokens.
            draws: random draws of the copies.
            times: float64 [B, 1] or [B, L] diffusion times.

        Returns:
            Noisy ids, bool mask of the masked tokens, weights in the NELBO, and alpha in the times' shape.
        """
        alpha, slope = self.alpha_and_slope(times)
        masked_BL = (draws.uniform() < 1 - alpha) & texts.scored_BL
        noisy_BL = torch.where(masked_BL, self.config.mask_token_id, texts.ids_BL)
        return noisy_BL, masked_BL, masked_BL * -slope / (1 - alpha), alpha


def cross_entropy_nats(logits_BLV: Tensor, clean_BL: Tensor) -> Tensor:
    """Cross-entropy of each position, float64 [B, L]."""
    return functional.cross_entropy(logits_BLV.transpose(1, 2), clean_BL, reduction="none").double()
