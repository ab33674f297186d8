"""A Slurm cluster of two nodes on this machine: no root, nothing installed, nothing left running.

Its programs are those on PATH, or Debian's packages, fetched with apt-get and unpacked in a cache.
"""

import getpass
import os
import shutil
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.helpers.hang import HANG_SECONDS
from tools.ports import free_port

PACKAGES = (
    *("slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins"),
    *("libhwloc15", "liblua5.1-0", "libmunge2"),
)
NODES = ("n1", "n2")


class SlurmMissingError(Exception):
    """Slurm is neither installed nor to be had; says why."""


@dataclass(frozen=True)
class Programs:
    """How Slurm's programs are found and run."""

    environment: dict[str, str]
    settings: dict[str, str]
    """Lines of slurm.conf that they need."""

    def path(self, name):
        return shutil.which(name, path=self.environment["PATH"])


def find_programs(cache):
    """Slurm's programs.

    Args:
        cache: directory for what is fetched; later calls find it there.

    Returns:
        Programs that run here.

    Raises:
        SlurmMissingError: not on PATH, and the packages cannot be fetched or do not run here.
    """
    # Daemons may be where only root's PATH leads.
    programs = Programs(os.environ | {"PATH": f"{os.environ['PATH']}:/usr/sbin"}, {})
    if not programs.path("slurmctld"):
        root = cache / "root"
        if not root.exists():
            _fetch(root)
        programs = _unpacked_programs(root)
    for name in ("slurmctld", "slurmd"):
        _run_or_miss([name, "-V"], env=programs.environment)
    return programs


def _fetch(root):
    """Download and unpack the packages; `root` is complete or absent."""
    with tempfile.TemporaryDirectory(dir=root.parent) as name:
        scratch = Path(name)
        (scratch / "lists" / "partial").mkdir(parents=True)
        # Package lists of our own: the machine's may be missing or old, and only root may renew them.
        own = {"Dir::State::Lists": scratch / "lists", "Dir::Cache": scratch, "APT::Sandbox::User": "root"}
        apt_get = ["apt-get", "--quiet", *(f"--option={option}={value}" for option, value in own.items())]
        _run_or_miss([*apt_get, "update"])
        _run_or_miss([*apt_get, "download", *PACKAGES], cwd=scratch)
        for package in scratch.glob("*.deb"):
            _run_or_miss(["dpkg-deb", "-x", package, scratch / "root"])
        for program in (scratch / "root" / "usr" / "sbin").glob("*-wlm"):
            program.rename(program.with_name(program.name.removesuffix("-wlm")))
        (scratch / "root").rename(root)


def _run_or_miss(command, **options):
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=HANG_SECONDS, **options)
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        raise SlurmMissingError(f"no Slurm on PATH, none to be had: {command[0]}: {said.strip()}") from error


def _unpacked_programs(root):
    plugins = next(root.glob("usr/lib/*/slurm-wlm"))
    libraries = (str(plugins), str(plugins.parent), os.environ.get("LD_LIBRARY_PATH"))
    paths = {
        "PATH": f"{root}/usr/bin:{root}/usr/sbin:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": ":".join(filter(None, libraries)),
    }
    return Programs(os.environ | paths, {"PluginDir": str(plugins)})


