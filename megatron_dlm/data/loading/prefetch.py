"""Batches made ahead of their use, in worker processes.

Not torch's DataLoader: a worker that dies while it writes leaves that waiting for ever, its handler of
SIGCHLD raises in the middle of whatever the program does, and it sends each tensor as an open file in
/dev/shm. Here each worker has a pipe of its own, which ends with it.
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from typing import Any, Generic, TypeVar

import torch

from megatron_dlm.data.loading.tensor_buffer import Layout, pack, unpack, with_tensors, without_tensors
from megatron_dlm.interfaces import InputError, TrainingError
from megatron_dlm.platform.subprocess_lifetime import fork

Request = TypeVar("Request")
Made = TypeVar("Made")

REQUESTS_AHEAD = 2
"""Batches that each worker is asked for ahead of time."""


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
        transfer: Callable[[Iterator[Made]], Iterator[Made]] | None = None,
    ) -> None:
        """`following` guesses the request after one; `transfer` moves what is made to a device, in order."""
        self._make = make
        self._following = following
        self._num_workers = workers
        self._transfer = transfer
        self._expected: Request | None = None
        self._made: Iterator[Made] | None = None
        self._workers: list[_Worker] = []

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
        if not self._num_workers and self._transfer is None:
            return self._make(request)
        if self._made is None or request != self._expected:
            self.close()
            self._made = self._start(request)
        try:
            made = next(self._made)
        except BaseException:
            self.close()
            raise
        self._expected = self._following(request)
        return made

    def close(self) -> None:
        """End the workers at once; all that they have made is not wanted any more."""
        self._made = None
        for worker in self._workers:
            worker.end()
        self._workers = []

    def _requests(self, first: Request) -> Iterator[Request]:
        while True:
            yield first
            first = self._following(first)

    def _start(self, first: Request) -> Iterator[Made]:
        made = self._make_ahead(first) if self._num_workers else map(self._make, self._requests(first))
        return made if self._transfer is None else self._transfer(made)

    def _make_ahead(self, first: Request) -> Iterator[Made]:
        self._workers = [_Worker(self._make) for _ in range(self._num_workers)]
        requests = self._requests(first)
        turns = deque(self._workers * REQUESTS_AHEAD)
        for worker in turns:
            worker.ask(next(requests))
        while True:
            worker = turns[0]
            made = worker.answer()
            worker.ask(next(requests))
            turns.rotate(-1)
            yield made


class _Worker:
    """A process that makes one thing after the other."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        # Forked: nothing is pickled on the way there, and open files stay open.
        self._connection, theirs = multiprocessing.Pipe()
        self._process = fork(_work, theirs, make)
        # Its end of the pipe is then in no other process, and a read ends with the worker.
        theirs.close()
        # Before the interpreter, at its own end, waits for children.
        self.end = Finalize(self, _end, args=(self._process, self._connection), exitpriority=10)

    def ask(self, request: Any) -> None:
        try:
            self._connection.send(request)
        except OSError as error:
            raise self._dead() from error

    def answer(self) -> Any:
        try:
            pickled, layout = self._connection.recv()
            if isinstance(pickled, Exception):
                raise pickled
            buffer = torch.empty(layout.num_bytes, dtype=torch.uint8)
            self._connection.recv_bytes_into(buffer.numpy())
        except (EOFError, OSError) as error:
            raise self._dead() from error
        return with_tensors(pickled, unpack(buffer, layout))

    def _dead(self) -> TrainingError:
        self._process.join()
        code = self._process.exitcode
        return TrainingError(f"data.workers: process {self._process.pid} ended with exit code {code}")


def _end(process: Any, connection: Connection) -> None:
    process.kill()
    process.join()
    connection.close()


def _work(connection: Connection, make: Callable[[Any], Any]) -> None:
    """The worker's life: requests in, what belongs to them out, until it is killed."""
    while True:
        request = connection.recv()
        try:
            pickled, tensors = without_tensors(make(request))
        except InputError as error:
            connection.send((error, None))
        except Exception:
            connection.send((RuntimeError(f"in a loader process:\n{traceback.format_exc()}"), None))
        else:
            layout = Layout.of(tensors)
            connection.send((pickled, layout))
            connection.send_bytes(memoryview(pack(tensors, layout).numpy()))  # type: ignore[arg-type]
