"""torchrun as examples/torchrun/train.sh starts it: same arguments, one line instead of a traceback.

It ends with the exit code of the first worker that failed, and passes signals on to the workers and waits for
them as long as their save takes; torchrun itself kills them after 30 s.
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
from megatron_dlm.platform.signal_thread import handle_in_thread, job_signals

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Environment variable of a worker with the file in which torchrun looks for its error."""
EXIT_UNSTARTED = 3
"""Exit code where a signal comes before there are workers, as that of a run stopped before its first step."""


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
    from torch.distributed.run import parse_args, run

    # It names every worker that ends with a code, a stop that was asked for too.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    # The other signals are passed on here.
    options = parse_args(["--signals-to-handle", "SIGQUIT", *arguments])
    try:
        run(options)
    except ChildFailedError as error:
        return _tell_of_failure(error)
    except SignalException as stop:
        return 128 + stop.sigval
    except (DistError, RendezvousError, ValueError) as error:
        return _tell(_describe_meeting(error, options.master_addr, options.master_port), 1)
    return 0


def _tell_of_failure(error: Any) -> int:
    rank, failure = error.get_first_failure()
    code = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    if code == EXIT_UNSTARTED:
        # The run has said so itself.
        return code
    if failure.exitcode < 0:
        return _tell(f"rank {rank} was ended by {signal.Signals(-failure.exitcode).name}", code)
    recorded = failure.error_file_data.get("message")
    message = recorded.get("message") if isinstance(recorded, dict) else "its own output says why"
    return _tell(f"rank {rank} ended with exit code {code}: {message}", code)


def _describe_meeting(error: Exception, address: str, port: int) -> str:
    if "EADDRINUSE" in str(error):
        return f"MASTER_PORT: {port} is in use by another program; set MASTER_PORT to a free one"
    return f"MASTER_ADDR: the nodes have not met at {address}:{port}: {str(error).splitlines()[0]}"


def _tell(message: str, code: int) -> int:
    print(f"torchrun: error: {message}", file=sys.stderr, flush=True)
    return code


def _pass_on(number: int) -> None:
    import psutil

    workers = psutil.Process().children()
    if not workers:
        _tell(f"{signal.Signals(number).name} before all nodes have met: ends", EXIT_UNSTARTED)
        os._exit(EXIT_UNSTARTED)
    for worker in workers:
        with suppress(psutil.NoSuchProcess):
            worker.send_signal(number)


if __name__ == "__main__":
    main()
