"""Whole training runs in a forked process, with a fault at a chosen moment."""

import os
import shutil
import signal
import time

from tests.helpers.hang import HANG_SECONDS
from tests.helpers.processes import context


def train_in_child(config, fault=None, *arguments, timeout=HANG_SECONDS):
    """`train(config)` after `fault(*arguments)`; exit code, negative for a signal, and standard error."""
    config.directory.mkdir(parents=True, exist_ok=True)
    process = context.Process(target=_train, args=(config, fault, arguments))
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError(f"no end within {timeout} s")
    return process.exitcode, (config.directory / "stderr").read_text()


def _train(config, fault, arguments):
    from megatron_dlm.cli.main import run_and_exit
    from megatron_dlm.cli.train import train_and_tell

    os.dup2(os.open(config.directory / "stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    if fault:
        fault(*arguments)
    run_and_exit("train", lambda: train_and_tell(config))


def _die():
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def _on_call(owner, name, number, action, when=lambda *arguments: True):
    """Do `action` in place of the `number`th call of `owner.name` for which `when` holds."""
    original, calls = getattr(owner, name), []

    def replacement(*arguments, **keywords):
        if when(*arguments):
            calls.append(1)
            if len(calls) == number:
                action()
        return original(*arguments, **keywords)

    setattr(owner, name, replacement)


def die_at(point, save):
    """Kill the process in its `save`th save at a point of the commit protocol."""
    from megatron_dlm.checkpointing import layout, manager
    from megatron_dlm.checkpointing.async_writer import ShareWriter

    def is_manifest(path, value):
        return path.name == layout.MANIFEST

    def is_checkpoint(temporary, final):
        return final.suffix == ""

    if point == "before the common state":
        _on_call(manager, "save_common_state", save, _die)
    elif point == "while tensors are written":
        _on_call(ShareWriter, "start", save, kill_parents_while_writing)
    elif point == "before the index of tensors":
        _on_call(ShareWriter, "write_index", save, _die)
    elif point == "before the manifest":
        _on_call(layout, "write_json", save, _die, is_manifest)
    elif point == "before the rename":
        _on_call(layout, "commit", save, _die, is_checkpoint)
    elif point == "after the rename":
        _on_call(layout.CheckpointRoot, "retain", save, _die)
    elif point == "while an old one is removed":
        _on_call(shutil, "rmtree", 1, _die, lambda path, **_: path.name.endswith(".old.tmp"))
    else:
        raise AssertionError(point)


def slow_down_writers(seconds):
    """Let every writing process sleep before it writes."""
    from megatron_dlm.checkpointing.async_writer import ShareWriter

    original = ShareWriter._write

    def slow(self, *arguments):
        time.sleep(seconds)
        original(self, *arguments)

    ShareWriter._write = slow


def kill_parents_while_writing():
    """Let the next writing process kill the training process when its file is half there."""
    from megatron_dlm.checkpointing import async_writer

    def die(path):
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2)
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)

    async_writer.sha256_of = die


def kill_writers():
    """Let every writing process die before it writes, as the kernel does where memory is short."""
    from megatron_dlm.checkpointing.async_writer import ShareWriter

    ShareWriter._write = lambda self, *arguments: _die()


def small_files(num_bytes):
    """No file may grow beyond this: the portable form of a full disk."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def forbid_writing():
    """From its second save on the checkpoint directory cannot be written, also not by root."""
    from megatron_dlm.checkpointing.layout import CheckpointRoot

    def forbid():
        (checkpoints,) = roots
        checkpoints.chmod(0o555)
        if os.geteuid() == 0:
            os.seteuid(65534)

    roots = set()
    _on_call(CheckpointRoot, "prepare", 1, forbid, lambda root, step: not roots.add(root.path))


def jumping_clock():
    """The time of day jumps by up to a year, both ways, at every look."""
    import itertools

    now = time.time
    jumps = itertools.cycle([0.0, 86_400.0, -31_536_000.0, 3_600.0])
    time.time = lambda: now() + next(jumps)


def signal_at(place, *, again=False):
    """SIGTERM to the process at a place of a run; with `again` a second one later, in the same step."""
    from megatron_dlm.checkpointing.async_writer import ShareWriter
    from megatron_dlm.data.loading import blending
    from megatron_dlm.training import session, signals, train

    def send():
        os.kill(os.getpid(), signal.SIGTERM)
        if again:
            time.sleep(2 * signals.REPEATED_SIGNAL_SECONDS)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

    if again:
        signals.REPEATED_SIGNAL_SECONDS = 0.2
    owner, name, number = {
        "the start": (train, "detect_environment", 1),
        "the resume": (train, "agree_on_start", 1),
        "reading data": (blending.SampleReader, "read", 14),
        "an evaluation": (session.Validation, "run", 2),
        "a save": (ShareWriter, "start", 1),
        "the wait for a writer": (ShareWriter, "wait", 1),
    }[place]
    _on_call(owner, name, number, send)
