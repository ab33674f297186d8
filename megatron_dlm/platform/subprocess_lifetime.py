"""Child processes that do not outlive their parent, and never touch its GPU."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

JOB_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
"""Signals that ask a job to save and stop; all processes of the job get them, only its ranks react."""
_SET_PARENT_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of prctl(2)."""


def fork(body: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Start a child process, which sees memory as it is now.

    The child ends when its parent does, ignores the job's signals, runs PyTorch on one thread and sees no
    GPU: CUDA cannot be used in a fork of a process that has used it, and libraries that find CUDA available
    would use it. The child's garbage collector leaves alone what the parent has left: some of it holds
    streams, events and recordings of a GPU, and some waits, when it is freed, for threads which a fork does
    not have.

    Args:
        body: function that the child runs; the child ends when it returns.
        *arguments: arguments of `body`; they are not pickled.

    Returns:
        The started child. The caller must close open connections that only the child should hold.
    """
    process = multiprocessing.get_context("fork").Process(
        target=_live, args=(os.getpid(), body, arguments), daemon=True
    )
    # A signal before the child ignores it would end it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)
    # Before the fork: a child may collect garbage before it runs a line of ours.
    gc.freeze()
    try:
        with warnings.catch_warnings():
            # Of threads in the parent: the child touches none of their locks.
            warnings.simplefilter("ignore", DeprecationWarning)
            process.start()
    finally:
        gc.unfreeze()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return process


def start_from_server(preloaded: str, body: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Start a process as a fork of one that has imported a module, and has done nothing else.

    The process is a session of its own, and gets SIGTERM when this process ends, however that ends.

    Args:
        preloaded: module that the fork server imports when it is first asked.
        body: function of a module that the process runs.
        *arguments: arguments of `body`, which are pickled.

    Returns:
        The started process.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preloaded])
    process = context.Process(target=_serve, args=(body, arguments))
    process.start()
    return process


def _serve(body: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    # A signal of the terminal goes to who has started this, and passes it on.
    os.setsid()
    _signal_with_parent(signal.SIGTERM)
    body(*arguments)


def _live(parent: int, body: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    _die_with(parent)
    _leave_job_signals_to_the_parent()
    _see_no_gpu()
    body(*arguments)


def _die_with(parent: int) -> None:
    """End this process where its parent, known from before the fork, ends, however that ends."""
    _signal_with_parent(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _signal_with_parent(number: signal.Signals) -> None:
    """Have this process get a signal when its parent ends, however that ends."""
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, number)


def _leave_job_signals_to_the_parent() -> None:
    """Ignore the job's stop signals; this process ends when its parent tells it to, or with its parent."""
    for number in JOB_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, JOB_SIGNALS)


def _see_no_gpu() -> None:
    """Let whoever asks in this process hear that there is no GPU."""
    # Where CUDA has not been started before the fork, a child could start it.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch = sys.modules.get("torch")
    if torch is None:
        return
    torch.set_num_threads(1)
    for module in (torch.cuda, torch.accelerator):
        module.is_available = lambda: False
        module.device_count = lambda: 0
    torch.accelerator.current_accelerator = lambda check_available=False: None
