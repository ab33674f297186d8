"""What arXiv:2602.15014 publishes, the commands that make it again, and where their numbers are to be read.

`reproduce.py` runs the commands, `tools/reproduction_page.py` writes docs/reproduction.md.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

FAMILIES = {"ar": "AR", "mdlm": "MDLM", "duo": "Duo", "esolm": "Eso-LM"}
SIZES = "19M 34M 48M 66M 85M 113M 142M 170M 206M 231M 268M 302M 336M 472M 666M 831M 944M 1233M 1476M 2121M"
SMALL = "examples/small-scale-study"
SBATCH = "sbatch --wait -N 16 --gpus-per-node 8 --ntasks-per-node 8"
SMALL_SHAPE = (
    "--model.num-layers 2 --model.hidden-size 32 --model.num-attention-heads 1 --model.ffn-hidden-size 128 "
    "--schedule.warmup-steps 10 --schedule.decay-steps 120"
)


@dataclass(frozen=True)
class Published:
    """One number of the paper."""

    label: str
    value: float | None
    """None: the paper does not say it, and we do."""
    tolerance: float
    """Largest difference with which it counts as reproduced, in the unit of the value."""
    read: Callable[[Path], float]
    """Reads our number in the directory that the commands write to."""


@dataclass(frozen=True)
class Claim:
    """Numbers that are made by the same commands."""

    name: str
    title: str
    source: str
    """Where the paper has them."""
    unit: str
    digits: int
    """Decimal places that are shown."""
    needs: str
    """Data, weights and machines of the full size."""
    commands: tuple[str, ...]
    """At full size."""
    small_commands: tuple[str, ...]
    """The same way on a few megabytes of text, in minutes on two processors; its numbers are its own."""
    values: tuple[Published, ...]


def in_json(file: str, *path: str, **which: object) -> Callable[[Path], float]:
    """A number of a JSON file.

    Args:
        file: the file, in the directory of the commands.
        path: names of the members that lead to the number.
        which: what the element must have of the list that all names but the last lead to; nothing: no list.

    Returns:
        Function from the directory to the number.
    """

    def read(work: Path) -> float:
        found = json.loads((work / file).read_text(encoding="utf-8"))
        for name in path[:-1]:
            found = found[name]
        if which:
            found = next(each for each in found if which.items() <= each.items())
        return float(found[path[-1]])

    return read


def percent(share: Callable[[Path], float]) -> Callable[[Path], float]:
    """What gives a share, in percent."""
    return lambda work: 100 * share(work)


def speed_at(perplexity: float, family: str) -> Callable[[Path], float]:
    """A family's highest tokens/s at a generative perplexity, on lines between its measured points.

    Args:
        perplexity: generative perplexity.
        family: name of the family.

    Returns:
        Function from the directory to the number.
    """

    def read(work: Path) -> float:
        with (work / "speed-quality" / "pareto.csv").open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["family"] == family]
        points = sorted((float(r["generative_perplexity"]), float(r["tokens_per_second"])) for r in rows)
        found = []
        for (low, first), (high, second) in pairwise(points):
            if low <= perplexity <= high and low < high:
                share = math.log(perplexity / low) / math.log(high / low)
                found.append(first * (second / first) ** share)
        return max(found)

    return read


def grid(name: str, recipes: str, options: str, run: str) -> tuple[str, ...]:
    """Commands of a claim's grid of runs, from the plan to the fit."""
    return (
        f"megatron-dlm scaling plan {recipes} --output {name}/grid {options}",
        f"megatron-dlm scaling run {name}/grid {run}",
        f"megatron-dlm scaling collect {name}/grid --output {name}/points.csv",
        f"megatron-dlm scaling fit {name}/points.csv --output {name}/fit.json",
        f"megatron-dlm scaling report {name}/points.csv --output {name}/report",
    )


def full_grid(name: str, recipes: str) -> tuple[str, ...]:
    """The paper's."""
    options = f"--budgets 6e18 1e19 3e19 6e19 1e20 --sizes {SIZES} --sizes-per-budget 7"
    return grid(name, recipes, options, "--launch examples/torchrun/train.sh")


def small_grid(name: str, recipes: str) -> tuple[str, ...]:
    """The same at small scale."""
    options = f"--count actual --least-warmup-steps 5 --sizes-per-budget 5 --guess {SMALL}/guess.json "
    options += "--budgets 1e10 3e10 --sizes 1x8x1 1x16x1 2x16x1 2x24x1 3x32x1"
    return grid(name, recipes, options, "--jobs 2")


