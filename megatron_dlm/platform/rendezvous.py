"""How the processes of a job meet: a store on rank 0, and a wait that says for whom and that signals end."""

from __future__ import annotations

import datetime
import errno
import ipaddress
import logging
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from megatron_dlm.interfaces import InputError, LostRankError
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
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
"""Environment variable with the network interface that gloo takes, in place of that which the host's name
has: on many hosts that is the loopback interface, which other hosts cannot reach."""
ENDED, ENDED_SEEN, DONE = "job/ended", "job/ended/seen", "done"
"""Keys of the store, and the value of the first where the run has reached its last step."""
IDLE_SECONDS = 0.5
"""Time between two looks of an idle process."""
SILENCE_SECONDS = 15.0
"""Time without a sign of life from the host of a store after which the connection is given up;
below the time that a failed rank gives its report."""
ATTEMPT = "MEGATRON_DLM_ATTEMPT"
"""Environment variable with a name that the processes of one start of a job share, set by our torchrun."""


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
            LostRankError: the wait has reached its limit.
        """
        waited = time.monotonic() - self._started_at
        if waited >= self._limit_seconds:
            raise LostRankError(
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
        LostRankError: not all processes came in time, or rank 0 has ended.
    """
    import torch.distributed as dist

    timeout = datetime.timedelta(seconds=timeout_seconds)
    world_size, rank = environment.world_size, environment.rank
    store = _open_store(environment, timeout_seconds)
    if world_size > 1:
        bound_silence(environment.master_port)
        try:
            _meet(store, environment, timeout_seconds)
        except dist.DistError as error:
            raise LostRankError(f"rank 0 at {_place(environment)} ended while ranks waited") from error
    if environment.is_on_one_node:
        os.environ.setdefault(GLOO_INTERFACE, "lo")
    elif backend == "gloo" and GLOO_INTERFACE not in os.environ and (name := _interface(store, environment)):
        os.environ[GLOO_INTERFACE] = name
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def wait_for_the_end(environment: ProcessEnvironment, timeout_seconds: float) -> bool:
    """Wait, as a process that has no part in the work, until rank 0 says that the job has ended.

    Args:
        environment: from `detect_environment`.
        timeout_seconds: how long to wait for rank 0 to be there.

    Returns:
        What rank 0 gave to `report_end`.

    Raises:
        LostRankError: rank 0 has ended without a word, or did not come in time.
    """
    import torch.distributed as dist

    store = _open_store(environment, timeout_seconds)
    bound_silence(environment.master_port)
    try:
        while not store.check([ENDED]):
            time.sleep(IDLE_SECONDS)
        is_done = store.get(ENDED).decode() == DONE
        store.add(ENDED_SEEN, 1)
    except dist.DistError as error:
        raise LostRankError(f"rank 0 at {_place(environment)} ended while this rank was idle") from error
    return is_done


def report_end(*, is_done: bool, idle_ranks: int) -> None:
    """Tell idle processes that the job has ended, and wait until they know; rank 0 calls it.

    Args:
        is_done: whether the run has reached its last step; else it was asked to stop.
        idle_ranks: number of processes in `wait_for_the_end`.
    """
    from torch.distributed.distributed_c10d import _get_default_store

    # The group's own has the group's name before all keys.
    store = _get_default_store().underlying_store  # type: ignore[attr-defined]
    store.set(ENDED, DONE if is_done else "stopped")
    # The store may end with this process; one that was killed while it waited does not hold it up for long.
    deadline = time.monotonic() + 10 * IDLE_SECONDS
    while store.add(ENDED_SEEN, 0) < idle_ranks and time.monotonic() < deadline:
        time.sleep(0.1)


def _interface(store: Store, environment: ProcessEnvironment) -> str | None:
    """Network interface of this host on the way to the others; None if it is not to be found."""
    import psutil

    own = _own_address(environment.master_addr, environment.master_port)
    if not _is_of_others(own):
        # On rank 0's host the way to it is the loopback interface.
        addresses = (store.get(f"address/{rank}").decode() for rank in range(environment.world_size))
        peers = [address for address in addresses if _is_of_others(address)]
        own = _own_address(peers[0], environment.master_port) if peers else ""
    for name, places in psutil.net_if_addrs().items():
        if any(_is_of_others(own) and place.address == own for place in places):
            return name
    return None


def _own_address(host: str, port: int) -> str:
    """Address of this host on the way to another one; empty if there is no way."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Of a datagram socket this only looks the route up.
            probe.connect((host, port))
        except OSError:
            return ""
        return str(probe.getsockname()[0])


def _is_of_others(address: str) -> bool:
    """Whether other hosts can reach an address."""
    return bool(address) and not ipaddress.ip_address(address).is_loopback


def _place(environment: ProcessEnvironment) -> str:
    return f"{environment.master_addr}:{environment.master_port}"


def bound_silence(port: int | None = None) -> None:
    """End this process's connections to a host that answers nothing for SILENCE_SECONDS, not even refusals.

    A host that loses its network or its power sends no end of a connection, and torch's stores wait for it as
    long as the kernel does, 15 minutes and more.

    Args:
        port: of the store; None: all connections that are open now.
    """
    import psutil

    for connection in psutil.Process().net_connections(kind="tcp"):
        # Other threads may close one meanwhile.
        if connection.raddr and port in (None, connection.raddr.port):
            with suppress(OSError), socket.socket(fileno=os.dup(connection.fd)) as own:
                own.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(SILENCE_SECONDS * 1000))
                # Such that a silent wait for an answer is noticed too.
                own.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                own.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, int(SILENCE_SECONDS / 2))
                own.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, int(SILENCE_SECONDS / 4))


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
        attempt = os.environ.get(ATTEMPT) or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return PrefixStore(f"attempt-{attempt}", store)
    # Over several nodes a name may be the loopback address on its own node.
    listener = _listen(environment) if environment.is_on_one_node else None
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
    store.set(f"address/{environment.rank}", _own_address(environment.master_addr, environment.master_port))
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
