"""Samplers of masked families that also mask sampled tokens again: ReMDM and Psi-samplers.

In a step from alpha_t to alpha_s a sampled token is masked again with probability sigma, and a mask is
replaced by a draw with probability (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t), so that the share of
masks stays that of the noise schedule (ReMDM, arXiv:2503.00307). A Psi-sampler (arXiv:2602.21185) is the
case sigma = (1 - kappa) (1 - alpha_s).
Shape legend: B sequences, L tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dlm.sampling.categorical import Sharpening, draw, logit_chunks
from megatron_dlm.sampling.eos import finish_ended
from megatron_dlm.sampling.family_sampler import OnStep
from megatron_dlm.sampling.guidance import Head
from megatron_dlm.sampling.kv_reader import Reader
from megatron_dlm.sampling.noise import SampleNoise
from megatron_dlm.sampling.settings import SamplingConfig


@dataclass(frozen=True)
class RemaskingStep:
    """One step."""

    alpha_t: float
    """Share of clean tokens at its start."""
    alpha_s: float
    """Share of clean tokens at its end."""
    sigma: float
    """Probability that a sampled token is masked again."""

    @property
    def unmasks(self) -> float:
        """Probability that a mask is replaced by a draw."""
        return (self.alpha_s - (1 - self.sigma) * self.alpha_t) / (1 - self.alpha_t)


def remasking_steps(alphas: Sequence[float], config: SamplingConfig) -> list[RemaskingStep]:
    """The steps of a sampler.

    Args:
        alphas: alpha at the edges of the steps.
        config: resolved settings of psi or remasking.

    Returns:
        A step between each two edges.
    """
    steps, strength = [], config.remasking_strength or 0.0
    for alpha_t, alpha_s in itertools.pairwise(alphas):
        largest = 1.0 if alpha_t <= 1 - alpha_s else (1 - alpha_s) / alpha_t
        if config.sampler == "psi":
            sigma = (1 - (config.kappa or 0.0)) * (1 - alpha_s)
        elif config.remasking == "cap" or (config.remasking == "loop" and alpha_t == alpha_s):
            sigma = min(strength, largest)
        elif config.remasking == "loop":
            sigma = 0.0
        elif config.remasking in ("rescale", "confidence"):
            sigma = strength * largest
        else:
            raise ValueError(f"remasking: {config.remasking!r} has no rule")
        steps.append(RemaskingStep(alpha_t, alpha_s, sigma))
    return steps


def loop_alphas(times: Sequence[float], loop: tuple[float, float, float]) -> list[float]:
    """Alpha with a plateau: linear in time before and behind it.

    Args:
        times: decreasing from 1 to 0.
        loop: time at which the plateau begins, time at which it ends, and its alpha.

    Returns:
        Alpha at each time, from 0 to 1.
    """
    begins, ends, alpha = loop
    return [
        float(alpha)
        if ends <= t <= begins
        else alpha * (1 - t) / (1 - begins)
        if t > begins
        else 1 - (1 - alpha) * t / ends
        for t in times
    ]


class Remasking:
    """Samples one batch with steps that unmask and mask again."""

    def __init__(
        self,
        head: Head,
        vocab_size: int,
        mask_token_id: int,
        reader: Reader,
        sharpen: Sharpening,
        noise: SampleNoise,
        on_step: OnStep | None,
    ) -> None:
        """Prepare.

        Args:
            head: turns the reader's hidden states into logits.
            vocab_size: number of ids that the head has logits for.
            mask_token_id: id of the mask token.
            reader: runs the network on the tokens to unmask.
            sharpen: temperature and nucleus (top-p).
            noise: source of all random draws.
            on_step: callback after each step; None: no callback.
        """
        self._head = head
        self._vocab_size = vocab_size
        self._mask_token_id = mask_token_id
        self._reader = reader
        self._sharpen = sharpen
        self._noise = noise
        self._on_step = on_step

    def run(
        self,
        ids_BL: Tensor,
        given_BL: Tensor,
        steps: Sequence[RemaskingStep],
        *,
        by_confidence: bool,
        greedy_tail: bool,
        eos_token_id: int | None,
    ) -> None:
        """Sample the tokens that are not given.

        Args:
            ids_BL: int64 [B, L], the mask token where not given; filled in place.
            given_BL: bool [B, L], True where a token is given and kept.
            steps: the steps; the last one ends at alpha 1.
            by_confidence: share sigma out over the sampled tokens, by softmax of minus the probability that
                each had when it was drawn; masks are then unmasked as without remasking.
            greedy_tail: take the most likely ids in the last step instead of drawing.
            eos_token_id: id of <eos>, which ends a text; None: texts do not end early.
        """
        probability_BL = torch.zeros(ids_BL.shape, dtype=torch.float64, device=ids_BL.device)
        for number, step in enumerate(steps):
            choice_BL = self._noise.uniform("choice", number)
            masked_BL = ids_BL == self._mask_token_id
            sampled_BL = ~masked_BL & ~given_BL
            sigma_BL = torch.full_like(probability_BL, step.sigma)
            unmasks = step.unmasks
            if by_confidence:
                weights_BL = torch.where(sampled_BL, (-probability_BL).exp(), 0.0)
                sigma_BL *= weights_BL / weights_BL.sum(1, keepdim=True).clamp_min(1e-300)
                unmasks = RemaskingStep(step.alpha_t, step.alpha_s, 0.0).unmasks
            again_BL = sampled_BL & (choice_BL < sigma_BL)
            wanted_BL = masked_BL & ((choice_BL < unmasks) | (step is steps[-1]))
            if wanted_BL.any():
                self._draw(ids_BL, probability_BL, wanted_BL, number, greedy_tail and step is steps[-1])
            ids_BL.masked_fill_(again_BL, self._mask_token_id)
            # Before the last step an <eos> may still be masked again.
            if eos_token_id is not None and step is steps[-1]:
                finish_ended(ids_BL, torch.ones_like(given_BL), given_BL, eos_token_id)
            if self._on_step is not None:
                self._on_step(number, ids_BL)

    def _draw(
        self, ids_BL: Tensor, probability_BL: Tensor, wanted_BL: Tensor, number: int, greedy: bool
    ) -> None:
        uniform_BL = self._noise.uniform("token", number)
        hidden_RD, rows_R, positions_R = self._reader(ids_BL, wanted_BL, number)
        for part, logits in logit_chunks(self._head, hidden_RD, self._vocab_size):
            where = rows_R[part], positions_R[part]
            drawn = logits.argmax(-1) if greedy else draw(self._sharpen(logits), uniform_BL[where])
            ids_BL[where] = drawn
            # Of the plain distribution: a sharpened one may be equally sure of everything.
            probability_BL[where] = logits.double().softmax(-1).gather(1, drawn[:, None])[:, 0]
