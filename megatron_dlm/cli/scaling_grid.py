"""Options that the grids of `megatron-dlm scaling plan` and `lr-sweep` share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from megatron_dlm.cli.plan import vocabulary_of
from megatron_dlm.interfaces import InputError

if TYPE_CHECKING:
    from megatron_dlm.scaling.grid_runs import Base
    from megatron_dlm.scaling.grid_sizes import Size


@dataclass(frozen=True, kw_only=True)
class GridArguments:
    """Families and sizes of a grid, and how a run is made from a recipe."""

    recipes: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Recipes, one for each family: files, or NAME=FILE for a variant with a name of its own, such as
    mdlm-elbo=recipes/elbo.py."""
    output: Path
    """Directory of the grid."""
    sizes: tuple[str, ...]
    """Sizes: published ones, such as 113M, or LAYERSxHIDDENxHEADS, such as 4x128x2."""
    count: Literal["published", "actual"] = "published"
    """FLOPs that a budget counts. published: as the paper counts them, without the attention's products;
    actual: all matrix products, the head on rows with a loss."""
    vocabulary_size: int | None = None
    """Number of token ids, including the mask token; None: of the recipe's shards if they are here, otherwise
    the paper's 32,001."""
    warmup_fraction: float = 0.01
    """Share of the steps that warm up."""
    least_warmup_steps: int = 100
    """Fewest steps of warm-up."""

    def __post_init__(self) -> None:
        if not self.recipes:
            raise InputError("recipes: none given")
        check_once("sizes", self.sizes)
        if not 0 <= self.warmup_fraction < 1:
            raise InputError(f"warmup_fraction: {self.warmup_fraction} is outside [0, 1)")

    def bases(self) -> list[Base]:
        """The families.

        Returns:
            One for each recipe.

        Raises:
            InputError: a recipe cannot be read, or two families have one name.
        """
        from megatron_dlm.run.config import load_recipe
        from megatron_dlm.scaling.grid_runs import Base

        bases: list[Base] = []
        for word in self.recipes:
            name, equals, file = word.partition("=")
            path = Path(file if equals else word)
            recipe = load_recipe(path)
            size, _ = vocabulary_of(recipe, self.vocabulary_size)
            bases.append(Base(name if equals else recipe.objective.name, path, recipe, size))
        names = [base.name for base in bases]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise InputError(f"recipes: two are called {twice[0]}; name one NAME=FILE")
        return bases

    def named_sizes(self) -> list[Size]:
        """The sizes by their names."""
        from megatron_dlm.scaling.grid_sizes import size_named

        return [size_named(name) for name in self.sizes]


def check_once(name: str, values: tuple[object, ...]) -> None:
    """Refuse an option's list that is empty or has a value twice.

    Args:
        name: the option.
        values: its values.

    Raises:
        InputError: there are none, or two are alike.
    """
    if not values:
        raise InputError(f"{name}: none given")
    if len(set(values)) < len(values):
        raise InputError(f"{name}: one is given twice: {' '.join(map(str, values))}")
