"""Runs of the paper (arXiv:2602.15014) and a laptop-sized one; files under examples/ choose among them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron_dlm.checkpointing.layout import CHECKPOINTS, CheckpointConfig
from megatron_dlm.data.loading.data_config import DataConfig
from megatron_dlm.families.base import ObjectiveConfig
from megatron_dlm.interfaces import InputError
from megatron_dlm.models.config import ModelConfig
from megatron_dlm.models.flops.flops_paper import PUBLISHED_VOCABULARY, max_steps, published_forward_flops
from megatron_dlm.models.sizes import PAPER_1_7B, paper_model
from megatron_dlm.run.config import EvaluationConfig, RunConfig, TrainingConfig
from megatron_dlm.run.lr_schedule import LrScheduleConfig

GSM8K_TRAINING_PROBLEMS = 7473
GPU_LOADER_WORKERS = 2
"""Loader workers of each rank on GPUs; a CPU run has no core to spare for them."""


def tiny_run(objective: ObjectiveConfig, *, num_steps: int) -> RunConfig:
    """3.1M body parameters, 256 tokens, for a laptop: a larger learning rate, a shorter warm-up."""
    return RunConfig(
        directory=Path(f"runs/{objective.name}-tiny"),
        model=ModelConfig(num_layers=4, hidden_size=224, num_attention_heads=4, ffn_hidden_size=896),
        objective=objective,
        data=_data(f"runs/quickstart-{objective.name}/data", "held-out", seq_length=256),
        training=TrainingConfig(num_steps=num_steps, global_batch_size=8, micro_batch_size=4),
        schedule=LrScheduleConfig(lr=1e-3, min_lr=1e-4, warmup_steps=20, decay_steps=num_steps),
        evaluation=EvaluationConfig(every=80, num_batches=2, batch_size=64),
        checkpoint=CheckpointConfig(save_every=100, keep_last=2),
    )


def isoflop_run(size: str, objective: ObjectiveConfig, *, budget_flops: float) -> RunConfig:
    """One point of the paper's IsoFLOP grid: 256 samples of 2,048 tokens a step, on 8 GPUs.

    Args:
        size: published name, for example "113M".
        objective: family.
        budget_flops: of the run, by the published count at the paper's 32,001 ids.

    Returns:
        The run.
    """
    config = RunConfig(
        directory=Path(f"runs/{objective.name}-{size.lower()}"),
        model=paper_model(size),
        objective=objective,
        data=_data("data/slim-pajama", "validation", seq_length=2048, workers=GPU_LOADER_WORKERS),
        training=TrainingConfig(
            num_steps=1,
            global_batch_size=256,
            micro_batch_size=32,
            precision="bf16",
        ),
        schedule=LrScheduleConfig(lr=2e-4, min_lr=2e-5),
        evaluation=EvaluationConfig(every=10_000, num_batches=16, batch_size=256),
        checkpoint=CheckpointConfig(save_every=1000, keep_last=2),
    )
    return within_budget(config, budget_flops)


def within_budget(config: RunConfig, budget_flops: float) -> RunConfig:
    """Set a run's number of steps to what a FLOP budget pays for, as in the paper's IsoFLOP runs.

    Args:
        config: run whose model, sequence length and batch size are kept.
        budget_flops: FLOPs of the whole run, by the published count at the paper's 32,001 token ids.

    Returns:
        The run with that many steps, a warm-up over 1% of them (at least 100) and cosine decay over all.

    Raises:
        InputError: the budget is below one step, or the run not longer than its warm-up.
    """
    sequence_flops = published_forward_flops(config.model, PUBLISHED_VOCABULARY, config.data.seq_length)
    if config.training.ramp_start:
        raise InputError("--budget-flops: the published runs have no training.ramp_start")
    num_steps = max_steps(budget_flops, sequence_flops, config.training.global_batch_size)
    warmup_steps = max(num_steps // 100, 100)
    if num_steps <= warmup_steps:
        raise InputError(
            f"budget_flops: {budget_flops:g} pays for {num_steps} steps, not more than the warm-up's "
            f"{warmup_steps}"
        )
    return replace(
        config,
        training=replace(config.training, num_steps=num_steps),
        schedule=replace(config.schedule, warmup_steps=warmup_steps, decay_steps=num_steps),
    )


def decay_branch(config: RunConfig, step: int) -> RunConfig:
    """The run that leaves a run with a constant learning rate at a step, and decays at once.

    Args:
        config: run with a wsd schedule, whose directory has a checkpoint of that step.
        step: optimizer steps done.

    Returns:
        A run in a directory beside it, of the same data, optimizer state and step, that ends with the decay.

    Raises:
        InputError: no wsd schedule, or a step at which the rate is not constant.
    """
    schedule = config.schedule
    if schedule.shape != "wsd":
        raise InputError("--branch-decay-at: schedule.shape is cosine; a branch takes wsd")
    if not schedule.warmup_steps <= step <= schedule.decay_from:
        raise InputError(
            f"--branch-decay-at: at step {step} the learning rate is not constant: it is from step "
            f"{schedule.warmup_steps} to {schedule.decay_from}"
        )
    end = step + schedule.wsd_decay_steps
    return replace(
        config,
        directory=config.directory.with_name(f"{config.directory.name}-decay-{step}"),
        training=replace(config.training, num_steps=end),
        schedule=replace(schedule, decay_steps=end),
        checkpoint=replace(config.checkpoint, branch_from=Path(f"{config.directory}@{step}")),
    )


def phase1_run(objective: ObjectiveConfig) -> RunConfig:
    """The 1.7B model's first 1.05T tokens: 500,000 steps of a cosine made for 1,280,000, on 16 nodes x 8."""
    schedule = LrScheduleConfig(lr=4e-4, min_lr=1e-4, warmup_steps=2000, decay_steps=1_280_000)
    checkpoint = CheckpointConfig(save_every=5000, keep_last=3)
    return _large_run(objective, phase=1, num_steps=500_000, schedule=schedule, checkpoint=checkpoint)


