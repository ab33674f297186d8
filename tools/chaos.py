"""Trains small models under random faults and compares each with a run that nothing happened to.

    tools/chaos.py --kills 100

Runs of every family, with synchronous and asynchronous saves in turn, are killed (SIGKILL, at any moment or
while a checkpoint is being written, the whole job or one rank), get storms of signals, find the disk full,
and find their newest checkpoint cut or with a flipped byte. Each is started again until it is done; then its
last checkpoint and all its logged losses must be bit for bit those of the undisturbed run. Exit code 1 where
one is not.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.table import Table

from megatron_dlm.checkpointing.layout import CHECKPOINTS, CheckpointRoot
from megatron_dlm.families.registry import OBJECTIVES
from megatron_dlm.run.config import RunConfig
from megatron_dlm.telemetry.writers import read_metrics
from tools import tiny
from tools.ports import free_port

FAMILIES = ("ar", "mdlm", "duo", "esolm")
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
FILE_LIMIT_BYTES = 50_000
"""Room for metrics, not for a checkpoint."""
DEADLINE_SECONDS = 120.0
"""An attempt that takes longer hangs, which is a failure."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tools.preload"])


@dataclass
class Run:
    """One configuration, its undisturbed result, and what happened to its disturbed runs."""

    family: str
    asynchronous: bool
    config: RunConfig
    result: Any = None
    seconds: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    finished: int = 0
    mismatches: list[str] = field(default_factory=list)


def main() -> None:
    """Parse, run, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs to survive, over all runs (100)")
    parser.add_argument("--steps", type=int, default=24, help="optimizer steps of a run (24)")
    parser.add_argument("--processes", type=int, default=2, help="data parallel ranks (2)")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--seed", type=int, default=0, help="of the faults; their moments still vary (0)")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 110)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos-") as directory:
        runs = prepare(Path(directory), arguments)
        disturb(runs, arguments, console)
    console.print(summary(runs))
    kills = sum(run.faults["kill"] + run.faults["kill in a save"] for run in runs)
    inside = sum(run.faults["kill in a save"] for run in runs)
    lost = [text for run in runs for text in run.mismatches]
    print(
        f"{kills} kills, {inside} of them in a save; {sum(run.finished for run in runs)} runs finished, "
        f"{len(lost)} losses, {time.monotonic() - started:.0f} s"
    )
    for text in lost:
        print(text)
    sys.exit(1 if lost else 0)


def prepare(directory: Path, arguments: argparse.Namespace) -> list[Run]:
    """The configurations, each run once undisturbed with synchronous saves."""
    corpus_directory = directory / "corpus"
    corpus_directory.mkdir()
    corpus = tiny.make_corpus(corpus_directory)
    runs = []
    for family in arguments.families:
        base = tiny.run_config(corpus, directory / family, OBJECTIVES[family]())
        base = replace(base, training=replace(base.training, num_steps=arguments.steps))
        checkpoint = replace(base.checkpoint, save_every=1, keep_last=3, on_corrupt="previous")
        for asynchronous, log_every in ((False, 1), (True, 10)):
            # Means over 10 steps: what is summed up so far must survive too.
            logged = replace(base, telemetry=replace(base.telemetry, log_every=log_every))
            whole = replace(logged, directory=directory / f"{family}-{log_every}", checkpoint=checkpoint)
            began = time.monotonic()
            code = attempt(Run(family, False, whole), arguments.processes, None, random.Random(0))
            if code != 0:
                sys.exit(f"{family}: the undisturbed run ended with exit code {code}")
            result, seconds = result_of(whole), time.monotonic() - began
            config = replace(
                logged,
                directory=directory / f"{family}-{asynchronous}",
                checkpoint=replace(checkpoint, async_save=asynchronous),
            )
            runs.append(Run(family, asynchronous, config, result, seconds))
    return runs


def result_of(config: RunConfig) -> Any:
    """What must be equal: every step's logged loss, gradient norm and fingerprint, and the last tensors."""
    steps = {
        entry["step"]: [
            entry[n] for n in ("first_step", "loss", "nats_per_token", "grad_norm", "fingerprint")
        ]
        for entry in read_metrics(config.directory)
        if entry["kind"] == "train"
    }
    final = CheckpointRoot(config.directory / CHECKPOINTS).final(config.training.num_steps)
    return steps, {path.name: path.read_bytes() for path in final.glob("*.distcp")}