def small_models(
    *families: str, runs: str = "runs", data: str = "runs/small-scale-study/data"
) -> tuple[str, ...]:
    """Commands that train a small model of each family."""
    return tuple(
        f"megatron-dlm train {SMALL}/{family}.py --directory {runs}/{family} --training.num-steps 120 "
        f"{SMALL_SHAPE} --data.train {data}/train --data.validation {data}/held-out"
        for family in families
    )


OPTIMA = {
    6e18: (2.857, 3.375, 3.543, 3.599),
    1e19: (2.749, 3.245, 3.420, 3.468),
    3e19: (2.543, 3.042, 3.163, 3.228),
    6e19: (2.433, 2.921, 3.029, 3.089),
    1e20: (2.365, 2.825, 2.938, 3.010),
}
"""Vertex of the IsoFLOP parabola of each family, in nats per token."""
GSM8K = {"ar": 62.9, "mdlm": 58.8, "duo": 65.8, "esolm": 33.4}
CHOICES = {
    "piqa": 62.7,
    "openbookqa": 33.0,
    "arc_easy": 53.4,
    "boolq": 62.8,
    "social_iqa": 39.2,
    "race": 35.0,
}
SPEEDS = {"duo": 288.0, "esolm": 541.0, "mdlm": 108.0}
"""Tokens/s at generative perplexity 120."""

