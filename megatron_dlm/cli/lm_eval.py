"""`megatron-dlm-lm-eval`: lm-eval's own command line, which then knows the model `megatron-dlm`.

Use: `megatron-dlm-lm-eval --model megatron-dlm --model_args path=FOLDER --tasks arc_easy`. lm-eval finds
models in its registry alone, so that its `lm_eval` command cannot know those of other packages.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import NoReturn

from megatron_dlm.cli.main import run_and_exit
from megatron_dlm.interfaces import InputError


def main() -> NoReturn:
    """Register the model and run lm-eval with all arguments."""
    run_and_exit("megatron-dlm-lm-eval", _run)


def _run() -> int:
    if find_spec("lm_eval") is None:
        raise InputError("needs lm-eval; install megatron-dlm[harness]")
    from lm_eval.__main__ import cli_evaluate

    import megatron_dlm.evaluation.lm_eval_model  # noqa: F401
    from megatron_dlm.platform.launch import detect_environment

    if (processes := detect_environment().world_size) != 1:
        # Its processes would all write the results.
        raise InputError(
            f"started on {processes} processes; megatron-dlm evaluate harness shares tasks among them"
        )

    cli_evaluate()
    return 0
