"""A run of the small-scale study: 128 tokens, 512 ids, float32; `megatron-dlm scaling plan` sets its size."""

from pathlib import Path

from megatron_dlm.checkpointing.layout import CheckpointConfig
from megatron_dlm.data.loading.data_config import DataConfig
from megatron_dlm.families.mdlm.objective import MDLMConfig
from megatron_dlm.models.config import ModelConfig
from megatron_dlm.run.config import EvaluationConfig, RunConfig, TelemetryConfig, TrainingConfig
from megatron_dlm.run.lr_schedule import LrScheduleConfig


def recipe() -> RunConfig:
    """MDLM with the low-variance loss, as the paper trains it."""
    return RunConfig(
        directory=Path("runs/small-scale-study/mdlm"),
        # The paper's 128 channels of conditioning would be most of models as small as these.
        model=ModelConfig(
            num_layers=4,
            hidden_size=96,
            num_attention_heads=3,
            ffn_hidden_size=384,
            conditioning_size=16,
        ),
        objective=MDLMConfig(),
        data=DataConfig(
            train=("runs/small-scale-study/data/train",),
            validation="runs/small-scale-study/data/held-out",
            seq_length=128,
        ),
        training=TrainingConfig(num_steps=1000, global_batch_size=16, micro_batch_size=16, recompute="none"),
        schedule=LrScheduleConfig(lr=3e-3, min_lr=3e-4, warmup_steps=50, decay_steps=1000),
        # Once before the first step and once after the last, on the same 131,072 tokens and noise.
        evaluation=EvaluationConfig(every=1_000_000, num_batches=16, batch_size=64),
        checkpoint=CheckpointConfig(save_every=500, keep_last=1),
        telemetry=TelemetryConfig(log_every=50),
    )
