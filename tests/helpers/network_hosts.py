"""Hosts with addresses and names of their own on this machine: network namespaces, made without root."""

import os
import subprocess
import sys
import time
from contextlib import suppress

import psutil

from tests.helpers.hang import HANG_SECONDS
from tests.helpers.paths import ROOT
from tests.helpers.processes import CPU

NETWORK = "10.77.0"
SPACES = ("--user", "--net", "--mount", "--uts", "--preserve-credentials")


class HostsMissingError(Exception):
    """Namespaces cannot be made here; says why."""


class OnHost:
    """A program on a host, and what it has printed."""

    def __init__(self, process, log):
        self.process, self.pid, self._log, self._read = process, process.pid, log, 0

    def read_until(self, text, seconds=HANG_SECONDS):
        """Output since the last call, up to the first line with `text`; AssertionError where none comes."""
        deadline = time.monotonic() + seconds
        while True:
            has_ended = self.process.poll() is not None
            said = self._log.read_text()[self._read :]
            if text in said:
                length = said.index(text)
                length += said[length:].find("\n") + 1
                self._read += length
                return said[:length]
            assert not has_ended and time.monotonic() < deadline, (
                f"{text!r} did not come\n{self.everything()}"
            )
            time.sleep(0.05)

    def finish(self, seconds=HANG_SECONDS):
        """Exit code, and output since the last call of `read_until`."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"has not ended\n{self.everything()}") from error
        return code, self._log.read_text()[self._read :]

    def everything(self):
        """What all programs on all hosts have printed, but steps."""
        told = []
        for log in sorted(self._log.parent.glob("*.log")):
            lines = [line for line in log.read_text().splitlines() if "train step" not in line]
            told.append("\n".join([f"== {log.stem}", *lines[-60:]]))
        return "\n".join(told)


class Hosts:
    """Some hosts, node0 and so on, at 10.77.0.1 and so on; a context manager. All see the same files."""

    def __init__(self, count, directory):
        """Nothing is made yet.

        Args:
            count: number of hosts.
            directory: for a file of names and the output of programs; empty.
        """
        self._count = count
        self._directory = directory
        self._names = directory / "hosts"
        lines = ["127.0.0.1 localhost", *(f"{NETWORK}.{host + 1} node{host}" for host in range(count))]
        self._names.write_text("\n".join(lines) + "\n")
        self._holders, self._started = [], []

    def __enter__(self):
        try:
            self._bridge = self._hold("unshare", "--user", "--map-root-user", "--net")
            self._on_bridge("ip", "link", "add", "br0", "type", "bridge")
            self._on_bridge("ip", "link", "set", "br0", "up")
            self._hosts = [self._make_host(host) for host in range(self._count)]
        except (OSError, subprocess.CalledProcessError) as error:
            self.__exit__()
            said = getattr(error, "stderr", None) or str(error)
            raise HostsMissingError(f"no network namespaces here: {said.strip()}") from error
        return self

    def __exit__(self, *exception):
        for process in (*self._started, *reversed(self._holders)):
            if process.poll() is None:
                kill_all(process)
            process.wait()
            for stream in filter(None, (process.stdout, process.stderr)):
                stream.close()

    def start(self, host, *words, **environment):
        """A program on a host."""
        enter = ("nsenter", "--target", str(self._hosts[host].pid), *SPACES, f"--wd={ROOT}")
        log = self._directory / f"{len(self._started)}-node{host}.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                [*enter, *map(str, words)],
                env=os.environ | CPU | {"PYTHON": sys.executable} | environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started.append(process)
        return OnHost(process, log)

    def unplug(self, host):
        """Cut a host off; its peers get no answer, not even a refusal."""
        self._on_bridge("ip", "link", "set", f"veth{host}", "down")

    def plug_in(self, host):
        """Connect a host again."""
        self._on_bridge("ip", "link", "set", f"veth{host}", "up")

    def _make_host(self, host):
        holder = self._hold(*self._enter_bridge("--user"), "unshare", "--net", "--mount", "--uts")
        pair = ("type", "veth", "peer", "name", "eth0", "netns", str(holder.pid))
        self._on_bridge("ip", "link", "add", f"veth{host}", *pair)
        self._on_bridge("ip", "link", "set", f"veth{host}", "master", "br0", "up")
        inside = (
            f"hostname node{host} && mount --bind {self._names} /etc/hosts && "
            f"ip addr add {NETWORK}.{host + 1}/24 dev eth0 && ip link set eth0 up && ip link set lo up"
        )
        _run("nsenter", "--target", str(holder.pid), *SPACES, "sh", "-c", inside)
        return holder

    def _hold(self, *words):
        """A process that keeps new namespaces, and has entered them."""
        script = "echo entered; exec sleep infinity"
        holder = subprocess.Popen(
            [*words, "sh", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        if not holder.stdout.readline():
            raise OSError(holder.communicate()[1])
        self._holders.append(holder)
        return holder

    def _enter_bridge(self, *spaces):
        return ("nsenter", "--target", str(self._bridge.pid), *spaces, "--preserve-credentials")

    def _on_bridge(self, *words):
        _run(*self._enter_bridge("--user", "--net"), *words)


def kill_all(process):
    """SIGKILL to a process and to all that it has started, as when a host loses power."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.suspend()
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()


def _run(*words):
    subprocess.run(words, check=True, capture_output=True, text=True)
