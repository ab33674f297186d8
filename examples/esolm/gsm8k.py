"""Eso-LM 1.7B, fine-tuned on GSM8K from phase 2's weights; docs/evaluation.md has the whole way."""

from megatron_dlm.objectives.esolm import EsoLMConfig
from megatron_dlm.training.recipes import gsm8k_run
from megatron_dlm.training.run_config import RunConfig


def recipe() -> RunConfig:
    """The run; override any field on the command line."""
    return gsm8k_run(EsoLMConfig(loss="elbo"))
