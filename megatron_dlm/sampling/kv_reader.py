"""How a network is asked about tokens to reveal: in the whole noisy text, or behind what its cache holds.

Shape legend: B sequences, L tokens, N tokens fed at a time, R revealed tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from megatron_dlm.sampling.decoding_plan import Plan
from megatron_dlm.sampling.network import Network
from megatron_dlm.sampling.step_grid import noise_level

Found = tuple[Tensor, Tensor, Tensor]
"""[R, D] hidden states, and the rows and positions (int64 [R]) whose tokens they predict."""


class Reader(Protocol):
    """Hidden states that predict some positions."""

    def __call__(self, ids_BL: Tensor, wanted_BL: Tensor, step: int) -> Found:
        """Read the text as it is.

        Args:
            ids_BL: int64 [B, L]; the mask token where not known.
            wanted_BL: bool [B, L], positions to predict.
            step: of the sampler.

        Returns:
            Hidden states with their places.
        """

    def drop(self, ended_B: Tensor) -> None:
        """Take note of sequences (bool [B]) of which nothing will be wanted any more."""


class WholeText:
    """Reads whole sequences, those alone in which something is wanted."""

    def __init__(
        self,
        network: Network,
        *,
        alpha_of: Callable[[Tensor, int], Tensor] | None = None,
        window: Callable[[int], int] | None = None,
        visible_of: Callable[[int, torch.device], Tensor] | None = None,
    ) -> None:
        """Prepare.

        Args:
            network: any.
            alpha_of: (int64 [B, L] texts, step) -> float64 [B], for networks that are told the noise level.
            window: of a step, how many tokens from the left exist; all where absent.
            visible_of: (length, device) -> bool [L, L], who looks at whom; the network's own where absent.
        """
        self._network = network
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
        sigma_B = None if self._alpha_of is None else noise_level(self._alpha_of(seen_BL, step))
        visible_LL = None if self._visible_of is None else self._visible_of(length, ids_BL.device)
        hidden_RD = self._network.hidden(seen_BL, wanted, sigma_B, visible_LL)
        rows, positions = wanted.nonzero().unbind(1)
        return hidden_RD, called[rows], positions

    def drop(self, ended_B: Tensor) -> None:
        """Nothing is kept of any sequence."""


class BehindCache:
    """Feeds a causal network what became known since the last call; its tokens, each once, in a plan's order.

    With masks, those to reveal are fed behind them and predict themselves (arXiv:2506.01928); without, a
    token is predicted from the one before it.
    """

    def __init__(self, network: Network, plan: Plan, *, feeds_masks: bool) -> None:
        """Prepare.

        Args:
            network: causal.
            plan: of the batch.
            feeds_masks: whether the masks to reveal are fed.
        """
        self._feeds_masks = feeds_masks
        self._order_BL = plan.order_BL.to(network.device)
        self._live = torch.arange(len(plan.order_BL), device=network.device)
        self._fed = torch.zeros_like(self._live)
        self._cache = network.start_cache(len(self._live))

    def __call__(self, ids_BL: Tensor, wanted_BL: Tensor, step: int) -> Found:
        """Hidden states of the wanted positions, which follow each other in the order."""
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
        """Forget sequences of which nothing will be wanted any more."""
        kept = (~ended_B[self._live]).nonzero()[:, 0]
        if len(kept) < len(self._live):
            self._cache.select(kept)
            self._live, self._fed = self._live[kept], self._fed[kept]
