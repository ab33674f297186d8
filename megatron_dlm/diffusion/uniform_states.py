"""The token ids that uniform noise draws from."""

from __future__ import annotations

from typing import TypeVar

from numpy.typing import NDArray
from torch import Tensor

Ids = TypeVar("Ids", NDArray, Tensor)  # type: ignore[type-arg]


class UniformStates:
    """States of uniform noise: all token ids in order, or all but the mask token."""

    def __init__(self, vocab_size: int, mask_token_id: int, *, mask_in_noise: bool) -> None:
        """Choose the states.

        Args:
            vocab_size: number of ids, mask token included.
            mask_token_id: id of the mask token, in [0, vocab_size).
            mask_in_noise: whether the mask token is a state too.
        """
        self.count = vocab_size if mask_in_noise else vocab_size - 1
        """K, the number of states."""
        self._left_out = vocab_size if mask_in_noise else mask_token_id

    def token(self, ordinal: Ids) -> Ids:
        """The id of the n-th state, n in [0, count), of any shape."""
        return ordinal + (ordinal >= self._left_out)

    def draw(self, uniform: Tensor) -> Tensor:
        """Ids from draws in [0, 1), of any shape."""
        return self.token((uniform * self.count).long())

    def inverse_probability(self, ids: Tensor) -> int:
        """1 over the probability that a draw gives each of the ids."""
        return self.count

    def ordinal(self, token: Ids) -> Ids:
        """Ordinal of a state's id, the inverse of `token`."""
        return token - (token > self._left_out)
