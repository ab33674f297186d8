"""Command-line arguments from dataclasses, with every complaint as one line."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from megatron_dlm.interfaces import InputError

T = TypeVar("T")


def parse(declared: type[T], arguments: Sequence[str], *, verb: str, default: T | None = None) -> T:
    """An instance of `declared` from `--field value` arguments.

    Args:
        declared: a frozen dataclass.
        arguments: of the command line.
        verb: shown in the usage.
        default: values the arguments override; required fields must be given where it is None.

    Returns:
        The instance.

    Raises:
        InputError: unknown or missing argument, or a value of the wrong type or range.
    """
    complaint = io.StringIO()
    options: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(complaint):
            try:
                parsed: T = tyro.cli(
                    declared,
                    args=list(arguments),
                    prog=f"megatron-dlm {verb}",
                    config=(tyro.conf.AvoidSubcommands,),
                    **options,
                )
            finally:
                sys.stdout.flush()
            return parsed
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise InputError(_one_line(complaint.getvalue())) from None
    except BrokenPipeError:
        # The help's reader has left, as `head` does; what is still in the buffer goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None


def check_new_file(name: str, path: Path | None) -> None:
    """Refuse, before the work, a file that could not be written after it.

    Args:
        name: of the argument.
        path: None: nothing is written.

    Raises:
        InputError: its directory does not exist, or it is a directory.
    """
    if path is not None and not path.parent.is_dir():
        raise InputError(f"{name}: {path.parent}: no such directory")
    if path is not None and path.is_dir():
        raise InputError(f"{name}: {path} is a directory")


@contextlib.contextmanager
def bad_values() -> Iterator[None]:
    """Complaints of code that exports carry, and that knows no InputError, are the user's input, too."""
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from error


def _one_line(panel: str) -> str:
    """The words of tyro's error panel without its frame and its pointer to --help."""
    words = "".join(" " if character in "│╭╮╰╯─" else character for character in panel).split()
    text = " ".join(words)
    text = text.split("For full helptext")[0].removeprefix("Parsing error").strip()
    # Our own InputError, raised while a section was built, already names its field.
    return re.sub(r"^Value error Error parsing \S+: ", "", text)
