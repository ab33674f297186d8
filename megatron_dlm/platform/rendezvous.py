"""How the processes of a job meet: a store on rank 0, and a wait that says for whom and that signals end."""

from __future__ import annotations

import datetime
import errno
import logging
import os
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from megatron_dlm.interfaces import InputError, TrainingError
from megatron_dlm.platform.launch import ProcessEnvironment

if TYPE_CHECKING:
    from torch.distributed import Store

logger = logging.getLogger(__name__)
TOLD_AFTER_SECONDS = 5.0
"""Time after which a waiting process first says so."""
TOLD_EVERY_SECONDS = 30.0
CONNECT_SECONDS = 2.0
"""Longest time of one attempt to connect."""
NAMED_RANKS = 8
"""Most ranks that a line names."""


class Wait:
    """A wait with a limit that is told of now and then."""

    def __init__(self, limit_seconds: float, tell: Callable[[str], None]) -> None:
        self._started_at = time.monotonic()
        self._limit_seconds = limit_seconds
        self._tell_at = TOLD_AFTER_SECONDS
        self._tell = tell

    def go_on(self, whom: Callable[[], str]) -> None:
        """Sleep a little and, where due, tell of the wait.

        Args:
            whom: names who is waited for; called only where that is told.

        Raises:
            TrainingError: the wait has reached its limit.
        """
        waited = time.monotonic() - self._started_at
        if waited >= self._limit_seconds:
            raise TrainingError(
                f"parallel.collective_timeout_seconds: after {self._limit_seconds:,.0f} s still waiting for "
                f"{whom()}"
            )
        if waited >= self._tell_at:
            self._tell_at = waited + TOLD_EVERY_SECONDS
            self._tell(f"waiting for {whom()} since {waited:,.0f} s, at most {self._limit_seconds:,.0f} s")
        # A signal's handler may run meanwhile; the first second is the common case.
        time.sleep(0.01 if waited < 1 else 0.2)


def start_process_group(environment: ProcessEnvironment, *, backend: str, timeout_seconds: float) -> None:
    """Wait until all processes of the job are there and start torch.distributed's default group.

    Args:
        environment: from `detect_environment`.
        backend: "gloo" or "nccl".
        timeout_seconds: how long to wait for the other processes, and how long a collective waits for a peer
            before the job ends.

    Raises:
        InputError: MASTER_PORT is in use by another program.
        TrainingError: not all processes came in time, or rank 0 has ended.
    """
    import torch.distributed as dist

    timeout = datetime.timedelta(seconds=timeout_seconds)
    world_size, rank = environment.world_size, environment.rank
    store = _open_store(environment, timeout_seconds)
    if world_size > 1:
        try:
            _meet(store, environment, timeout_seconds)
        except dist.DistError as error:
            raise TrainingError(f"rank 0 at {_place(environment)} ended while ranks waited") from error
    if environment.local_world_size == world_size:
        # gloo would take the address that the host's name has.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def _place(environment: ProcessEnvironment) -> str:
    return f"{environment.master_addr}:{environment.master_port}"


def _open_store(environment: ProcessEnvironment, timeout_seconds: float) -> Store:
    """The store through which ranks find each other; rank 0 holds it, or torchrun."""
    from torch.distributed import DistError, HashStore, PrefixStore, TCPStore

    timeout = datetime.timedelta(seconds=timeout_seconds)
    address, world_size = (environment.master_addr, environment.master_port), environment.world_size
    if environment.launcher == "single":
        return HashStore()
    of_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if environment.rank or of_torchrun:
        _wait_for_listener(environment, timeout_seconds)
        store = TCPStore(*address, world_size, is_master=False, timeout=timeout)
        if not of_torchrun:
            return store
        # The agent's store outlives a restart and keeps gloo's old addresses (torch 2.13: --max-restarts
        # then hangs); a prefix of its own gives each attempt a clean store.
        return PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    # Over several nodes a name may be the loopback address on its own node.
    one_node = environment.local_world_size == world_size
    listener = _listen(environment) if one_node else None
    try:
        return TCPStore(
            *address,
            world_size,
            is_master=True,
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=listener.detach() if listener else None,
        )
    except DistError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise _port_in_use(environment) from error


def _wait_for_listener(environment: ProcessEnvironment, timeout_seconds: float) -> None:
    """Wait until rank 0, or torchrun, listens; torch's own attempts to connect are deaf to signals."""
    address = (environment.master_addr, environment.master_port)
    wait = Wait(timeout_seconds, logger.warning if environment.local_rank == 0 else logger.debug)
    reason = ""

    def whom() -> str:
        return f"rank 0 at {_place(environment)} ({reason})"

    while True:
        try:
            socket.create_connection(address, timeout=CONNECT_SECONDS).close()
            return
        except OSError as error:
            reason = str(error)
        wait.go_on(whom)


def _meet(store: Store, environment: ProcessEnvironment, timeout_seconds: float) -> None:
    """Wait until each rank has come to the store."""
    store.set(f"arrived/{environment.rank}", socket.gethostname())
    count = store.add("arrived", 1)
    wait = Wait(timeout_seconds, logger.warning if environment.rank == 0 else logger.debug)
    while count < environment.world_size:
        wait.go_on(lambda: _missing(store, environment))
        count = store.add("arrived", 0)


def _missing(store: Store, environment: ProcessEnvironment) -> str:
    ranks = [rank for rank in range(environment.world_size) if not store.check([f"arrived/{rank}"])]
    named = ", ".join(map(str, ranks[:NAMED_RANKS]))
    more = f" and {len(ranks) - NAMED_RANKS} more" if len(ranks) > NAMED_RANKS else ""
    plural = "s" if len(ranks) > 1 else ""
    return f"rank{plural} {named}{more} of {environment.world_size} to come to {_place(environment)}"


def _listen(environment: ProcessEnvironment) -> socket.socket | None:
    """A socket that listens on MASTER_ADDR only; None if torch must listen on all interfaces instead."""
    address = (environment.master_addr, environment.master_port)
    try:
        family, *_, bound = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]
        return socket.create_server(bound, family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise _port_in_use(environment) from error
        # A name of this host that none of its own interfaces has, such as a cluster service's.
        return None


def _port_in_use(environment: ProcessEnvironment) -> InputError:
    return InputError(
        f"MASTER_PORT: {environment.master_port} on {environment.master_addr} is in use by another program"
    )
