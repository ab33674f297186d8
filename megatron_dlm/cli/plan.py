"""`megatron-dlm plan RECIPE`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from megatron_dlm.cli.plan_tables import (
    print_chosen,
    print_layouts,
    print_own,
    print_refusals,
    print_run,
    print_simulation,
    write_rows,
)
from megatron_dlm.cli.recipe import recipe_run, take_number, take_option
from megatron_dlm.interfaces import InputError

if TYPE_CHECKING:
    from megatron_dlm.planning.plan import Estimate, Planner
    from megatron_dlm.run.config import RunConfig

USAGE = """usage: megatron-dlm plan RECIPE [--nodes N] [--gpus-per-node N] [--gpu NAME] [--precisions NAMES]
                         [--vocabulary-size IDS] [--rows N] [--simulate FILE.png] [--output FILE.json]
                         [--model.size NAME] [--field.name VALUE ...]

Compares every layout of a run on a cluster, without any GPU: memory of a rank in GiB, time of a step in ms.
Names the fastest layout that fits, with the options that select it, and says whether the recipe's own layout
fits. RECIPE and fields are those of `megatron-dlm train`.

--nodes           number of nodes; default 1
--gpus-per-node   GPUs of a node, linked with each other; default 8
--gpu             a100, a100-40gb, l40s, h100, h200, b200 or gb200; default h100
--precisions      precisions to try, separated by commas, for example bf16,fp8; default the recipe's
--vocabulary-size token ids including the mask token; default those of the recipe's shards if they are here,
                  otherwise 32,001
--rows            number of layouts to show; default 10
--simulate        draw the chosen layout's speed from one node to 4,096 GPUs as a PNG file (needs matplotlib)
--output          write all layouts that fit as JSON
exit code: 0 if the recipe's own layout fits, 1 if it does not
"""
DEFAULT_ROWS = 10
DEFAULT_GPU, DEFAULT_GPUS_PER_NODE = "h100", 8


def run(arguments: list[str]) -> int:
    """Parse, compare, print; returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    from megatron_dlm.planning.gpus import gpu_named
    from megatron_dlm.planning.plan import Cluster, Planner

    words, nodes = take_number(arguments, "--nodes", "nodes")
    words, gpu, per_node = take_gpus(words)
    words, asked_vocabulary = take_number(words, "--vocabulary-size", "token ids")
    words, rows = take_number(words, "--rows", "layouts")
    words, precisions = take_option(words, "--precisions")
    words, picture = take_option(words, "--simulate")
    words, output = take_option(words, "--output")
    config = recipe_run(words, verb="plan", usage=USAGE)
    cluster = Cluster(gpu_named(gpu), nodes or 1, per_node)
    vocabulary_size, source = vocabulary_of(config, asked_vocabulary)
    planner = Planner(config, cluster, vocabulary_size)
    own = _own_estimate(planner, config)
    tried = _precisions(precisions) or [config.training.precision]
    fitting = planner.ranked(tried)
    print_run(config, cluster, vocabulary_size, source)
    if fitting:
        print_layouts(fitting[: rows or DEFAULT_ROWS], len(fitting))
    print_own(config, own, fitting)
    if fitting:
        print_chosen(config, fitting)
        print_refusals(config, cluster, fitting)
        if picture is not None:
            print_simulation(fitting[0], vocabulary_size, Path(picture))
    if output is not None:
        write_rows(Path(output), fitting)
    return 0 if not isinstance(own, str) and own.fits else 1


def take_gpus(arguments: Sequence[str]) -> tuple[list[str], str, int]:
    """Take `--gpu` and `--gpus-per-node` from the command line.

    Args:
        arguments: command-line arguments.

    Returns:
        The other arguments, the name of the GPU, and how many of them a node has.
    """
    words, gpu = take_option(arguments, "--gpu")
    words, per_node = take_number(words, "--gpus-per-node", "GPUs")
    return words, DEFAULT_GPU if gpu is None else gpu, per_node or DEFAULT_GPUS_PER_NODE


def vocabulary_of(config: RunConfig, asked: int | None = None) -> tuple[int, str]:
    """Number of token ids of a run, and where it is from.

    Args:
        config: configuration of the run.
        asked: number from the command line.

    Returns:
        That number; or that of the run's shards, if they are on this machine; or the paper's.
    """
    from megatron_dlm.models.flops.flops_paper import PUBLISHED_VOCABULARY
    from megatron_dlm.run.datasets import open_data

    if asked is not None:
        return asked, "as asked for"
    try:
        return open_data(config.data).vocabulary.size, "of its shards"
    except InputError:
        return PUBLISHED_VOCABULARY, "assumed, since its shards are not here"


def _precisions(text: str | None) -> list[Any]:
    from megatron_dlm.models.config import Precision

    names = [] if text is None else text.split(",")
    for name in names:
        if name not in get_args(Precision):
            raise InputError(f"--precisions: {name!r} is not one of {', '.join(get_args(Precision))}")
    return names


def _own_estimate(planner: Planner, config: RunConfig) -> Estimate | str:
    """The recipe's own layout, or why it cannot run on this cluster."""
    try:
        return planner.estimate(config)
    except InputError as error:
        return str(error)
