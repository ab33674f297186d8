"""Whether a scheduler should start a job again.

    python -m megatron_dlm.cli.requeue STATUS RECIPE [arguments of train]

examples/slurm/train.sh asks it when `train` has ended. Exit code 0: start again; 1: do not; it says why.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_dlm.cli.recipe import recipe_run
from megatron_dlm.interfaces import InputError
from megatron_dlm.platform.exit_codes import EXIT_LOST_RANK, EXIT_PREEMPTED, FIRST_OF_SIGNALS
from megatron_dlm.platform.files import write_json

RECORD = "requeues.json"
"""File in the run's directory."""
MOST_WITHOUT_PROGRESS = 3
"""Starts in a row after which there is no new checkpoint before a job is given up."""


@dataclass(frozen=True)
class Decision:
    """Whether to start again, and why."""

    is_again: bool
    reason: str


def decide(status: int, newest_step: int, record: Path) -> Decision:
    """Decide by a job's exit code and by what it has reached, and count the starts without progress.

    Args:
        status: exit code of the job.
        newest_step: step of the run's newest complete checkpoint; 0: none.
        record: file in which starts are counted; written if the decision is to start again.

    Returns:
        Start again after a signal that the run has saved itself for, or that has killed a process, and after
        a lost rank, but not after errors, nor after 3 starts in a row without a new checkpoint.
    """
    causes = {EXIT_PREEMPTED: "stopped and saved", EXIT_LOST_RANK: "a rank was lost"}
    if status > FIRST_OF_SIGNALS:
        causes[status] = f"killed by signal {status - FIRST_OF_SIGNALS}"
    if status not in causes:
        return Decision(False, f"exit code {status} is an error's, and a new start would end the same way")
    try:
        counted = json.loads(record.read_text(encoding="utf-8"))
        starts = counted["starts"] if counted["step"] == newest_step else 0
    except (OSError, ValueError, KeyError, TypeError):
        starts = 0
    if starts >= MOST_WITHOUT_PROGRESS:
        return Decision(
            False,
            f"{causes[status]}, and {starts} starts from step {newest_step} have made no new checkpoint",
        )
    write_json(record, {"step": newest_step, "starts": starts + 1})
    return Decision(True, f"{causes[status]}; starts again from step {newest_step}")


def main() -> int:
    """Decide and say so; returns the exit code."""
    if len(sys.argv) < 3 or not sys.argv[1].isdigit():
        print(__doc__, file=sys.stderr)
        return 2
    from megatron_dlm.checkpointing.layout import step_of
    from megatron_dlm.run.run_record import checkpoint_root

    status = int(sys.argv[1])
    try:
        config = recipe_run(sys.argv[2:], verb="train")
        complete = checkpoint_root(config).complete()
        newest = step_of(complete[-1]) if complete else 0
        decision = decide(status, newest, config.directory / RECORD)
    except (InputError, OSError) as error:
        decision = Decision(False, str(error))
    again = "starts again" if decision.is_again else "does not start again"
    print(f"train.sh: the job {again}: {decision.reason}", file=sys.stderr)
    return 0 if decision.is_again else 1


if __name__ == "__main__":
    sys.exit(main())
