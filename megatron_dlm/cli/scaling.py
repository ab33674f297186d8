"""`megatron-dlm scaling plan|run|collect|fit|report|lr-sweep`: scaling laws."""

from __future__ import annotations

from importlib import import_module

from megatron_dlm.interfaces import InputError

USAGE = """usage: megatron-dlm scaling plan RECIPE ... --output GRID ...  list a grid of runs
       megatron-dlm scaling run GRID                          train those that are missing, here
       megatron-dlm scaling collect GRID ... --output FILE.csv  results as one table
       megatron-dlm scaling fit FILE.csv --output fit.json    optima, laws, FLOPs ratios
       megatron-dlm scaling report FILE.csv --output DIR      the fit as a page with pictures
       megatron-dlm scaling lr-sweep RECIPE ... --output GRID ...  best learning rate by size

`megatron-dlm scaling fit --help` lists the arguments with their units.
"""
ACTIONS = ("plan", "run", "collect", "fit", "report", "lr-sweep")


def run(arguments: list[str]) -> int:
    """Run the subcommand named by the first argument; returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    if arguments[0] not in ACTIONS:
        raise InputError(f"scaling: {arguments[0]!r} is not one of {', '.join(ACTIONS)}")
    action = import_module(f"megatron_dlm.cli.scaling_{arguments[0].replace('-', '_')}")
    code: int = action.run(arguments[1:])
    return code
