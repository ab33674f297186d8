"""`megatron-dlm evaluate nll|perplexity|gate|gsm8k|harness|pareto`: evaluation of a trained model."""

from __future__ import annotations

from megatron_dlm.cli import (
    evaluate_gate,
    evaluate_gsm8k,
    evaluate_harness,
    evaluate_nll,
    evaluate_pareto,
    evaluate_perplexity,
)
from megatron_dlm.interfaces import InputError

USAGE = """usage: megatron-dlm evaluate nll MODEL [--data SHARD | --text FILE ...]   bound on held-out data
       megatron-dlm evaluate perplexity MODEL --text FILE ...              zero-shot, in sliding windows
       megatron-dlm evaluate gate A B                                      is B (its precision) as good as A
       megatron-dlm evaluate gsm8k MODEL --data FILE --output DIR          exact match on GSM8K
       megatron-dlm evaluate harness MODEL --tasks NAME ...                tasks of lm-evaluation-harness
       megatron-dlm evaluate pareto MODEL ... --judge FOLDER --output DIR  quality against speed of samplers

MODEL is a run's directory (its newest checkpoint), RUN@STEP, RUN --step STEP, a checkpoint's directory or an
exported folder. `megatron-dlm evaluate nll --help`
lists the arguments with their units.
"""
ACTIONS = {
    "nll": evaluate_nll.run,
    "gate": evaluate_gate.run,
    "gsm8k": evaluate_gsm8k.run,
    "harness": evaluate_harness.run,
    "pareto": evaluate_pareto.run,
    "perplexity": evaluate_perplexity.run,
}


def run(arguments: list[str]) -> int:
    """Run the subcommand named by the first argument; returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    if arguments[0] not in ACTIONS:
        raise InputError(f"evaluate: {arguments[0]!r} is not one of {', '.join(ACTIONS)}")
    return ACTIONS[arguments[0]](arguments[1:])
