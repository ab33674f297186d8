"""Ancestral sampling where noise replaces tokens by draws (arXiv:2506.10892): each may change in each step.

Psi-samplers (arXiv:2602.21185) are a mixture of it and of fresh noise on a predicted clean text. The exact
posterior is a mixture of three: the token stays, is drawn from the prediction, or from the noise. Whether it
stays is decided by one number, and below a bound that needs no prediction, so in a step of many the head runs
on the few positions that may change; the law is that of drawing from the whole posterior.
Shape legend: B sequences, L tokens, R positions that may change, V ids.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_dlm.sampling.categorical import Sharpening, draw, logit_chunks
from megatron_dlm.sampling.eos import finish_ended
from megatron_dlm.sampling.family_sampler import FamilySampler, OnStep
from megatron_dlm.sampling.network import Network
from megatron_dlm.sampling.noise import SampleNoise
from megatron_dlm.sampling.settings import SamplingConfig
from megatron_dlm.sampling.step_grid import blocks_of, noise_level, times


class Shares(NamedTuple):
    """Mixture weights of the posterior, adding up to 1."""

    stays: Tensor
    """The token stays as it is."""
    predicted: Tensor
    """The token is drawn anew from the network's prediction."""
    noise: Tensor
    """The token is drawn anew from the noise."""


def posterior_shares(
    p_noisy: Tensor, alpha_t: Tensor, alpha_s: Tensor, inverse_probability: Tensor | int
) -> Shares:
    """Posterior q(z_s | z_t, prediction) as a mixture of staying, prediction and noise.

    Args:
        p_noisy: float64 [...], predicted probability of the token z_t.
        alpha_t: alpha at time t, broadcasts to p_noisy.
        alpha_s: alpha at time s, at least alpha_t; 1 in the last step.
        inverse_probability: 1 over the probability that the noise draws z_t; K if the noise is uniform over K
            ids.

    Returns:
        Three weights in the shape of p_noisy.
    """
    ratio = alpha_t / alpha_s
    total = inverse_probability * alpha_t * p_noisy + 1.0 - alpha_t
    return Shares(
        stays=(inverse_probability * alpha_t * p_noisy + ratio - alpha_t) / total,
        predicted=(alpha_s - alpha_t) / total,
        noise=(1.0 - ratio) * (1.0 - alpha_s) / total,
    )


def psi_shares(
    p_noisy: Tensor,
    alpha_t: Tensor,
    alpha_s: Tensor,
    inverse_probability: Tensor | int,
    kappa: float,
) -> Shares:
    """A step of a Psi-sampler (arXiv:2602.21185): the posterior, or noise of time s on a clean text.

    The clean text is drawn from q(z_0 | z_t, prediction), the posterior of a step to the data.

    Args:
        p_noisy: float64 [...], predicted probability of the token z_t.
        alpha_t: alpha at time t, broadcasts to p_noisy.
        alpha_s: alpha at time s, at least alpha_t; 1 in the last step.
        inverse_probability: 1 over the probability that the noise draws z_t.
        kappa: probability of the posterior; 1 is ancestral sampling.

    Returns:
        Three weights in the shape of p_noisy.
    """
    shares = posterior_shares(p_noisy, alpha_t, alpha_s, inverse_probability)
    if kappa == 1:
        return shares
    clean = posterior_shares(p_noisy, alpha_t, torch.ones_like(alpha_s), inverse_probability)
    return Shares(
        stays=kappa * shares.stays + (1 - kappa) * alpha_s * clean.stays,
        predicted=kappa * shares.predicted + (1 - kappa) * alpha_s * clean.predicted,
        noise=kappa * shares.noise + (1 - kappa) * (1 - alpha_s),
    )


class NoiseDraws(Protocol):
    """The noise that replaces tokens."""

    def draw(self, uniform: Tensor) -> Tensor:
        """Ids from draws in [0, 1), of any shape."""

    def inverse_probability(self, ids: Tensor) -> Tensor | int:
        """1 over the noise's probability of each id; infinite for ids that the noise never draws."""