CLAIMS = (
    Claim(
        name="isoflop",
        title="IsoFLOP curves",
        source="IsoFLOP figure, read off; vertex of the parabola of each family and budget",
        unit="nats/token",
        digits=3,
        needs="SlimPajama with Llama 2's tokenizer at data/slim-pajama (docs/data.md); 8 H100 for each run",
        commands=full_grid("isoflop", " ".join(f"examples/{family}/113m.py" for family in FAMILIES)),
        small_commands=small_grid("isoflop", " ".join(f"{SMALL}/{family}.py" for family in FAMILIES)),
        values=tuple(
            Published(
                f"{FAMILIES[family]} at {budget:.0e} FLOPs".replace("e+", "e"),
                loss,
                0.02,
                in_json("isoflop/fit.json", "optima", "nats_per_token", family=family, budget_flops=budget),
            )
            for budget, losses in OPTIMA.items()
            for family, loss in zip(FAMILIES, losses, strict=True)
        ),
    ),
    Claim(
        name="flops-ratio",
        title="FLOPs for equal loss",
        source="ratio of AR's budgets and the family's at the losses of the family's optima, largest budget",
        unit="times AR's",
        digits=1,
        needs="the runs of the IsoFLOP curves",
        commands=("megatron-dlm scaling fit isoflop/points.csv --output flops-ratio/fit.json",),
        small_commands=("megatron-dlm scaling fit isoflop/points.csv --output flops-ratio/fit.json",),
        values=tuple(
            Published(
                FAMILIES[family],
                ratio,
                3.0,
                in_json("flops-ratio/fit.json", "ratios", "ratio", family=family, budget_flops=1e20),
            )
            for family, ratio in (("mdlm", 14.0), ("duo", 22.0))
        ),
    ),
    Claim(
        name="low-variance",
        title="The low-variance loss",
        source="abstract: MDLM with the low-variance loss takes about 12% fewer FLOPs",
        unit="times the FLOPs of training with the bound",
        digits=2,
        needs="as the IsoFLOP curves; the families of this grid are called elbo and mdlm",
        commands=full_grid("low-variance", "elbo=examples/mdlm/113m-elbo.py mdlm=examples/mdlm/113m.py"),
        small_commands=small_grid("low-variance", f"elbo={SMALL}/mdlm_elbo.py mdlm={SMALL}/mdlm.py"),
        values=(
            Published(
                "MDLM, low-variance loss",
                0.88,
                0.04,
                in_json("low-variance/fit.json", "ratios", "ratio", family="mdlm", budget_flops=1e20),
            ),
        ),
    ),
    Claim(
        name="gsm8k",
        title="GSM8K after fine-tuning, at 1.7B",
        source="GSM8K table; the paper's fine-tuning is not published, ours is SMDM's (arXiv:2410.18514)",
        unit="% exact match",
        digits=1,
        needs="Nemotron-like corpora (docs/data.md), gsm8k/train.jsonl and gsm8k/test.jsonl; 16 nodes of 8 "
        "H100 for weeks",
        commands=tuple(
            command.replace("FAMILY", family)
            for family in FAMILIES
            for command in (
                f"{SBATCH} examples/slurm/train.sh examples/FAMILY/1.7b.py",
                f"{SBATCH} examples/slurm/train.sh examples/FAMILY/1.7b-phase2.py",
                "examples/torchrun/train.sh examples/FAMILY/gsm8k.py",
                "megatron-dlm evaluate gsm8k runs/FAMILY-1.7b-gsm8k --data gsm8k/test.jsonl "
                "--output gsm8k/FAMILY",
            )
        ),
        small_commands=(
            *small_models(*FAMILIES, runs="runs/problems", data="problems"),
            *(
                f"megatron-dlm evaluate gsm8k runs/problems/{family} --data problems/test.jsonl --limit 8 "
                f"--output gsm8k/{family}"
                for family in FAMILIES
            ),
        ),
        values=tuple(
            Published(
                FAMILIES[family],
                score,
                2.0,
                percent(in_json(f"gsm8k/{family}/result.json", "exact_match")),
            )
            for family, score in GSM8K.items()
        ),
    ),
    Claim(
        name="choices",
        title="Multiple choice, at 1.7B",
        source="table of likelihood tasks (SMDM's set); which family it is of is not said, MDLM is assumed",
        unit="% accuracy",
        digits=1,
        needs="the 1.7B weights of phase 2; the data sets of lm-evaluation-harness",
        commands=(
            f"megatron-dlm evaluate harness runs/mdlm-1.7b-phase2 --tasks {' '.join(CHOICES)} "
            "--output choices.json",
        ),
        small_commands=(
            *small_models("mdlm"),
            "megatron-dlm evaluate harness runs/mdlm --include-path tasks --tasks small_choice --num-times 4 "
            "--max-copies 8 --output choices.json",
        ),
        values=tuple(
            Published(
                task,
                score,
                2.0,
                percent(in_json("choices.json", "results", task, "acc,none")),
            )
            for task, score in CHOICES.items()
        ),
    ),
    Claim(
        name="speed-quality",
        title="Speed against quality of samples, at 1.7B",
        source="Pareto figure: tokens/s at generative perplexity 120 under Llama 2 7B, read off",
        unit="tokens/s",
        digits=0,
        needs="the 1.7B weights of phase 2, Llama 2 7B at Llama-2-7b-hf, one H100",
        commands=(
            "megatron-dlm evaluate pareto runs/mdlm-1.7b-phase2 runs/duo-1.7b-phase2 runs/esolm-1.7b-phase2 "
            "--judge Llama-2-7b-hf --num-steps 16 32 64 128 256 512 1024 --num-samples 1000 --dtype bf16 "
            "--output speed-quality",
        ),
        small_commands=(
            *small_models("ar", "mdlm", "duo", "esolm"),
            "megatron-dlm evaluate pareto runs/mdlm runs/duo runs/esolm --judge runs/ar --num-steps 2 4 8 "
            "--num-samples 8 --output speed-quality",
        ),
        values=tuple(
            Published(FAMILIES[family], speed, 0.2 * speed, speed_at(120, family))
            for family, speed in SPEEDS.items()
        ),
    ),
    Claim(
        name="zero-shot",
        title="Zero-shot perplexity",
        source="not in the paper; the protocol of windows side by side is MDLM's (arXiv:2406.07524)",
        unit="perplexity of a token",
        digits=1,
        needs="the 1.7B weights of phase 2; WikiText-2 as distributed at wiki.test.raw",
        commands=(
            "megatron-dlm evaluate perplexity runs/mdlm-1.7b-phase2 --text wiki.test.raw "
            "--detokenize wikitext --output zero-shot.json",
        ),
        small_commands=(
            *small_models("mdlm"),
            "megatron-dlm evaluate perplexity runs/mdlm --text text/held-out.jsonl --limit 4 --num-times 4 "
            "--max-copies 8 --output zero-shot.json",
        ),
        values=(Published("MDLM, WikiText-2", None, 0.0, in_json("zero-shot.json", "per_token")),),
    ),
)
