"""`megatron-dlm train RECIPE [overrides]`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_dlm.cli.plan import take_gpus, vocabulary_of
from megatron_dlm.cli.recipe import recipe_run, take_number
from megatron_dlm.interfaces import InputError

if TYPE_CHECKING:
    from megatron_dlm.run.config import RunConfig

USAGE = """usage: megatron-dlm train RECIPE [--model.size NAME] [--budget-flops FLOPS]
                          [--branch-decay-at STEP]
                          [--dry-run PROCESSES [--gpu NAME] [--gpus-per-node N] | --check PROCESSES]
                          [--field.name VALUE ...]

RECIPE is a Python file with a function recipe() -> RunConfig, such as those under examples/, or the run.json
of a checkpoint. `megatron-dlm train RECIPE --help` lists every field with its unit and the recipe's value.
Start one process per device: examples/torchrun/train.sh, examples/slurm/train.sh, examples/mpi/train.sh.
--model.size replaces the recipe's model by a published size (6M to 2121M); --model.* fields then change it.
--budget-flops sets steps, warm-up and decay as the paper's IsoFLOP runs have them, for example 6e18; the rest
of the recipe, its directory too, stays.
--branch-decay-at trains a branch of a run with a wsd schedule: from the checkpoint of that step in the
recipe's directory, its learning rate decays at once; the branch's directory is DIRECTORY-decay-STEP. So one
long run gives a finished model at several lengths; checkpoint.save_at keeps the checkpoints to branch from.
--dry-run checks the configuration for a job of that many processes and starts nothing. It prints the layout,
memory of a rank and time of a step as `megatron-dlm plan` predicts them (--gpu h100 and --gpus-per-node 8
unless told otherwise), and whether the data and what the run starts from are on this machine.
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
    words, gpu, gpus_per_node = take_gpus(words)
    config = recipe_run(words, verb="train", usage=USAGE)
    if processes is not None:
        _describe(config, processes, gpu, gpus_per_node)
        return 0
    if checked_processes is not None:
        from megatron_dlm.training.train import check_start

        check_start(config, checked_processes)
        return 0
    return train_and_tell(config)


def train_and_tell(config: RunConfig) -> int:
    """Train, and print what a run says; returns the exit code."""
    from megatron_dlm.cli.process import log_lines
    from megatron_dlm.platform.exit_codes import EXIT_PREEMPTED
    from megatron_dlm.training.train import train

    log_lines(of_run=True, quiet=config.telemetry.console == "quiet")
    return 0 if train(config) else EXIT_PREEMPTED


def _describe(config: RunConfig, processes: int, gpu: str, gpus_per_node: int) -> None:
    """Print what a run on that many processes does; raises InputError if it cannot."""
    from megatron_dlm.run.description import describe_layout
    from megatron_dlm.run.flops_budget import describe_flops
    from megatron_dlm.run.working_ranks import find_working_ranks

    working = find_working_ranks(config, processes)
    processes = working.count
    vocabulary_size, source = vocabulary_of(config)
    lines = {"idle": working.describe()} if working.idle else {}
    lines |= describe_layout(config, processes) | {
        "FLOPs": describe_flops(config, vocabulary_size),
        "vocabulary": f"{vocabulary_size:,} ids, {source}",
        **_planned(config, processes, vocabulary_size, gpu, gpus_per_node),
        "data": f"{' '.join(config.data.train)}, validation {config.data.validation or 'of the same shards'}",
        "this host": _readiness(config, processes),
    }
    for name, value in lines.items():
        print(f"{name:<10} {value}")


def _planned(
    config: RunConfig, processes: int, vocabulary_size: int, gpu: str, gpus_per_node: int
) -> dict[str, str]:
    """Memory and time of the layout on GPUs, by heading."""
    from megatron_dlm.planning.gpus import gpu_named, usable_gib
    from megatron_dlm.planning.plan import GIB, Cluster, Planner

    per_node = min(processes, gpus_per_node)
    if processes % per_node:
        return {"plan": f"none: {processes} processes are no whole number of nodes of {per_node} GPUs"}
    cluster = Cluster(gpu_named(gpu), processes // per_node, per_node)
    try:
        estimate = Planner(config, cluster, vocabulary_size).estimate(config)
    except InputError as error:
        return {"plan": f"none on {gpu}: {error}"}
    usable = usable_gib(cluster.gpu)
    verdict = "fits" if estimate.fits else "DOES NOT FIT; see megatron-dlm plan"
    return {
        "memory": f"{estimate.memory.total / GIB:.2f} GiB of a rank's {usable:.1f} on {gpu}: {verdict}",
        "time": f"{estimate.time.total * 1e3:,.0f} ms a step, {estimate.tokens_per_second_per_gpu:,.0f} "
        f"tokens/s/GPU, {estimate.hours:,.1f} hours in all, predicted for {processes} {gpu}",
    }


def _readiness(config: RunConfig, processes: int) -> str:
    """Whether the run's data and start are on this machine."""
    from megatron_dlm.training.train import check_start

    try:
        check_start(config, processes)
    except InputError as error:
        return f"cannot start it: {error}"
    return "has its data and what it starts from"
