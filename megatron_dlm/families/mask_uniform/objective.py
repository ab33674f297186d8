"""Masked and uniform-state diffusion in one, by the share of uniform noise: 0 is MDLM, 1 is Duo.

Noise that both masks and replaces lets a model correct tokens that it has filled in, which masks alone do not
(mixtures of this kind: arXiv:2503.04482). The bound is exact; `rows.py` derives it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from megatron_dlm.diffusion.context import CorruptionContext
from megatron_dlm.diffusion.corruptions import coins, noised_tokens, replace_uniformly
from megatron_dlm.diffusion.cross_entropy import cross_entropy, cross_entropy_and_dlogits
from megatron_dlm.diffusion.divergence import divergence, divergence_and_dlogits
from megatron_dlm.diffusion.noise_schedules import alpha_and_slope
from megatron_dlm.diffusion.targets import weighted_targets
from megatron_dlm.diffusion.time_sampling import stratified_times
from megatron_dlm.families.base import Objective
from megatron_dlm.families.diffusion_family import BidirectionalConfig, clean_tokens
from megatron_dlm.families.mask_uniform.noise import MaskUniformNoise
from megatron_dlm.families.mask_uniform.rows import MixtureRows
from megatron_dlm.interfaces import (
    InputError,
    ModelInputs,
    RowTargets,
    Targets,
    TokenBatch,
    Vocabulary,
)
from megatron_dlm.platform.vocab_parallel import VocabShard


@dataclass(frozen=True, kw_only=True)
class MaskUniformConfig(BidirectionalConfig):
    """Diffusion with mask and uniform noise."""

    name: ClassVar[str] = "mask-uniform"

    uniform_share: float = 0.1
    """Probability that noise is a uniform draw over all ids instead of the mask: 0 is masked diffusion, 1
    uniform-state diffusion."""
    time_conditioning: bool = True
    """Condition the network on the noise level; required unless uniform_share is 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.uniform_share <= 1:
            raise InputError(f"objective.uniform_share: {self.uniform_share} is outside [0, 1]")
        if self.uniform_share and not self.time_conditioning:
            raise InputError(
                f"objective.time_conditioning: False; with uniform_share {self.uniform_share} the network "
                "needs the noise level"
            )

    def prior_nats(self, vocabulary: Vocabulary) -> float:
        """KL divergence, nats per token, of a token at t = 1 from the noise; at share 0 as for MDLM."""
        if not self.uniform_share:
            return super().prior_nats(vocabulary)
        alpha, probability = self.alpha(1.0), self.uniform_share / vocabulary.size
        q = 1.0 - alpha
        same = alpha + q * probability
        return same * math.log(same / probability) + (q * (1.0 - probability) * math.log(q) if q else 0.0)

    def noise(self, vocabulary: Vocabulary) -> MaskUniformNoise:
        """The noise distribution that replaces tokens."""
        return MaskUniformNoise(vocabulary.size, vocabulary.mask_token_id, self.uniform_share)

    def build(self, vocabulary: Vocabulary) -> Objective:
        """The family over `vocabulary`."""
        return MaskUniform(self, self.noise(vocabulary))


class MaskUniform(Objective):
    """Every position may be noise, so with uniform noise every position carries a loss."""

    def __init__(self, config: MaskUniformConfig, noise: MaskUniformNoise) -> None:
        self._config = config
        self._noise = noise

    def corrupt(self, batch: TokenBatch, context: CorruptionContext) -> tuple[ModelInputs, Targets]:
        """Replace each token by a draw of the noise with probability 1 - alpha_t."""
        config, noise = self._config, self._noise
        clean_BL = clean_tokens(batch, context, config)
        length = clean_BL.shape[1]
        t_B1 = stratified_times(
            batch.sample_indices, context, time_epsilon=config.time_epsilon, order=config.time_order
        )
        alpha_B1, dalpha_B1 = alpha_and_slope(config.noise_schedule, t_B1)
        uniform_BL = coins(batch, context, "mask-uniform/replace", length)
        drawn = context.noise.uniform("mask-uniform/token", batch.sample_indices, length)
        drawn_BL = noise.draw(torch.from_numpy(drawn)).numpy()
        noisy_BL = replace_uniformly(clean_BL, alpha_B1, uniform_BL, drawn_BL)
        noised_BL = noised_tokens(batch, length)
        rate_B1 = -dalpha_B1 / alpha_B1
        weight_BL = np.where(
            noisy_BL == noise.mask_token_id, -dalpha_B1 / (1.0 - alpha_B1), rate_B1 * noise.probability
        )
        weight_BL = np.where(noised_BL, weight_BL, 0.0)
        sigma_B = -np.log(alpha_B1[:, 0]) if config.time_conditioning else np.zeros(len(clean_BL))
        inputs = ModelInputs(
            token_ids_BL=torch.from_numpy(noisy_BL),
            position_ids_BL=torch.arange(length)[None],
            sigma_B=torch.from_numpy(sigma_B).float(),
        )
        targets = weighted_targets(clean_BL, noisy_BL, alpha_B1, weight_BL, token_count=int(noised_BL.sum()))
        return inputs, targets

    def token_losses(self, logits_RVp: Tensor, targets: RowTargets, vocab: VocabShard) -> Tensor:
        """Divergence of the predicted from the true reverse rates."""
        if not self._noise.uniform_share:
            return cross_entropy(logits_RVp, targets.clean_R, vocab)
        return divergence(logits_RVp, targets, vocab, self._rows(targets))

    def loss_and_dlogits(
        self, logits_RVp: Tensor, targets: RowTargets, vocab: VocabShard
    ) -> tuple[Tensor, Tensor]:
        """Divergence with its closed-form gradient."""
        if self._noise.uniform_share:
            return divergence_and_dlogits(logits_RVp, targets, vocab, self._rows(targets))
        return cross_entropy_and_dlogits(logits_RVp, targets.clean_R, vocab)

    def _rows(self, targets: RowTargets) -> MixtureRows:
        # A row that only pads a chunk has alpha 0.
        alpha_R = targets.alpha_R.double()
        same_R, masked_R = (targets.noisy_R == ids for ids in (targets.clean_R, self._noise.mask_token_id))
        return MixtureRows.of(alpha_R, 1.0 - alpha_R, self._noise.probability, same_R, masked_R)
