"""Batches made ahead of their use, in worker processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from megatron_dlm.data.tensor_buffer import Parcel
from megatron_dlm.interfaces import InputError, TrainingError
from megatron_dlm.platform.children import die_with

Request = TypeVar("Request")
Made = TypeVar("Made")


class Prefetcher(Generic[Request, Made]):
    """Makes what is asked for, and meanwhile in worker processes what will probably be asked for next.

    What is asked for alone decides what is made: after a wrong guess the workers begin again from there.
    """

    def __init__(
        self,
        make: Callable[[Request], Made],
        following: Callable[[Request], Request],
        *,
        workers: int,
        carry: Callable[[Iterator[Made]], Iterator[Made]] | None = None,
    ) -> None:
        """`following` guesses the request behind one; `carry` brings what is made to a device, in order."""
        self._make = make
        self._following = following
        self._workers = workers
        self._carry = carry
        self._expected: Request | None = None
        self._made: Iterator[Made] | None = None
        self._processes: list[BaseProcess] = []

    def get(self, request: Request) -> Made:
        """What belongs to a request.

        Args:
            request: says what.

        Returns:
            What `make` gives for it.

        Raises:
            InputError: from `make`.
            TrainingError: a worker is dead; one that only hangs is left to whoever watches the steps.
        """
        if not self._workers and self._carry is None:
            return self._make(request)
        if self._made is None or request != self._expected:
            self.close()
            self._made = self._start(request)
        try:
            made = next(self._made)
        except Exception as error:
            # A worker's end shows in several ways, as a lost connection to its tensors before it is over.
            ended = wait([process.sentinel for process in self._processes], timeout=10.0)
            for process in self._processes:
                if process.sentinel in ended:
                    process.join()
                    raise TrainingError(
                        f"data.workers: process {process.pid} ended with exit code {process.exitcode}"
                    ) from error
            raise
        self._expected = self._following(request)
        return made

    def close(self) -> None:
        """End the workers."""
        self._made = None
        for process in self._processes:
            # All that they have made is not wanted any more; a stopped one would not hear anything else.
            process.kill()
            process.join()
        self._processes = []

    def _requests(self, first: Request) -> Iterator[Request]:
        while True:
            yield first
            first = self._following(first)

    def _start(self, first: Request) -> Iterator[Made]:
        made = self._make_ahead(first) if self._workers else map(self._make, self._requests(first))
        return made if self._carry is None else self._carry(made)

    def _make_ahead(self, first: Request) -> Iterator[Made]:
        parent, others = os.getpid(), multiprocessing.active_children()
        handler = signal.getsignal(signal.SIGCHLD)
        loader: DataLoader[Parcel | InputError] = DataLoader(
            _OnRequest(self._make),
            sampler=self._requests(first),
            batch_size=None,
            num_workers=self._workers,
            collate_fn=_as_it_is,
            worker_init_fn=lambda _: _begin_work(parent),
            # Its own, so that seeds of workers are not drawn from the run's.
            generator=torch.Generator(),
            # Nothing is pickled on the way to the workers, and shards stay mapped.
            multiprocessing_context="fork",
        )
        made = iter(loader)
        # torch's would raise wherever the program is when a worker ends, in the middle of a save too; without
        # it the same is found out by whoever waits for the worker.
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
        self._processes = [child for child in multiprocessing.active_children() if child not in others]
        return map(_opened, made)


class _OnRequest(Dataset[Any]):
    """What a DataLoader asks by request instead of by index."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self._make = make

    def __getitem__(self, request: Any) -> Any:
        try:
            return Parcel(self._make(request))
        except InputError as error:
            # Raised here it would come out with a traceback for its text.
            return error


def _as_it_is(made: Any) -> Any:
    return made


def _opened(made: Parcel | InputError) -> Any:
    if isinstance(made, InputError):
        raise made
    return made.content()


def _begin_work(parent: int) -> None:
    die_with(parent)
    # They come to the whole job; the process of the rank decides what they mean.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
