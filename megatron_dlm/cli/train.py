"""`megatron-dlm train RECIPE [overrides]`."""

from __future__ import annotations

from pathlib import Path

from megatron_dlm.cli.arguments import parse
from megatron_dlm.interfaces import InputError

USAGE = """usage: megatron-dlm train RECIPE [--field.name VALUE ...]

RECIPE is a Python file with a function recipe() -> RunConfig, such as those under examples/, or the run.json
of a checkpoint. `megatron-dlm train RECIPE --help` lists every field with its unit and the recipe's value.
Start one process per device with torchrun, srun or mpirun; see examples/torchrun, examples/slurm, examples/mpi.
A run continues from the newest complete checkpoint in its directory. SIGTERM or SIGUSR1 saves and stops it
with exit code 3.
"""
EXIT_PREEMPTED = 3


def run(arguments: list[str]) -> int:
    """Parse, train; returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    if arguments[0].startswith("-"):
        raise InputError(f"recipe: expected a file before {arguments[0]}; see megatron-dlm train --help")
    from megatron_dlm.training.run_config import RunConfig, load_recipe

    config = parse(
        RunConfig, arguments[1:], verb=f"train {arguments[0]}", default=load_recipe(Path(arguments[0]))
    )
    from megatron_dlm.training.run import train

    return 0 if train(config) else EXIT_PREEMPTED
