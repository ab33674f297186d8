"""Data-parallel inference: processes that each hold a whole model and share its requests."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from megatron_dlm.interfaces import InputError
from megatron_dlm.platform.failure_report import naming_the_rank_at_fault
from megatron_dlm.platform.launch import detect_environment

T = TypeVar("T")
R = TypeVar("R")
ITEMS_AT_ONCE = 256
"""Most items that a process answers before all exchange answers."""
WAIT_SECONDS = 1800.0
"""Longest time that a process waits for the others, each of which has a batch of requests to answer."""


def all_gather_objects(value: T) -> list[T]:
    """Give each rank of the default process group the values of all; all ranks call it.

    Args:
        value: of this rank; picklable.

    Returns:
        Every rank's value, in rank order.
    """
    import torch.distributed as dist

    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@dataclass(frozen=True)
class Peers:
    """This process among those that share requests."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes for all."""
        return self.rank == 0

    def all_gather_objects(self, value: T) -> list[T]:
        """Every process' value, in rank order; all processes call it.

        Args:
            value: of this process; picklable.

        Returns:
            The values, on every process.
        """
        return [value] if self.world_size == 1 else all_gather_objects(value)

    def share(self, items: Sequence[T], answer: Callable[[Sequence[T]], Sequence[R]]) -> list[R]:
        """Let each process answer an equal part of the items, some at a time; all processes call it.

        Args:
            items: equal on all processes.
            answer: function from some of the items to as many answers.

        Returns:
            Answers of all items in their order, on every process.
        """
        if self.world_size == 1:
            return list(answer(items))
        answers: list[R] = []
        for first in range(0, len(items), ITEMS_AT_ONCE * self.world_size):
            # In rounds: a process that is done earlier would wait for too long for the others.
            some = items[first : first + ITEMS_AT_ONCE * self.world_size]
            parts = self.all_gather_objects(answer(some[self.rank :: self.world_size]))
            answers += [parts[i % self.world_size][i // self.world_size] for i in range(len(some))]
        return answers

    def on_first(self, action: Callable[[], T]) -> T:
        """Do something on rank 0 and give its result to all; all processes call it.

        Args:
            action: function with a picklable result.

        Returns:
            The result.

        Raises:
            InputError: `action` raised it; raised on every process.
        """
        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome = [action(), None]
            except InputError as error:
                outcome = [None, str(error)]
        result, refused = self.all_gather_objects(outcome)[0]
        if refused is not None:
            raise InputError(refused)
        return result

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work of all processes; ends when all are done, or with the name of the one that is lost.

        Yields:
            Nothing.

        Raises:
            LostRankError: another process is gone or hangs.
            TrainingError: another process has failed.
        """
        if self.world_size == 1:
            yield
            return
        import torch.distributed as dist

        # What libraries and this package have to say, the first says.
        loggers = [] if self.is_first else [logging.getLogger(name) for name in (None, "megatron_dlm")]
        levels = [logger.level for logger in loggers]
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with naming_the_rank_at_fault(self.rank, self.world_size):
            yield
            dist.barrier()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        dist.destroy_process_group()


def meet_peers() -> Peers:
    """Start the default process group of all processes that a launcher has started, if there are several.

    Returns:
        This process among them.

    Raises:
        InputError: the launcher's variables are not numbers, or MASTER_PORT is in use.
        LostRankError: not all processes came in time.
    """
    environment = detect_environment()
    if environment.world_size == 1:
        return Peers()
    import torch.distributed as dist

    from megatron_dlm.platform.rendezvous import start_process_group

    if not dist.is_initialized():
        # Only texts and numbers are exchanged, which lie in the host's memory.
        start_process_group(environment, backend="gloo", timeout_seconds=WAIT_SECONDS)
    return Peers(environment.rank, environment.world_size)
