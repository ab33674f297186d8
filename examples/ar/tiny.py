"""AR of about 3.7M body parameters for a laptop; a larger learning rate and shorter warm-up than the paper's."""

from pathlib import Path

from megatron_dlm.checkpointing.storage import CheckpointConfig
from megatron_dlm.data.loader import DataConfig
from megatron_dlm.models.config import ModelConfig
from megatron_dlm.objectives.ar import ARConfig
from megatron_dlm.training.lr_schedule import LrScheduleConfig
from megatron_dlm.training.run_config import EvaluationConfig, RunConfig, TrainingConfig


def recipe() -> RunConfig:
    """The run; data prefixes are those that examples/quickstart.sh makes."""
    return RunConfig(
        directory=Path("runs/ar-tiny"),
        model=ModelConfig(num_layers=4, hidden_size=256, num_attention_heads=4, ffn_hidden_size=1024),
        objective=ARConfig(),
        data=DataConfig(
            train=Path("runs/quickstart/data/train"),
            validation=Path("runs/quickstart/data/validation"),
            seq_length=256,
        ),
        training=TrainingConfig(num_steps=400, global_batch_size=16, micro_batch_size=16),
        schedule=LrScheduleConfig(lr=3e-3, min_lr=3e-4, warmup_steps=30, decay_steps=400),
        evaluation=EvaluationConfig(every=200, num_batches=4, batch_size=64),
        checkpoint=CheckpointConfig(save_every=100, keep_last=2),
    )
