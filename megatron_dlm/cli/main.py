"""The command `megatron-dlm VERB`: finds the verb's file and turns errors into one line and an exit code.

Exit codes: 0 done, 1 error, 2 bad configuration or usage, and those of platform/exit_codes.py.
"""

from __future__ import annotations

import errno
import importlib
import os
import resource
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from megatron_dlm import __version__
from megatron_dlm.cli.process import output_error, prepare_process
from megatron_dlm.interfaces import InputError, LostRankError, SaveError, TrainingError
from megatron_dlm.platform.exit_codes import (
    EXIT_INTERRUPTED,
    EXIT_LOST_RANK,
    EXIT_PREEMPTED,
    EXIT_SAVE_FAILED,
)

VERBS = {
    "tokenizer": "train a byte-level BPE tokenizer from text",
    "index": "tokenize text files into an indexed shard (.bin, .idx, manifest)",
    "doctor": "look at software, machine, job and recipe, and say what would stop a run",
    "plan": "memory, time and cost of a run on a cluster, for every layout",
    "train": "train a model, or continue a run",
    "watch": "curves and speed of runs in the terminal, while they train or afterwards",
    "checkpoint": "list, inspect, verify or prune the checkpoints of a run",
    "evaluate": "bound (nll), perplexity, gsm8k, lm-eval tasks (harness), quality against speed (pareto)",
    "scaling": "scaling laws: plan a grid of runs, train, collect, fit and draw it",
    "sample": "sample texts from a checkpoint or an exported folder",
    "export": "write a checkpoint as a Hugging Face folder, and compare it with the trained model",
    "import": "turn a Hugging Face folder, or a .ckpt of the paper's code, into a checkpoint",
}

PRINTING_VERBS = ("checkpoint", "doctor", "evaluate", "plan", "sample", "scaling")
"""Verbs whose result is what they print."""

USAGE = f"""usage: megatron-dlm VERB [arguments]

Training of discrete diffusion language models. Version {__version__}.

verbs:
{chr(10).join(f"  {name:<10} {what}" for name, what in VERBS.items())}

`megatron-dlm VERB --help` lists a verb's arguments with their units.
exit codes: 0 done, 1 error, 2 bad configuration or usage, {EXIT_PREEMPTED} stopped by a signal and saved,
{EXIT_LOST_RANK} another rank is gone or hangs, {EXIT_SAVE_FAILED} checkpoints cannot be saved
"""


def main() -> None:
    """Run the verb named by the command line."""
    prepare_process()
    arguments = with_home(sys.argv[1:])
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        sys.exit(0 if arguments else 2)
    if arguments[0] == "--version":
        print(__version__)
        return
    verb = arguments[0]
    if verb not in VERBS:
        fail("megatron-dlm", f"verb: {verb!r} is not one of {', '.join(VERBS)}")
    run_and_exit(
        f"megatron-dlm {verb}",
        lambda: importlib.import_module(f"megatron_dlm.cli.{verb}").run(arguments[1:]),
        result_is_printed=verb in PRINTING_VERBS,
    )


def with_home(arguments: Sequence[str]) -> list[str]:
    """Expand ~ and ~user in `~/path` and `--option=~/path`; a shell leaves it where it is quoted or behind =.

    Args:
        arguments: command-line arguments.

    Returns:
        The arguments; those of a user that is not there stay as they are.
    """
    found = []
    for word in arguments:
        option, equals, value = word.partition("=")
        if word.startswith("--") and equals:
            found.append(f"{option}={os.path.expanduser(value)}")
        else:
            found.append(os.path.expanduser(word))
    return found


def run_and_exit(program: str, action: Callable[[], int], *, result_is_printed: bool = False) -> NoReturn:
    """Exit with the code that `action` returns, or print its error as one line and exit.

    Args:
        program: command and verb.
        action: returns an exit code.
        result_is_printed: whether standard output holds the result, so that losing a part of it is an error.
    """
    prepare_process()
    try:
        code = action()
    except InputError as error:
        fail(program, str(error))
    except SaveError as error:
        fail(program, str(error), exit_code=EXIT_SAVE_FAILED)
    except LostRankError as error:
        fail(program, str(error), exit_code=EXIT_LOST_RANK)
    except TrainingError as error:
        fail(program, str(error), exit_code=1)
    except KeyboardInterrupt:
        fail(program, "interrupted", exit_code=EXIT_INTERRUPTED)
    except OSError as error:
        if error.errno != errno.EMFILE:
            from megatron_dlm.cli.torchrun import record_for_torchrun

            record_for_torchrun(f"{type(error).__name__}: {error}")
            raise
        fail(program, str(error), exit_code=1)
    except Exception as error:
        from megatron_dlm.cli.torchrun import record_for_torchrun

        record_for_torchrun(f"{type(error).__name__}: {error}")
        raise
    if result_is_printed and (lost := output_error()):
        fail(program, f"standard output: {lost.strerror}; a part of the result was not printed", exit_code=1)
    sys.exit(code)


def fail(program: str, message: str, exit_code: int = 2) -> NoReturn:
    """Print one line and exit.

    Before the process group exists, all ranks find the same error, so only rank 0 prints it. What a rank
    alone can find (rank 0 does not answer) is printed by one process of each node.

    Args:
        program: command and verb.
        message: error text, with field, value and rule.
        exit_code: 2 for an error the user can correct, EXIT_LOST_RANK for a lost rank, 1 for any other.
    """
    from megatron_dlm.cli.torchrun import record_for_torchrun
    from megatron_dlm.platform.launch import detect_environment

    torch_distributed = sys.modules.get("torch.distributed")
    if os.strerror(errno.EMFILE) in message:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        message += f"; {limit:,} files may be open at once: raise it with ulimit -n, in its hard limit too"
    started = torch_distributed is not None and torch_distributed.is_initialized()
    try:
        environment = detect_environment()
        rank, is_first_here = environment.rank, environment.local_rank == 0
    except InputError:
        # The environment itself is the fault, and it names no rank.
        rank, is_first_here = 0, True
    message = " ".join(message.split())
    record_for_torchrun(message)
    if started or rank == 0 or (exit_code in (1, EXIT_LOST_RANK) and is_first_here):
        where = f" on rank {rank}" if started or rank else ""
        print(f"{program}: error{where}: {message}", file=sys.stderr, flush=True)
    sys.exit(exit_code)
