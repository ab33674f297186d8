"""`megatron-dlm evaluate CHECKPOINT`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from megatron_dlm.cli.arguments import parse
from megatron_dlm.interfaces import InputError
from megatron_dlm.platform.parallel import ParallelConfig
from megatron_dlm.training.run_config import EvaluationConfig


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """NELBO (exact NLL for AR) of a checkpoint on held-out data, with fixed noise."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """A step-NNNNNNNN directory."""
    data: str
    """Prefix or URL of the held-out shard."""
    drop_long_records: bool = False
    """Leave out prompts with responses above the model's length, which are refused otherwise."""
    num_batches: int = 16
    """Batches; the shard is read again, with other noise, where it is shorter."""
    batch_size: int = 64
    """Samples of a batch, among which the diffusion times are stratified."""
    micro_batch_size: int = 8
    """Samples of one forward pass."""
    seed: int = 0
    """Of the blocks, times and noise; models are compared at the same seed."""
    output: Path | None = None
    """JSON file for the result."""
    parallel: ParallelConfig = ParallelConfig()


def run(arguments: list[str]) -> int:
    """Parse, evaluate, report; returns the exit code."""
    config = parse(EvaluateConfig, arguments, verb="evaluate")
    from megatron_dlm.platform.files import write_json
    from megatron_dlm.training.use_checkpoint import evaluate_checkpoint

    if config.output is not None and not config.output.parent.is_dir():
        raise InputError(f"output: {config.output.parent}: no such directory")
    evaluation = EvaluationConfig(
        num_batches=config.num_batches, batch_size=config.batch_size, seed=config.seed
    )
    result, is_first = evaluate_checkpoint(
        config.checkpoint,
        config.data,
        evaluation,
        config.parallel,
        config.micro_batch_size,
        drop_long_records=config.drop_long_records,
    )
    if is_first:
        error = "" if result.standard_error is None else f" +- {result.standard_error:.4f}"
        print(
            f"{config.checkpoint}: {result.nats_per_token:.4f}{error} nats/token, "
            f"{result.bits_per_byte:.4f} bits/byte, perplexity {result.perplexity:.2f}, "
            f"{result.tokens:,} tokens"
        )
        if config.output is not None:
            write_json(config.output, asdict(result) | {"perplexity": result.perplexity})
    return 0
