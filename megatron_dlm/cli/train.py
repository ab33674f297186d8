"""`megatron-dlm train RECIPE [overrides]`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_dlm.cli.recipe import recipe_run, take_number, take_option

if TYPE_CHECKING:
    from megatron_dlm.run.config import RunConfig

USAGE = """usage: megatron-dlm train RECIPE [--model.size NAME] [--budget-flops FLOPS]
                          [--dry-run PROCESSES | --check PROCESSES] [--field.name VALUE ...]

RECIPE is a Python file with a function recipe() -> RunConfig, such as those under examples/, or the run.json
of a checkpoint. `megatron-dlm train RECIPE --help` lists every field with its unit and the recipe's value.
Start one process per device: examples/torchrun/train.sh, examples/slurm/train.sh, examples/mpi/train.sh.
--model.size replaces the recipe's model by a published size (6M to 2121M); --model.* fields then change it.
--budget-flops sets steps, warm-up and decay as the paper's IsoFLOP runs have them, for example 6e18; the rest
of the recipe, its directory too, stays.
--dry-run checks the configuration for a job of that many processes, prints its layout and starts nothing.
--check also checks the data and what the run starts from, and prints nothing if the job can run.
A run continues from the newest complete checkpoint in its directory. SIGTERM, SIGUSR1, SIGINT or SIGHUP saves
and stops it with exit code 3; under nohup SIGHUP is ignored. Making the file save-now in its directory saves
it.
"""


def run(arguments: list[str]) -> int:
    """Parse, train; returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    words, processes = take_number(arguments, "--dry-run", "processes")
    words, checked_processes = take_number(words, "--check", "processes")
    words, gpu = take_option(words, "--gpu")
    words, gpus_per_node = take_number(words, "--gpus-per-node", "GPUs")
    config = recipe_run(words, verb="train")
    if processes is not None:
        _describe(config, processes)
        return 0
    if checked_processes is not None:
        from megatron_dlm.training.train import check_start

        check_start(config, checked_processes)
        return 0
    return train_and_tell(config)


def train_and_tell(config: RunConfig) -> int:
    """Train, and print what a run says; returns the exit code."""
    from megatron_dlm.cli.process import log_lines
    from megatron_dlm.training.signals import EXIT_PREEMPTED
    from megatron_dlm.training.train import train

    log_lines(of_run=True, quiet=config.telemetry.console == "quiet")
    return 0 if train(config) else EXIT_PREEMPTED


def _describe(config: RunConfig, processes: int) -> None:
    """Print what a run on that many processes does; raises InputError if it cannot."""
    from megatron_dlm.run.description import describe_layout
    from megatron_dlm.run.flops_budget import describe_flops
    from megatron_dlm.run.validation import check_run

    check_run(config, processes)
    lines = describe_layout(config, processes) | {
        "FLOPs": describe_flops(config),
        "data": f"{' '.join(config.data.train)}, validation {config.data.validation or 'of the same shards'}",
    }
    for name, value in lines.items():
        print(f"{name:<10} {value}")
