"""torchrun as examples/torchrun/train.sh starts it: same arguments, one line instead of a traceback.

It ends with the exit code of the first worker that failed, and passes signals on to the workers and waits for
them as long as their save takes; torchrun itself kills them after 30 s. With `--nnodes 1:2` and c10d
rendezvous the job goes on when nodes are lost, leave or join; see `platform.torchrun_agent.Agent`.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from megatron_dlm.cli.process import prepare_process
from megatron_dlm.platform.exit_codes import EXIT_LOST_RANK, EXIT_PREEMPTED, FIRST_OF_SIGNALS
from megatron_dlm.platform.signal_thread import handle_in_thread, job_signals

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Environment variable of a worker with the file in which torchrun looks for its error."""


def record_for_torchrun(message: str) -> None:
    """Write an error where torchrun's summary of failed workers reads it, if it has started this process.

    Args:
        message: error text.
    """
    path = os.environ.get(ERROR_FILE)
    if path is None:
        return
    # Without a stack, which would be shown in place of the message.
    record = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
    with suppress(OSError):
        Path(path).write_text(json.dumps({"message": record}), encoding="utf-8")


def main() -> NoReturn:
    """Start the workers that the command line describes, and end with their exit code."""
    prepare_process()
    # Each lost connection would be told of in tens of lines, before the one that says what it means.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    handle_in_thread(job_signals(), _pass_on)
    sys.exit(run_workers(sys.argv[1:]))


def run_workers(arguments: Sequence[str]) -> int:
    """Run torchrun.

    Args:
        arguments: torchrun's command line.

    Returns:
        0, the exit code of the first worker that failed, or 128 + n if signal n ended it.
    """
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher import api
    from torch.distributed.run import parse_args, run

    from megatron_dlm.platform.torchrun_agent import Agent

    # It names every worker that ends with a code, a stop that was asked for too.
    for name in ("multiprocessing.api", "agent.server.api", "rendezvous"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    # The other signals are passed on here.
    options = parse_args(["--signals-to-handle", "SIGQUIT", *arguments])
    # Of one machine it makes 1:1.
    Agent.may_resize = ":" in options.nnodes and not options.standalone
    # It offers no other way to choose the agent.
    api.LocalElasticAgent = Agent  # type: ignore[misc]
    try:
        run(options)
    except ChildFailedError as error:
        return _tell_of_failure(error)
    except SignalException as stop:
        # Of torch itself only SIGQUIT is one; the others come from the agent when all workers have saved.
        return FIRST_OF_SIGNALS + stop.sigval if stop.sigval == signal.SIGQUIT else EXIT_PREEMPTED
    except (DistError, RendezvousError, ValueError) as error:
        return _tell_of_meeting(error, options)
    return 0


def _tell_of_failure(error: Any) -> int:
    rank, failure = error.get_first_failure()
    code = failure.exitcode if failure.exitcode > 0 else FIRST_OF_SIGNALS - failure.exitcode
    if code == EXIT_PREEMPTED:
        # The run has said so itself.
        return code
    if failure.exitcode < 0:
        return _tell(f"rank {rank} was ended by {signal.Signals(-failure.exitcode).name}", code)
    recorded = failure.error_file_data.get("message")
    message = recorded.get("message") if isinstance(recorded, dict) else "its own output says why"
    return _tell(f"rank {rank} ended with exit code {code}: {message}", code)


def _tell_of_meeting(error: Exception, options: Any) -> int:
    from torch.distributed.elastic.rendezvous import (
        RendezvousClosedError,
        RendezvousConnectionError,
        RendezvousTimeoutError,
    )

    from megatron_dlm.platform.torchrun_agent import Agent

    place = options.rdzv_endpoint or f"{options.master_addr}:{options.master_port}"
    if "EADDRINUSE" in str(error):
        port = place.rpartition(":")[2]
        return _tell(f"MASTER_PORT: {port} is in use by another program; set MASTER_PORT to a free one", 1)
    if isinstance(error, RendezvousClosedError):
        if not Agent.has_started():
            return _tell("the job has ended before this node has joined it", 0)
        return _tell("another node has ended the job, and says why", 1)
    if isinstance(error, RendezvousTimeoutError):
        return _tell(
            f"--nnodes: {options.nnodes}, and too few nodes have met at {place} in time", EXIT_LOST_RANK
        )
    if isinstance(error, RendezvousConnectionError) and Agent.has_started():
        return _tell(
            f"the node of the rendezvous, {place}, is lost, and the job ends; started again it goes on from "
            "its newest checkpoint",
            EXIT_LOST_RANK,
        )
    return _tell(f"MASTER_ADDR: the nodes have not met at {place}: {str(error).splitlines()[0]}", 1)


def _tell(message: str, code: int) -> int:
    print(f"torchrun: error: {message}", file=sys.stderr, flush=True)
    return code


def _pass_on(number: int) -> None:
    import psutil

    from megatron_dlm.platform.torchrun_agent import Agent

    workers = psutil.Process().children()
    if not workers:
        _tell(f"{signal.Signals(number).name} before all nodes have met: ends", EXIT_PREEMPTED)
        os._exit(EXIT_PREEMPTED)
    if Agent.current is not None:
        Agent.current.take_signal(number)
        if Agent.current.is_stopping:
            return
    for worker in workers:
        with suppress(psutil.NoSuchProcess):
            worker.send_signal(number)


if __name__ == "__main__":
    main()