class ReplacingSampler:
    """Ancestral sampling of one batch, for noise that replaces tokens."""

    def __init__(
        self,
        network: Network,
        alpha: Callable[[float], float],
        draws: NoiseDraws,
        vocab_size: int,
        sharpen: Sharpening,
        noise: SampleNoise,
        on_step: OnStep | None,
        kappa: float = 1.0,
    ) -> None:
        """Prepare.

        Args:
            network: trained network, conditioned on the noise level.
            alpha: noise schedule, the probability that a token is still clean at time t.
            draws: noise distribution that replaces tokens.
            vocab_size: number of ids that the head has logits for.
            sharpen: temperature and nucleus (top-p) of the prediction.
            noise: source of all random draws.
            on_step: callback after each step; None: no callback.
            kappa: share of the posterior in a step; the rest is fresh noise on a predicted clean text.
        """
        self._network = network
        self._kappa = kappa
        self._alpha = alpha
        self._draws = draws
        self._vocab_size = vocab_size
        self._sharpen = sharpen
        self._noise = noise
        self._on_step = on_step

    def run(
        self,
        ids_BL: Tensor,
        given_BL: Tensor,
        times: list[float],
        block_length: int | None,
        *,
        greedy_tail: bool,
        eos_token_id: int | None,
    ) -> None:
        """Sample the tokens that are not given.

        Args:
            ids_BL: int64 [B, L]; filled in place.
            given_BL: bool [B, L], True where a token is given and kept.
            times: diffusion times of the steps' edges, decreasing from 1 to 0.
            block_length: unknown tokens per block; blocks are sampled from left to right, and the network
                reads no tokens after the current block. None: all tokens are one block.
            greedy_tail: take the most likely ids in the last step instead of drawing.
            eos_token_id: id of <eos>, which ends a text; None: texts do not end early.
        """
        start_BL = self._draws.draw(self._noise.uniform("start"))
        ids_BL.copy_(torch.where(given_BL, ids_BL, start_BL))
        ordinal_BL = torch.where(given_BL, -1, (~given_BL).cumsum(1) - 1)
        unknown_B = (~given_BL).sum(1)
        known_BL = given_BL.clone()
        places, length = torch.arange(ids_BL.shape[1], device=ids_BL.device), ids_BL.shape[1]
        for index, block in enumerate(blocks_of(int(unknown_B.max()), block_length)):
            open_BL = (ordinal_BL >= block.start) & (ordinal_BL < block.stop) & ~known_BL
            # Behind its last block a sequence has given tokens at most, and these are seen.
            end_B = torch.where(block.stop >= unknown_B, length, (open_BL * (places + 1)).amax(1))
            for step, (t, s) in enumerate(itertools.pairwise(times)):
                number = index * (len(times) - 1) + step
                last = s == times[-1]
                alphas = self._alpha(t), 1.0 if last else self._alpha(s)
                self._step(ids_BL, open_BL, end_B, alphas, number, greedy=greedy_tail and last)
                if self._on_step is not None:
                    self._on_step(number, ids_BL)
            known_BL |= open_BL
            if eos_token_id is not None:
                finish_ended(ids_BL, known_BL, given_BL, eos_token_id)

    def _step(
        self,
        ids_BL: Tensor,
        open_BL: Tensor,
        end_B: Tensor,
        alphas: tuple[float, float],
        number: int,
        *,
        greedy: bool,
    ) -> None:
        """Denoise the open positions from alpha_t to alpha_s, reading each sequence up to `end_B`."""
        alpha_t, alpha_s = torch.tensor(alphas, dtype=torch.float64, device=ids_BL.device)
        mixture_BL, token_BL = self._noise.uniform("mixture", number), self._noise.uniform("token", number)
        # A prediction can only add to what stays.
        surely = self._kappa * posterior_shares(alpha_t.new_zeros(()), alpha_t, alpha_s, 1).stays
        may_change_BL = open_BL & ((mixture_BL >= surely) | greedy)
        # A token that no noise gives is clean, also in q(z_0 | z_t); fresh noise may replace it.
        is_noise_BL = torch.isfinite(torch.as_tensor(self._draws.inverse_probability(ids_BL)))
        stays = self._kappa + (1 - self._kappa) * alpha_s
        renewed_BL = open_BL & ~is_noise_BL & (mixture_BL >= stays)
        may_change_BL &= is_noise_BL
        may_change_B = may_change_BL.any(1)
        for end in end_B[may_change_B].unique().tolist():
            called = (may_change_B & (end_B == end)).nonzero()[:, 0]
            wanted = may_change_BL[called, :end]
            sigma_B = noise_level(alpha_t.expand(len(called)))
            hidden_RD = self._network.hidden(ids_BL[called, :end], wanted, sigma_B)
            rows, positions = wanted.nonzero().unbind(1)
            rows = called[rows]
            for part, logits in logit_chunks(self._network.head, hidden_RD, self._vocab_size):
                where = rows[part], positions[part]
                if greedy:
                    ids_BL[where] = logits.argmax(-1)
                    continue
                p = self._sharpen(logits)
                now, mixture = ids_BL[where], mixture_BL[where]
                inverse = self._draws.inverse_probability(now)
                p_now = p.gather(1, now[:, None])[:, 0]
                shares = psi_shares(p_now, alpha_t, alpha_s, inverse, self._kappa)
                random = self._draws.draw(token_BL[where])
                is_predicted = mixture < shares.stays + shares.predicted
                changed = torch.where(is_predicted, draw(p, token_BL[where]), random)
                ids_BL[where] = torch.where(mixture < shares.stays, now, changed)
        if self._kappa < 1:
            ids_BL.copy_(torch.where(renewed_BL, self._draws.draw(token_BL), ids_BL))


@dataclass(frozen=True, kw_only=True)
class ReplacingFamilySampler(FamilySampler):
    """Samplers of families whose noise replaces tokens: every token may change in every step."""

    samplers: ClassVar = {
        "ancestral": ("num_steps", "block_length", "greedy_tail"),
        "psi": ("num_steps", "block_length", "kappa", "greedy_tail"),
        "left-to-right": ("greedy_tail",),
    }

    @property
    @abstractmethod
    def draws(self) -> NoiseDraws:
        """The family's noise."""

    def fill_in(
        self,
        network: Network,
        config: SamplingConfig,
        ids_BL: Tensor,
        given_BL: Tensor,
        noise: SampleNoise,
        on_step: OnStep | None,
    ) -> None:
        """Start from noise and denoise; "left-to-right" takes one step from noise to data per token."""
        one_by_one = config.sampler == "left-to-right"
        sharpen = Sharpening(config.temperature, config.top_p)
        kappa = 1.0 if config.kappa is None else config.kappa
        ReplacingSampler(
            network, self.alpha, self.draws, self.vocab_size, sharpen, noise, on_step, kappa
        ).run(
            ids_BL,
            given_BL,
            [1.0, 0.0] if one_by_one else times(config.num_steps or 0),
            1 if one_by_one else config.block_length,
            greedy_tail=config.greedy_tail,
            eos_token_id=self.eos_token_id if config.stop_at_eos else None,
        )
