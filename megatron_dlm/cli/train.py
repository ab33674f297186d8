"""`megatron-dlm train RECIPE [overrides]`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dlm.cli.arguments import parse
from megatron_dlm.interfaces import InputError

if TYPE_CHECKING:
    from megatron_dlm.run.config import RunConfig

USAGE = """usage: megatron-dlm train RECIPE [--model.size NAME] [--budget-flops FLOPS] [--dry-run PROCESSES]
                          [--field.name VALUE ...]

RECIPE is a Python file with a function recipe() -> RunConfig, such as those under examples/, or the run.json
of a checkpoint. `megatron-dlm train RECIPE --help` lists every field with its unit and the recipe's value.
Start one process per device: examples/torchrun/train.sh, examples/slurm/train.sh, examples/mpi/train.sh.
--model.size replaces the recipe's model by a published size (6M to 2121M); --model.* fields then change it.
--budget-flops sets steps, warm-up and decay as the paper's IsoFLOP runs have them, for example 6e18; the rest
of the recipe, its directory too, stays.
--dry-run checks the configuration for a job of that many processes, prints its layout and starts nothing.
A run continues from the newest complete checkpoint in its directory. SIGTERM, SIGUSR1, SIGINT or SIGHUP saves
and stops it with exit code 3; under nohup SIGHUP is ignored. Making the file save-now in its directory saves
it.
"""


def run(arguments: list[str]) -> int:
    """Parse, train; returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    if arguments[0].startswith("-"):
        raise InputError(f"recipe: expected a file before {arguments[0]}; see megatron-dlm train --help")
    from megatron_dlm.run.config import RunConfig, load_recipe

    overrides, processes = _take_dry_run(arguments[1:])
    overrides, size = _take_option(overrides, "--model.size")
    overrides, budget = _take_option(overrides, "--budget-flops")
    recipe = load_recipe(Path(arguments[0]))
    if size is not None:
        from megatron_dlm.models.sizes import paper_model

        recipe = replace(recipe, model=paper_model(size))
    config = parse(RunConfig, overrides, verb=f"train {arguments[0]}", default=recipe)
    if budget is not None:
        from megatron_dlm.run.presets import within_budget

        config = within_budget(config, _positive_number("--budget-flops", budget))
    if processes is not None:
        print(describe_layout(config, processes))
        return 0
    from megatron_dlm.training.signals import EXIT_PREEMPTED
    from megatron_dlm.training.train import train

    return 0 if train(config) else EXIT_PREEMPTED


def _take_dry_run(arguments: list[str]) -> tuple[list[str], int | None]:
    """The arguments without `--dry-run PROCESSES`, and its number."""
    rest, value = _take_option(arguments, "--dry-run")
    if value is None:
        return rest, None
    if not value.isdigit() or int(value) < 1:
        raise InputError(f"--dry-run: {value!r} is not a number of processes")
    return rest, int(value)


def _positive_number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise InputError(f"{name}: {text!r} is not a number above 0")
    return value


def _take_option(arguments: list[str], name: str) -> tuple[list[str], str | None]:
    """The arguments without `name VALUE` or `name=VALUE`, and the value; None if the option is not given."""
    for index, word in enumerate(arguments):
        if word == name:
            value = arguments[index + 1] if index + 1 < len(arguments) else ""
            return arguments[:index] + arguments[index + 2 :], value
        if word.startswith(f"{name}="):
            return arguments[:index] + arguments[index + 1 :], word.removeprefix(f"{name}=")
    return arguments, None


def describe_layout(config: RunConfig, processes: int) -> str:
    """Summary of the run on that many processes, as text; raises InputError if the layout is invalid."""
    from megatron_dlm.models.sizes import parameter_count
    from megatron_dlm.run.flops_budget import describe_flops
    from megatron_dlm.run.validation import check_run

    check_run(config, processes)
    parallel, training = config.parallel, config.training
    padded_heads = config.model.padded_heads(parallel.tensor_model_parallel_size)
    data_size = parallel.data_parallel_size(processes)
    tokens = training.global_batch_size * config.data.seq_length
    microbatches = training.global_batch_size // (training.micro_batch_size * data_size)
    run_tokens = training.samples_ahead(0, training.num_steps) * config.data.seq_length
    chunks = ""
    if parallel.virtual_pipeline_model_parallel_size > 1:
        chunks = f" of {parallel.virtual_pipeline_model_parallel_size} chunks"
    ramp = f", from {training.ramp_start} samples on" if training.ramp_start else ""
    lines = {
        "objective": config.objective.name,
        "processes": f"{processes} = {parallel.tensor_model_parallel_size} tensor "
        f"x {parallel.pipeline_model_parallel_size} pipeline{chunks} "
        f"x {parallel.context_parallel_size} context x {data_size} data parallel",
        "model": f"{parameter_count(config.model, 0):,} body parameters, {config.model.num_layers} layers, "
        f"{config.model.num_attention_heads} heads ({padded_heads} with padding), {training.precision}",
        "step": f"{training.global_batch_size} samples x {config.data.seq_length} = {tokens:,} tokens, "
        f"{microbatches} microbatches of {training.micro_batch_size} a process{ramp}",
        "run": f"{training.num_steps:,} steps, {run_tokens / 1e9:,.1f}B tokens",
        "FLOPs": describe_flops(config),
        "directory": str(config.directory),
        "data": f"{' '.join(config.data.train)}, validation {config.data.validation or 'of the same shards'}",
    }
    return "\n".join(f"{name:<10} {value}" for name, value in lines.items())
