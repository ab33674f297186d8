"""Results of runs that nobody trained."""

import math

from megatron_dlm.scaling.collect import Result


def result(name, **changes):
    """A row of points.csv."""
    return Result(
        **{
            "run": name,
            "family": "mdlm",
            "budget_flops": 1e12,
            "parameters": 10_000,
            "body_parameters": 5_000,
            "published_flops": 1e12,
            "actual_flops": 1e12,
            "tokens": 1_000_000,
            "unique_tokens": 2_000_000,
            "steps": 100,
            "batch_size": 8,
            "nats_per_token": 3.0,
            "standard_error": 0.01,
            "bits_per_byte": 1.5,
            "seed": 1,
            "lr": 1e-3,
            "train_sha256": "0" * 64,
            "validation": "held-out 2x8 seed 0",
            "git_revision": "",
            "seconds": 1.0,
        }
        | changes
    )


def results_of_sweep(*, sizes, best):
    """Six rates for each size, whose losses are parabolas in ln(rate) around `best(size)`."""
    return [
        result(
            f"{size}-{index}",
            parameters=size,
            lr=best(size) * 2.0**index,
            nats_per_token=3.0 + 0.05 * (index * math.log(2)) ** 2,
        )
        for size in sizes
        for index in (-2, -1, 0, 1, 2, 3)
    ]
