"""Ports for processes of one machine that are about to meet."""

import random
import socket


def free_port() -> int:
    """A port below those the kernel hands out, so that no connection takes it before it is used."""
    while True:
        port = random.SystemRandom().randrange(10_000, 30_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
