"""The process of a command: its standard streams, its encoding and its limits, set before anything else.

Output that cannot be written, because its reader has left, the disk is full or the terminal is gone, is
dropped; it never ends a command.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import faulthandler
import io
import locale
import logging
import os
import resource
import select
import signal
import sys
from typing import Any, TextIO

OPEN_FILES = 1 << 16
"""Files that a process wants to have open at once: each shard of a blend is one or two."""
STREAM_ENCODING = "MEGATRON_DLM_STREAM_ENCODING"
"""Encoding of the terminal, passed on when a command starts again in UTF-8 mode."""
LOGGER = "megatron_dlm"


class LossyFile(io.FileIO):
    """A file whose writes do not fail: what cannot be written is dropped, and the first error kept."""

    error: OSError | None = None

    def write(self, data: Any, /) -> int:
        """Write, or drop `data`; a pipe that does not block is waited for.

        Args:
            data: bytes.

        Returns:
            Number of bytes written, or dropped.
        """
        try:
            while (written := super().write(data)) is None:
                select.select([], [self], [], 1.0)
        except OSError as error:
            self.error = self.error or error
            return len(data)
        return written


class Lines(logging.Handler):
    """Prints each message as one line on stderr, or on stdout if it is no warning and that is asked for."""

    def __init__(self, *, on_stdout: bool) -> None:
        super().__init__()
        self._on_stdout = on_stdout

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message; the streams are looked up each time, since a live line wraps them."""
        on_stdout = self._on_stdout and record.levelno < logging.WARNING
        print(self.format(record), file=sys.stdout if on_stdout else sys.stderr, flush=True)


class LineFormatter(logging.Formatter):
    """`2026-11-27 08:22:18 message`, or without time; warnings begin with `warning: `."""

    def __init__(self, *, with_time: bool) -> None:
        super().__init__("%(asctime)s %(message)s" if with_time else "%(message)s", "%Y-%m-%d %H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Format one message on one line."""
        if record.levelno >= logging.WARNING:
            record.message = f"{record.levelname.lower()}: {record.message}"
        record.message = " ".join(record.message.splitlines())
        return super().formatMessage(record)


def prepare_process() -> None:
    r"""Set the streams, the encoding and the limits of this process; calling it again changes nothing.

    In a locale that is not UTF-8 the process starts again in Python's UTF-8 mode: libraries read their own
    UTF-8 files in the locale's encoding. What it prints keeps the locale's encoding; characters that it lacks
    are printed as \uNNNN.
    """
    _open_standard_descriptors()
    _start_again_in_utf8()
    encoding = os.environ.pop(STREAM_ENCODING, None)
    sys.stdout = _lossy(sys.stdout, 1, encoding)
    sys.stderr = _lossy(sys.stderr, 2, encoding)
    raise_open_files_limit()
    # A signal that otherwise ends a process, and users send it to one that they believe to hang.
    faulthandler.register(signal.SIGUSR2, file=2)
    log_lines(of_run=False)


def log_lines(*, of_run: bool, quiet: bool = False) -> None:
    """Print what this package logs; other packages' logging stays as it is.

    Args:
        of_run: whether the lines are what a run prints, on stdout and with local date and time; what other
            commands log goes to stderr, beside their result.
        quiet: whether only warnings and errors are printed.
    """
    logger = logging.getLogger(LOGGER)
    handler = Lines(on_stdout=of_run)
    handler.setFormatter(LineFormatter(with_time=of_run))
    logger.handlers = [handler]
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    logger.propagate = False


def output_error() -> OSError | None:
    """What kept standard output from being written in full; None if it was, or if its reader has left."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    error = raw.error if isinstance(raw, LossyFile) else None
    return None if error is None or error.errno == errno.EPIPE else error


def raise_open_files_limit() -> None:
    """Let this process and its children open OPEN_FILES files, or as many as the hard limit allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _open_standard_descriptors() -> None:
    """Open /dev/null in place of closed standard streams, so that no other file gets their descriptors."""
    for descriptor, mode in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            # The lowest free descriptor is this one.
            os.open(os.devnull, mode)


def _start_again_in_utf8() -> None:
    encoding = locale.getpreferredencoding(False)
    if sys.flags.utf8_mode or not sys.executable or codecs.lookup(encoding).name == "utf-8":
        return
    os.environ[STREAM_ENCODING] = sys.stdout.encoding if sys.stdout else encoding
    # Of the processes that it starts.
    os.environ["PYTHONUTF8"] = "1"
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def _lossy(stream: TextIO | None, descriptor: int, encoding: str | None) -> TextIO:
    """`stream` with writes that do not fail; as it is if it was replaced by another program's."""
    if stream is None:
        # It was closed when the interpreter started.
        return open(descriptor, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    if not isinstance(stream, io.TextIOWrapper) or _descriptor(stream) != descriptor:
        return stream
    if isinstance(getattr(stream.buffer, "raw", None), LossyFile):
        return stream
    with contextlib.suppress(OSError):
        stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(LossyFile(descriptor, "wb", closefd=False)),
        encoding=encoding or stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering or stream.write_through,
    )


def _descriptor(stream: TextIO) -> int | None:
    """File descriptor of a stream; None if it has none."""
    try:
        return stream.fileno()
    except (OSError, ValueError):
        return None