def disturb(runs: list[Run], arguments: argparse.Namespace, console: Console) -> None:
    """Disturb one run after the other until enough kills have hit."""
    dice = random.Random(arguments.seed)
    kills, index = 0, 0
    with console.status("") as status:
        while kills < arguments.kills:
            run = runs[index % len(runs)]
            fault = dice.choices(list(FAULTS), weights=[FAULTS[name] for name in FAULTS])[0]
            before = run.faults.total()
            code = attempt(run, arguments.processes, fault, dice)
            kills = sum(r.faults["kill"] + r.faults["kill in a save"] for r in runs)
            status.update(f"{kills}/{arguments.kills} kills; {run.family}: {fault}, exit code {code}")
            if run.faults.total() > before and run.faults.total() % 5 == 0:
                damage_newest(run, dice)
            if code == 0:
                run.finished += 1
                if result_of(run.config) != run.result:
                    run.mismatches.append(f"{run.family}, {fault}: the end is not the undisturbed run's")
                shutil.rmtree(run.config.directory)
                index += 1
            elif code not in (3, 75) and not fault.startswith("kill"):
                run.mismatches.append(f"{run.family}, {fault}: exit code {code}")
                index += 1
        # What is half done is finished too, and compared.
        for run in runs:
            if run.config.directory.exists():
                code = attempt(run, arguments.processes, None, dice)
                run.finished += 1
                if code != 0 or result_of(run.config) != run.result:
                    run.mismatches.append(f"{run.family}: exit code {code}, or another end")


FAULTS = {"kill": 5, "kill in a save": 7, "signals": 1, "full disk": 1}
"""Faults with their weights; damage of files comes after some of them."""


def attempt(run: Run, processes: int, fault: str | None, dice: random.Random) -> int:
    """Start the run, do what `fault` says, wait for the end; the exit code, 0 where all ranks are done."""
    limit = FILE_LIMIT_BYTES if fault == "full disk" else None
    port = free_port()
    ranks = [
        _context.Process(target=train_rank, args=(run.config, rank, processes, port, limit))
        for rank in range(processes)
    ]
    for process in ranks:
        process.start()
    if fault == "kill":
        time.sleep(dice.uniform(0, run.seconds))
        count_kill(run, ranks, dice)
    elif fault == "kill in a save":
        if seen_saving(run.config, ranks, dice.randint(1, 8)):
            time.sleep(dice.uniform(0, 0.03))
            count_kill(run, ranks, dice)
    elif fault == "signals":
        time.sleep(dice.uniform(0.5, 1) * run.seconds)
        for _ in range(5):
            process = dice.choice(ranks)
            if process.pid and process.is_alive():
                os.kill(process.pid, dice.choice(SIGNALS))
        run.faults[fault] += 1
    elif fault:
        run.faults[fault] += 1
    return exit_code(run, ranks)


def seen_saving(config: RunConfig, ranks: list[Any], save: int) -> bool:
    """Wait for the `save`th save to begin; False where the run ends before."""
    seen: set[str] = set()
    while any(process.is_alive() for process in ranks):
        seen |= {path.name for path in temporaries(config)}
        if len(seen) >= save:
            return True
        time.sleep(0.001)
    return False


def temporaries(config: RunConfig) -> list[Path]:
    """Checkpoints that are being written."""
    found = (config.directory / CHECKPOINTS).glob("step-*.tmp")
    return [path for path in found if not path.name.endswith(".old.tmp")]


def count_kill(run: Run, ranks: list[Any], dice: random.Random) -> None:
    """Kill all ranks at once, or one, and see what a save was doing."""
    alive = [process for process in ranks if process.is_alive()]
    if len(alive) < len(ranks):
        return
    for process in alive if dice.random() < 0.7 else [dice.choice(alive)]:
        process.kill()
    for process in ranks:
        process.join(DEADLINE_SECONDS)
    run.faults["kill in a save" if temporaries(run.config) else "kill"] += 1


def damage_newest(run: Run, dice: random.Random) -> None:
    """Cut the newest of at least two checkpoints, or flip one bit of it."""
    complete = CheckpointRoot(run.config.directory / CHECKPOINTS).complete()
    if len(complete) < 2:
        return
    path = dice.choice(sorted(complete[-1].iterdir()))
    content = bytearray(path.read_bytes())
    place = dice.randrange(len(content))
    if dice.random() < 0.5:
        del content[place:]
    else:
        content[place] ^= 1 << dice.randrange(8)
    path.write_bytes(content)
    run.faults["damaged file"] += 1


def exit_code(run: Run, ranks: list[Any]) -> int:
    """First exit code of a rank that is not 0; a rank that hangs is killed and counted as lost."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.exitcode is None:
            run.mismatches.append(f"{run.family}: a rank hung for {DEADLINE_SECONDS:g} s")
            process.kill()
            process.join()
    return next((int(process.exitcode) for process in ranks if process.exitcode), 0)


def train_rank(config: RunConfig, rank: int, processes: int, port: int, file_limit: int | None) -> None:
    """One rank of an attempt; exits as `megatron-dlm train` would."""
    from megatron_dlm.cli.main import run_and_exit
    from megatron_dlm.cli.train import train_and_tell

    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "CUDA_VISIBLE_DEVICES": "",
    }
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    run_and_exit("chaos", lambda: train_and_tell(config))


def summary(runs: list[Run]) -> Table:
    """What happened, by family and kind of save."""
    columns = ["kill", "kill in a save", "signals", "full disk", "damaged file"]
    table = Table("family", "saves", *columns, "finished", "losses")
    for run in runs:
        saves = "asynchronous" if run.asynchronous else "synchronous"
        counts = [str(run.faults[name]) for name in columns]
        table.add_row(run.family, saves, *counts, str(run.finished), str(len(run.mismatches)))
    return table


if __name__ == "__main__":
    main()