class Slurm:
    """A controller and the daemons of two nodes, both this machine; a context manager."""

    def __init__(self, programs, directory):
        """Write the configuration.

        Args:
            programs: from `find_programs`.
            directory: for state and logs; empty.
        """
        self._directory = directory
        self._configuration = directory / "slurm.conf"
        self._configuration.write_text(_configuration(programs, directory))
        # The plugin that asks nothing of the machine as long as no other one uses cgroups.
        (directory / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        self._environment = programs.environment | {"SLURM_CONF": str(self._configuration)}
        # A copy of our own: it writes its title over its environment, so its path alone tells whose it is.
        self._slurmstepd = str(shutil.copy(programs.path("slurmstepd"), directory))
        self._commands = {"slurmctld": ["slurmctld", "-D"]}
        for node in NODES:
            self._commands[node] = ["slurmd", "-D", "-N", node, "-d", self._slurmstepd]
        self._daemons = []

    def __enter__(self):
        for name, command in self._commands.items():
            with self._log(name).open("w") as log:
                self._daemons.append(
                    subprocess.Popen(command, env=self._environment, stdout=log, stderr=subprocess.STDOUT)
                )
        try:
            self.wait_until(
                lambda: self.run("sinfo", "-h", "-o", "%D %T", check=False) == "2 idle\n", "nodes"
            )
        except BaseException:
            print(self.logs())
            self._stop()
            raise
        return self

    def __exit__(self, *exception):
        self._stop()

    def _stop(self):
        for daemon in self._daemons:
            daemon.kill()
            daemon.wait()
        deadline = time.monotonic() + 20
        # More than once: what is there may fork before it dies.
        while processes := self.processes():
            assert time.monotonic() < deadline, processes
            for process in processes:
                process.kill()
            time.sleep(0.1)

    def processes(self):
        """Those of the cluster and its jobs."""
        return list(filter(self._owns, psutil.process_iter()))

    def _owns(self, process):
        try:
            configuration = process.environ().get("SLURM_CONF")
            return configuration == str(self._configuration) or process.exe() == self._slurmstepd
        except psutil.Error:
            # It has ended, or is somebody else's.
            return False

    def run(self, *command, check=True, **environment):
        """Run one of Slurm's commands; returns what it prints."""
        finished = subprocess.run(
            list(map(str, command)),
            env=self._environment | environment,
            capture_output=True,
            text=True,
            timeout=HANG_SECONDS,
        )
        assert finished.returncode == 0 or not check, f"{command}: {finished.stderr}"
        return finished.stdout

    def start(self, *command, **environment):
        """Start one of Slurm's commands, in a session of its own, with all it prints in one pipe."""
        return subprocess.Popen(
            list(map(str, command)),
            env=self._environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def job(self, number):
        """What Slurm tells of a job, by its own names."""
        words = self.run("scontrol", "show", "job", number, "--oneliner").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for_job(self, number, seconds=HANG_SECONDS, **fields):
        """Return when all `fields` have these values."""
        self.wait_until(
            lambda: fields.items() <= self.job(number).items(), f"job {number}: {fields}", seconds
        )

    def wait_until(self, reached, what, seconds=HANG_SECONDS):
        """Return when `reached()` is true; fail where it takes longer."""
        deadline = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
            time.sleep(0.2)

    def _log(self, name):
        return self._directory / f"{name}.log"

    def logs(self):
        """What the daemons and the scheduler say now."""
        parts = [f"--- {name}\n{self._log(name).read_text()}" for name in self._commands]
        return "\n".join([*parts, "--- jobs", self.run("scontrol", "show", "job", check=False)])


def _configuration(programs, directory):
    host, user = socket.gethostname().split(".")[0], getpass.getuser()
    settings = programs.settings | {
        "ClusterName": "test",
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmctldPort": free_port(),
        "SlurmUser": user,
        "SlurmdUser": user,
        "AuthType": "auth/none",
        "CredType": "cred/none",
        "StateSaveLocation": directory / "state",
        "SlurmdSpoolDir": directory / "spool-%n",
        "SlurmctldPidFile": directory / "slurmctld.pid",
        "SlurmdPidFile": directory / "slurmd-%n.pid",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "MailProg": "/bin/true",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core",
        # Nodes have the cores that stand below, not the machine's.
        "SlurmdParameters": "config_overrides",
        "KillWait": 10,
        # The port where ranks meet follows from it; two clusters on a machine shall not share one.
        "FirstJobId": free_port(),
    }
    lines = [f"{name}={value}" for name, value in settings.items()]
    for node in NODES:
        lines.append(f"NodeName={node} NodeAddr=127.0.0.1 NodeHostname={host} Port={free_port()} CPUs=2")
    return "\n".join([*lines, "PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP", ""])