def phase2_run(objective: ObjectiveConfig) -> RunConfig:
    """0.73T more tokens from phase 1's weights, with fresh optimizer, schedule and data, on 16 nodes x 8."""
    schedule = LrScheduleConfig(lr=3e-4, min_lr=4e-5, warmup_steps=2000, decay_steps=350_000)
    start = Path(f"runs/{objective.name}-1.7b-phase1/checkpoints/step-00500000")
    checkpoint = CheckpointConfig(save_every=5000, keep_last=3, initialize_from=start)
    return _large_run(objective, phase=2, num_steps=350_000, schedule=schedule, checkpoint=checkpoint)


def gsm8k_run(objective: ObjectiveConfig) -> RunConfig:
    """Fine-tuning of the 1.7B model on GSM8K's problems with their worked solutions, prompts never noised.

    The nearest documented protocol is SMDM's (arXiv:2410.18514): 256 tokens, batch 256, 40 epochs, learning
    rate 2e-4 to 2e-5 with 1% warm-up, losses divided by the tokens that are no prompt. Its data are about 100
    times GSM8K's training set of 7,473 problems; the steps here are 40 epochs of that set.
    """
    num_steps = 40 * GSM8K_TRAINING_PROBLEMS // 256
    run = phase2_run(objective)
    start = run.directory / CHECKPOINTS / "step-00350000"
    return replace(
        run,
        directory=Path(f"runs/{objective.name}-1.7b-gsm8k"),
        data=_data("data/gsm8k", "held-out", seq_length=256, workers=GPU_LOADER_WORKERS),
        training=replace(run.training, num_steps=num_steps, global_batch_size=256, micro_batch_size=8),
        schedule=LrScheduleConfig(
            lr=2e-4, min_lr=2e-5, warmup_steps=max(1, num_steps // 100), decay_steps=num_steps
        ),
        evaluation=EvaluationConfig(every=200, num_batches=2, batch_size=256),
        checkpoint=CheckpointConfig(save_every=200, keep_last=2, initialize_from=start),
    )


def _large_run(
    objective: ObjectiveConfig,
    *,
    phase: int,
    num_steps: int,
    schedule: LrScheduleConfig,
    checkpoint: CheckpointConfig,
) -> RunConfig:
    return RunConfig(
        directory=Path(f"runs/{objective.name}-1.7b-phase{phase}"),
        model=paper_model(PAPER_1_7B),
        objective=objective,
        data=_data(f"data/nemotron-phase{phase}", "validation", seq_length=2048, workers=GPU_LOADER_WORKERS),
        training=TrainingConfig(
            num_steps=num_steps,
            global_batch_size=1024,
            micro_batch_size=2,
            precision="bf16",
        ),
        schedule=schedule,
        evaluation=EvaluationConfig(every=50_000, num_batches=8, batch_size=1024),
        checkpoint=checkpoint,
    )


def _data(directory: str, validation: str, *, seq_length: int, workers: int = 0) -> DataConfig:
    return DataConfig(
        train=(f"{directory}/train",),
        validation=f"{directory}/{validation}",
        seq_length=seq_length,
        workers=workers,
    )
