"""Prefetches batches in worker processes.

This is not torch's DataLoader, which waits for ever if a worker dies while it writes, whose SIGCHLD handler
raises in the middle of unrelated code, and which sends each tensor as an open file in /dev/shm. Here each
worker has its own pipe, which closes when the worker ends.
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
"""Number of batches that each worker process makes ahead of time."""


class Prefetcher(Generic[Request, Made]):
    """Answers requests for batches, and meanwhile makes the batches expected next in worker processes.

    Results depend on the request alone: after a wrong guess the workers restart from the actual request.
    """

    def __init__(
        self,
        make: Callable[[Request], Made],
        following: Callable[[Request], Request],
        *,
        workers: int,
        transfer: Callable[[Iterator[Made]], Iterator[Made]] | None = None,
    ) -> None:
        """`following`: predicts the next request; `transfer`: moves results to a device, in order."""
        self._make = make
        self._following = following
        self._num_workers = workers
        self._transfer = transfer
        self._expected: Request | None = None
        self._made: Iterator[Made] | None = None
        self._workers: list[_Worker] = []

    def get(self, request: Request) -> Made:
        """The result for a request.

        Args:
            request: argument for `make`.

        Returns:
            The result of `make(request)`.

        Raises:
            InputError: raised by `make`.
            TrainingError: a worker process has died; a worker that only hangs is not detected here.
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
        """Kill the worker processes and discard what they have prefetched."""
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
    """A worker process that answers one request after another."""

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
    """Main loop of a worker process: receive a request, send its result, until the process is killed."""
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
