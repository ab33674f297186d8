"""Sizes of a grid, by name."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from megatron_dlm.interfaces import InputError
from megatron_dlm.models.config import ModelConfig
from megatron_dlm.models.sizes import paper_model


@dataclass(frozen=True)
class Size:
    """A size of the grid; the MLP is four times as wide as the hidden state."""

    name: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int

    def model(self, base: ModelConfig) -> ModelConfig:
        """The size with the recipe's conditioning."""
        return replace(
            base,
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_attention_heads,
            ffn_hidden_size=4 * self.hidden_size,
        )


def size_named(name: str) -> Size:
    """A size from its name.

    Args:
        name: a published size such as 113M, or LAYERSxHIDDENxHEADS such as 4x128x2.

    Returns:
        The size.

    Raises:
        InputError: neither.
    """
    if found := re.fullmatch(r"(\d+)x(\d+)x(\d+)", name):
        return Size(name, *map(int, found.groups()))
    try:
        model = paper_model(name)
    except InputError as error:
        raise InputError(f"sizes: {name!r} is neither LAYERSxHIDDENxHEADS nor a published size") from error
    return Size(name, model.num_layers, model.hidden_size, model.num_attention_heads)
