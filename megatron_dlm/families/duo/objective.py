"""Duo: uniform-state diffusion (arXiv:2506.10892) with the exact NELBO, as in arXiv:2602.15014."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from megatron_dlm.diffusion.context import CorruptionContext
from megatron_dlm.diffusion.corruptions import coins, noised_tokens, replace_uniformly
from megatron_dlm.diffusion.noise_schedules import alpha_and_slope
from megatron_dlm.diffusion.targets import weighted_targets
from megatron_dlm.diffusion.time_sampling import stratified_times
from megatron_dlm.diffusion.uniform_divergence import uniform_divergence, uniform_divergence_and_dlogits
from megatron_dlm.diffusion.uniform_states import UniformStates
from megatron_dlm.families.base import Objective
from megatron_dlm.families.diffusion_family import BidirectionalConfig, clean_tokens
from megatron_dlm.families.duo.curriculum import CurriculumConfig, GaussianCurriculum
from megatron_dlm.interfaces import (
    InputError,
    ModelInputs,
    RowTargets,
    Targets,
    TokenBatch,
    TokenMixture,
    Vocabulary,
)
from megatron_dlm.platform.vocab_parallel import VocabShard


@dataclass(frozen=True, kw_only=True)
class DuoConfig(BidirectionalConfig):
    """Uniform-state diffusion (Duo, arXiv:2506.10892)."""

    name: ClassVar[str] = "duo"
    can_change: ClassVar[tuple[str, ...]] = (
        *BidirectionalConfig.can_change,
        "curriculum.temperature",
        "curriculum.gamma_min",
        "curriculum.gamma_max",
    )

    time_conditioning: bool = True
    """Condition the network on the noise level. Must stay on: a token does not show whether it is noise."""
    mask_in_noise: bool = True
    """Let uniform noise draw the mask token like any other id, as the paper's code does; the network never
    predicts it."""
    curriculum: CurriculumConfig = CurriculumConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        for text in self.schedules:
            name, *points = text.split() or [""]
            last = points[-1] if points else ""
            if name.startswith("curriculum.") and last.isdigit() and int(last) > self.curriculum.steps:
                raise InputError(
                    f"objective.schedules: {text!r} changes behind curriculum.steps {self.curriculum.steps}, "
                    "where there are no soft tokens"
                )
        if not self.time_conditioning:
            raise InputError("objective.time_conditioning: False; Duo needs the noise level")

    def prior_nats(self, vocabulary: Vocabulary) -> float:
        """KL divergence, in nats per token, of a token's distribution at t = 1 from the uniform prior."""
        states, alpha = self.states(vocabulary).count, self.alpha(1.0)
        others = 1.0 - alpha
        same = states * alpha + others
        return same / states * math.log(same) + (states - 1) / states * (
            others * math.log(others) if others else 0.0
        )

    def states(self, vocabulary: Vocabulary) -> UniformStates:
        """The token ids that uniform noise draws from."""
        return UniformStates(vocabulary.size, vocabulary.mask_token_id, mask_in_noise=self.mask_in_noise)

    def build(self, vocabulary: Vocabulary) -> Objective:
        """The family over `vocabulary`."""
        return Duo(self, vocabulary)


class Duo(Objective):
    """Every position may be noise, so every position carries a loss."""

    def __init__(self, config: DuoConfig, vocabulary: Vocabulary) -> None:
        self._config = config
        self._states = config.states(vocabulary)
        self._curriculum = GaussianCurriculum(config.curriculum, self._states.count)

    def corrupt(self, batch: TokenBatch, context: CorruptionContext) -> tuple[ModelInputs, Targets]:
        """Replace each token by a uniform draw with probability 1 - alpha_t, or blend embeddings."""
        config = self._config
        clean_BL = clean_tokens(batch, context, config)
        t_B1 = stratified_times(
            batch.sample_indices, context, time_epsilon=config.time_epsilon, order=config.time_order
        )
        mixture = None
        if context.training and context.step < config.curriculum.steps:
            alpha_B1, dalpha_B1 = self._curriculum.alpha_and_slope(t_B1)
            ids_BLk, weights_BLk = self._curriculum.mix(
                self._states.ordinal(clean_BL), t_B1, batch.sample_indices, context.noise
            )
            ids_BLk = self._states.token(ids_BLk)
            never_BL = ~noised_tokens(batch, clean_BL.shape[1])
            ids_BLk[never_BL, 0], weights_BLk[never_BL] = clean_BL[never_BL], 0.0
            weights_BLk[never_BL, 0] = 1.0
            noisy_BL = ids_BLk[..., 0].copy()
            mixture = TokenMixture(
                token_ids_BLk=torch.from_numpy(ids_BLk), weights_BLk=torch.from_numpy(weights_BLk)
            )
        else:
            alpha_B1, dalpha_B1 = alpha_and_slope(config.noise_schedule, t_B1)
            length = clean_BL.shape[1]
            uniform_BL = coins(batch, context, "duo/replace", length)
            drawn_BL = context.noise.integers("duo/token", batch.sample_indices, length, self._states.count)
            noisy_BL = replace_uniformly(clean_BL, alpha_B1, uniform_BL, self._states.token(drawn_BL))
        inputs = ModelInputs(
            token_ids_BL=torch.from_numpy(noisy_BL),
            position_ids_BL=torch.arange(clean_BL.shape[1])[None],
            sigma_B=torch.from_numpy(-np.log(alpha_B1[:, 0])).float(),
            mixture=mixture,
        )
        weight_B1 = -dalpha_B1 / (self._states.count * alpha_B1)
        noised_BL = noised_tokens(batch, clean_BL.shape[1])
        weight_BL = np.where(noised_BL, weight_B1, 0.0)
        targets = weighted_targets(clean_BL, noisy_BL, alpha_B1, weight_BL, token_count=int(noised_BL.sum()))
        return inputs, targets

    def token_losses(self, logits_RVp: Tensor, targets: RowTargets, vocab: VocabShard) -> Tensor:
        """Divergence of the predicted from the true reverse rates."""
        return uniform_divergence(logits_RVp, targets, vocab, self._states.count)

    def loss_and_dlogits(
        self, logits_RVp: Tensor, targets: RowTargets, vocab: VocabShard
    ) -> tuple[Tensor, Tensor]:
        """Divergence with its closed-form gradient."""
        return uniform_divergence_and_dlogits(logits_RVp, targets, vocab, self._states.count)
