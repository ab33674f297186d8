"""The run that a command line describes: a recipe, a published size, a budget and overrides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dlm.cli.arguments import parse
from megatron_dlm.interfaces import InputError

if TYPE_CHECKING:
    from megatron_dlm.run.config import RunConfig


def recipe_run(arguments: Sequence[str], *, verb: str, usage: str = "") -> RunConfig:
    """The run of `RECIPE [--model.size NAME] [--budget-flops N] [--branch-decay-at N] [--field VALUE ...]`.

    Args:
        arguments: command-line arguments, the recipe first.
        verb: name of the command, shown in the usage line.
        usage: the command's own options, which `RECIPE --help` prints before the run's fields.

    Returns:
        The run's configuration.

    Raises:
        InputError: there is no such recipe or size, or an argument is unknown or of the wrong type or range.
    """
    from megatron_dlm.run.config import RunConfig, load_recipe

    if arguments[0].startswith("-"):
        raise InputError(f"recipe: expected a file before {arguments[0]}; see megatron-dlm {verb} --help")
    if {"-h", "--help"} & set(arguments):
        print(usage)
    overrides, size = take_option(arguments[1:], "--model.size")
    overrides, budget = take_option(overrides, "--budget-flops")
    overrides, branch = take_number(overrides, "--branch-decay-at", "steps")
    recipe = load_recipe(Path(arguments[0]))
    if size is not None:
        from megatron_dlm.models.sizes import paper_model

        recipe = replace(recipe, model=paper_model(size))
    config = parse(RunConfig, overrides, verb=f"{verb} {arguments[0]}", default=recipe)
    if budget is not None:
        from megatron_dlm.run.presets import within_budget

        config = within_budget(config, _positive_number("--budget-flops", budget))
    if branch is not None:
        from megatron_dlm.run.presets import decay_branch

        config = decay_branch(config, branch)
    return config


def take_option(arguments: Sequence[str], name: str) -> tuple[list[str], str | None]:
    """Take an option that is no field of a run from the command line.

    Args:
        arguments: command-line arguments.
        name: the option, with its dashes.

    Returns:
        The arguments without `name VALUE` or `name=VALUE`, and the value; None if the option is not given.
    """
    words = list(arguments)
    for index, word in enumerate(words):
        if word == name:
            value = words[index + 1] if index + 1 < len(words) else ""
            return words[:index] + words[index + 2 :], value
        if word.startswith(f"{name}="):
            return words[:index] + words[index + 1 :], word.removeprefix(f"{name}=")
    return words, None


def take_number(arguments: Sequence[str], name: str, what: str) -> tuple[list[str], int | None]:
    """Take an option whose value is a whole number above 0.

    Args:
        arguments: command-line arguments.
        name: the option, with its dashes.
        what: what it counts.

    Returns:
        The other arguments, and the number; None if the option is not given.

    Raises:
        InputError: the value is no such number.
    """
    rest, value = take_option(arguments, name)
    if value is None:
        return rest, None
    if not value.isdigit() or int(value) < 1:
        raise InputError(f"{name}: {value!r} is not a number of {what}")
    return rest, int(value)


def _positive_number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise InputError(f"{name}: {text!r} is not a number above 0")
    return value
