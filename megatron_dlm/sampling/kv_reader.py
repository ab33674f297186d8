"""Readers run the network on the tokens to unmask: over the whole noisy text, or with a key-value cache.

Shape legend: B sequences, L tokens, N tokens fed at a time, R revealed tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from megatron_dlm.sampling.decoding_plan import Plan
from megatron_dlm.sampling.guidance import Guidance
from megatron_dlm.sampling.network import Network
from megatron_dlm.sampling.step_grid import noise_level

Found = tuple[Tensor, Tensor, Tensor]
"""[R, D] hidden states, and the rows and positions (int64 [R]) whose tokens they predict."""


class Reader(Protocol):
    """Runs the network for the hidden states that predict given positions."""

    def __call__(self, ids_BL: Tensor, wanted_BL: Tensor, step: int) -> Found:
        """Run the network on the current noisy text.

        Args:
            ids_BL: int64 [B, L]; the mask token where a token is not known yet.
            wanted_BL: bool [B, L], True at positions to predict.
            step: step of the sampler.

        Returns:
            Hidden states with the rows and positions they predict.
        """

    def drop(self, ended_B: Tensor) -> None:
        """Stop reading the sequences that have ended (True in bool [B])."""


class WholeText:
    """Reader that runs whole sequences, without a cache; skips sequences with nothing to predict."""

    def __init__(
        self,
        network: Network,
        *,
        alpha_of: Callable[[Tensor, int], Tensor] | None = None,
        window: Callable[[int], int] | None = None,
        visible_of: Callable[[int, torch.device], Tensor] | None = None,
        guidance: Guidance | None = None,
        predicts_next: bool = False,
    ) -> None:
        """Prepare.

        Args:
            network: trained network.
            alpha_of: function (int64 [B, L] texts, step) -> float64 [B] alpha, for networks conditioned on
                the noise level; None: no conditioning.
            window: function from the step to the number of tokens, from the left, that are read; None: all.
            visible_of: function (length, device) -> bool [L, L] attention mask, True where a row attends to a
                column; None: the network's own pattern.
            guidance: read each text without its prompt too; hidden states are then [R, 2 D], those without it
                behind the others.
            predicts_next: whether each position predicts the token behind it, instead of its own.
        """
        self._predicts_next = predicts_next
        self._network = network
        self._guidance = guidance
        self._alpha_of = alpha_of
        self._window = window
        self._visible_of = visible_of

    def __call__(self, ids_BL: Tensor, wanted_BL: Tensor, step: int) -> Found:
        """Hidden states of the wanted positions."""
        called = wanted_BL.any(1).nonzero()[:, 0]
        length = ids_BL.shape[1]
        if self._window is not None:
            length = min(length, self._window(step))
        seen_BL, wanted = ids_BL[called, :length], wanted_BL[called, :length]
        # The first token is given, so that nothing is moved beyond an end.
        places = wanted.roll(-1, dims=1) if self._predicts_next else wanted
        hidden_RD = self._hidden(seen_BL, places, step)
        if self._guidance is not None:
            other_RD = self._hidden(self._guidance.without_prompt(seen_BL, called), places, step)
            hidden_RD = torch.cat((hidden_RD, other_RD), dim=-1)
        rows, positions = wanted.nonzero().unbind(1)
        return hidden_RD, called[rows], positions

    def _hidden(self, seen_BL: Tensor, wanted_BL: Tensor, step: int) -> Tensor:
        sigma_B = None if self._alpha_of is None else noise_level(self._alpha_of(seen_BL, step))
        length = seen_BL.shape[1]
        visible_LL = None if self._visible_of is None else self._visible_of(length, seen_BL.device)
        return self._network.hidden(seen_BL, wanted_BL, sigma_B, visible_LL)

    def drop(self, ended_B: Tensor) -> None:
        """Do nothing: this reader keeps no state."""


class BehindCache:
    """Reader with a key-value cache: feeds a causal network the newly known tokens, in the plan's order.

    With `feeds_masks`, the mask tokens to unmask follow them and each predicts its own position
    (arXiv:2506.01928); otherwise each token predicts the next one.
    """

    def __init__(self, network: Network, plan: Plan, *, feeds_masks: bool) -> None:
        """Prepare.

        Args:
            network: causal network.
            plan: decoding plan of the batch.
            feeds_masks: whether the mask tokens to unmask are fed too.
        """
        self._feeds_masks = feeds_masks
        self._order_BL = plan.order_BL.to(network.device)
        self._live = torch.arange(len(plan.order_BL), device=network.device)
        self._fed = torch.zeros_like(self._live)
        self._cache = network.start_cache(len(self._live))

    def __call__(self, ids_BL: Tensor, wanted_BL: Tensor, step: int) -> Found:
        """Hidden states of the wanted positions, which must be consecutive in the plan's order."""
        live, order = self._live, self._order_BL[self._live]
        wanted = wanted_BL[live].gather(1, order)
        count = wanted.sum(1)
        # Sequences with nothing to reveal in this step feed nothing either.
        start = torch.where(count > 0, wanted.int().argmax(1), self._fed)
        stop = start + count if self._feeds_masks else start
        width = int((stop - self._fed).max())
        index = self._fed[:, None] + torch.arange(width, device=ids_BL.device)
        valid, kept = index < stop[:, None], index < start[:, None]
        index = index.clamp(max=order.shape[1] - 1)
        positions = order.gather(1, index)
        ids = ids_BL[live].gather(1, positions)
        if self._feeds_masks:
            rows = valid & ~kept
            targets = positions
        else:
            rows = kept & (index == start[:, None] - 1) & (count > 0)[:, None]
            targets = order.gather(1, (index + 1).clamp(max=order.shape[1] - 1))
        hidden_RD = self._cache.hidden(ids, positions, valid, kept, rows)
        self._fed = start
        which, column = rows.nonzero().unbind(1)
        return hidden_RD, live[which], targets[which, column]

    def drop(self, ended_B: Tensor) -> None:
        """Remove sequences that have ended from the cache."""
        kept = (~ended_B[self._live]).nonzero()[:, 0]
        if len(kept) < len(self._live):
            self._cache.select(kept)
            self._live, self._fed = self._live[kept], self._fed[kept]
