"""AR 1.7B, fine-tuned on GSM8K from phase 2's weights; docs/evaluation.md lists all steps."""

from megatron_dlm.families.ar.objective import ARConfig
from megatron_dlm.run.config import RunConfig
from megatron_dlm.run.presets import gsm8k_run


def recipe() -> RunConfig:
    """The run; override any field on the command line."""
    return gsm8k_run(ARConfig())
