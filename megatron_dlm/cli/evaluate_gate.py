"""`megatron-dlm evaluate gate A B`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from megatron_dlm.cli.arguments import check_new_file, parse
from megatron_dlm.cli.evaluate_nll import ProgressPrinter, draw_by_time, print_by_time, show_mean
from megatron_dlm.evaluation.nelbo_statistics import BoundConfig
from megatron_dlm.interfaces import InputError
from megatron_dlm.models.precision.fp8 import Fp8Config
from megatron_dlm.platform.parallel_config import ParallelConfig

if TYPE_CHECKING:
    from megatron_dlm.evaluation.nelbo_statistics import Bound
    from megatron_dlm.evaluation.paired_comparison import TrainingDifference

AskedPrecision = Literal["training", "fp32", "bf16", "fp8"]


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """Test whether B is as good as A: two runs, or one checkpoint at two precisions, on equal data and noise.

    Both are scored on the same noisy copies of the same sequences, and the differences are averaged. If A and
    B are the directories of two runs, the bounds logged in training are also compared step by step. The exit
    code is 0 if B is worse by no more than the tolerance with 95% confidence, and 1 otherwise.
    """

    a: Annotated[Path, tyro.conf.Positional]
    """Baseline: a run's directory (its newest checkpoint is scored), RUN@STEP, or a checkpoint directory
    (step-NNNNNNNN)."""
    b: Annotated[Path, tyro.conf.Positional]
    """Run or checkpoint to compare with A; may be the same as A, scored at another precision."""
    precision_a: AskedPrecision = "training"
    """Precision in which A is scored; training: the one it was trained in."""
    precision_b: AskedPrecision = "training"
    """Precision in which B is scored; training: the one it was trained in."""
    fp8: Fp8Config = Fp8Config()
    """FP8 recipe, used where precision_a or precision_b is fp8."""
    tolerance: float = 0.005
    """Largest increase in loss allowed for B over A, in nats per token."""
    data: str | None = None
    """Prefix or URL of the held-out shard; None: the validation shard of A's run, or its first training shard
    if it has none."""
    bound: tyro.conf.OmitArgPrefixes[BoundConfig] = BoundConfig()
    micro_batch_size: int = 8
    """Maximum number of sequences per forward pass."""
    output: Path | None = None
    """JSON file to write with the result; None: only print it."""
    plot: Path | None = None
    """PNG file to write with a plot of the difference by diffusion time; None: no plot."""
    parallel: ParallelConfig = ParallelConfig()

    def __post_init__(self) -> None:
        if not self.tolerance >= 0:
            raise InputError(f"tolerance: {self.tolerance} is not 0 or above")
        if self.micro_batch_size < 1:
            raise InputError(f"micro_batch_size: {self.micro_batch_size} is below 1")
        for name in ("output", "plot"):
            check_new_file(name, getattr(self, name))


def run(arguments: list[str]) -> int:
    """Parse, compare, report; returns the exit code."""
    config = parse(GateConfig, arguments, verb="evaluate gate")
    from megatron_dlm.evaluation.compare_checkpoints import compare_checkpoints, logged_bounds, side
    from megatron_dlm.evaluation.paired_comparison import passes, training_difference
    from megatron_dlm.telemetry.writers import METRICS_FILE

    a, b = (
        side(path, None if asked == "training" else asked, config.fp8)
        for path, asked in ((config.a, config.precision_a), (config.b, config.precision_b))
    )
    first = a.record.config
    if config.plot is not None and not first.objective.has_loss_by_time:
        raise InputError(f"plot: {first.objective.name} as configured has no loss by diffusion time")
    training = None
    if config.a != config.b and all((path / METRICS_FILE).is_file() for path in (config.a, config.b)):
        training = training_difference(*logged_bounds(config.a, config.b))
    bound, difference, is_first = compare_checkpoints(
        a,
        b,
        config.data or first.data.validation or first.data.train[0],
        config.bound,
        config.parallel,
        config.micro_batch_size,
        progress=ProgressPrinter(),
    )
    means = [difference.protocol, *([] if training is None else [training.difference])]
    passed = all(passes(mean, config.tolerance) for mean in means)
    if is_first:
        _report(config, [a.precision, b.precision], bound, difference, training, passed)
    return 0 if passed else 1


def _report(
    config: GateConfig,
    precisions: list[str],
    bound: Bound,
    difference: Bound,
    training: TrainingDifference | None,
    passed: bool,
) -> None:
    from megatron_dlm.platform.files import write_json

    print(f"A {config.a} ({precisions[0]}): {show_mean(bound.protocol)} nats/token")
    print(
        f"B {config.b} ({precisions[1]}) less A: {show_mean(difference.protocol, digits=6)} nats/token; "
        f"{difference.sequences:,} sequences, {difference.tokens:,} tokens, {difference.copies} copies each"
    )
    if training is not None:
        print(
            f"training from step {training.first_step} on, B less A: "
            f"{show_mean(training.difference, digits=6)} nats/token; at most {training.largest:.4f} in a step"
        )
    print_by_time(difference, "B less A", title="difference by diffusion time", number="+.6f")
    verdict = "passed" if passed else "not passed"
    print(f"{verdict}: B may be worse by {config.tolerance} nats/token, with 95% confidence")
    if config.output is not None:
        result = {
            "passed": passed,
            "tolerance": config.tolerance,
            "precisions": precisions,
            "a": asdict(bound.protocol),
            "difference": asdict(difference.protocol),
            "by_time": [asdict(band) for band in difference.by_time],
            "training": None if training is None else asdict(training),
        }
        write_json(config.output, result)
    if config.plot is not None:
        title = f"{config.b.name} less {config.a.name}"
        draw_by_time(difference, config.plot, title=title, of="difference")
