"""Tokens a second and memory of the samplers against the published way, both sides in one run.

    python tools/bench/sample.py [--families mdlm duo ar esolm] [--steps 32 128] [--length 512]

Both sides have the same weights (random) in the same exported model. The published way
(tools/bench/naive_sampling.py) reads all rows in every step, forms all logits and draws with a [B, L, V]
buffer of noise; for AR it keeps keys unrotated and rotates all of them for each token, for Eso-LM it reads
again all that is known.
Each measurement is a process of its own; sides alternate. Times are medians over repeats, of whole calls;
memory is the peak of another process over what it held before the call. AR takes a step a token.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from tools.bench.step import OWN_PAGES, show, status_mib

FAMILIES = ("mdlm", "duo", "esolm", "ar")
SIDES = ("ours", "naive")
COLUMNS = [
    *("family", "sampler", "steps", "ours tokens/s", "naive tokens/s", "ours/naive"),
    *("ours MiB", "naive MiB", "ours/naive MiB"),
]


def build_model(family: str, size: str, vocabulary_size: int, length: int) -> torch.nn.Module:
    """The exported model with random weights, of whose logits none is sure of much."""
    from megatron_dlm.evaluation.loaded_model import exported_model
    from megatron_dlm.families.registry import OBJECTIVES
    from megatron_dlm.interfaces import Vocabulary
    from megatron_dlm.models.sizes import paper_model

    vocabulary = Vocabulary(
        size=vocabulary_size, mask_token_id=vocabulary_size - 1, eos_token_id=2, bos_token_id=1
    )
    model: torch.nn.Module = exported_model(paper_model(size), vocabulary, OBJECTIVES[family](), length)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def settings_of(family: str, steps: int) -> dict[str, object]:
    """Our sampler of the same process as the naive one."""
    if family == "ar":
        return {}
    return {"sampler": "block" if family == "esolm" else "ancestral", "num_steps": steps}


def measure(arguments: argparse.Namespace) -> None:
    """Measure one side in this process: seconds and MiB."""
    from tools.bench.naive_sampling import NAIVE

    torch.set_num_threads(arguments.threads)
    family, steps, length = arguments.families[0], arguments.steps[0], arguments.length
    model = build_model(family, arguments.size, arguments.vocabulary_size, length)

    def call(tokens: int, num_steps: int) -> None:
        if arguments.side == "ours":
            settings = settings_of(family, num_steps)
            model.generate(max_length=tokens, batch_size=arguments.batch_size, **settings)  # type: ignore[operator]
        else:
            generator = torch.Generator().manual_seed(0)
            NAIVE[family](model, arguments.batch_size, tokens, num_steps, generator)

    # What is done once in a process is not measured.
    call(8, 2)
    gc.collect()
    before = status_mib("VmRSS")
    start = time.perf_counter()
    call(length, steps)
    seconds = time.perf_counter() - start
    print(seconds, status_mib("VmHWM") - before)


def run_side(
    side: str, family: str, steps: int, arguments: argparse.Namespace, environment: dict[str, str]
) -> tuple[float, float]:
    """Seconds and MiB of one side in a process of its own."""
    words = [sys.executable, __file__, "--side", side, "--families", family, "--steps", steps]
    for name in ("size", "length", "batch_size", "vocabulary_size", "threads"):
        words += [f"--{name.replace('_', '-')}", getattr(arguments, name)]
    finished = subprocess.run(
        [str(word) for word in words],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    seconds, mib = map(float, finished.stdout.split()[-2:])
    return seconds, mib


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--steps", nargs="+", type=int, default=[32, 128], help="of MDLM, Duo and Eso-LM")
    parser.add_argument("--size", default="6M", help="published size")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sample")
    parser.add_argument("--batch-size", type=int, default=4, help="samples of a call")
    parser.add_argument("--vocabulary-size", type=int, default=32001, help="ids, mask token included")
    parser.add_argument("--repeats", type=int, default=3, help="measured calls of each side")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        measure(arguments)
        return
    print(f"{arguments.size}, {arguments.batch_size} x {arguments.length} tokens, ", end="")
    print(f"{arguments.threads} threads, torch {torch.__version__}, {arguments.repeats} repeats")
    rows = []
    for family in arguments.families:
        for steps in arguments.steps if family != "ar" else [arguments.length - 1]:
            times: dict[str, list[float]] = {side: [] for side in SIDES}
            for _ in range(arguments.repeats):
                for side in SIDES:
                    times[side].append(run_side(side, family, steps, arguments, {})[0])
            seconds = {side: statistics.median(times[side]) for side in SIDES}
            # Apart, since pages of its own for every tensor cost time.
            mib = {side: run_side(side, family, steps, arguments, OWN_PAGES)[1] for side in SIDES}
            tokens = arguments.batch_size * arguments.length
            print(
                f"{family}, {steps} steps: {seconds['ours']:.1f} s, {seconds['naive']:.1f} s", file=sys.stderr
            )
            rows.append(
                [
                    family,
                    str(settings_of(family, steps).get("sampler", "left-to-right")),
                    str(steps),
                    *(f"{tokens / seconds[side]:,.0f}" for side in SIDES),
                    f"{seconds['naive'] / seconds['ours']:.2f}x",
                    *(f"{mib[side]:,.0f}" for side in SIDES),
                    f"{mib['ours'] / mib['naive']:.2f}",
                ]
            )
    show("sampling", COLUMNS, rows)


if __name__ == "__main__":
    main()
