"""Makes published numbers again: runs the commands of a claim and compares what they give.

python examples/reproduce/reproduce.py                         lists the claims
python examples/reproduce/reproduce.py CLAIM --print           prints its commands
python examples/reproduce/reproduce.py CLAIM                   runs them, from data to figure, at full size
python examples/reproduce/reproduce.py CLAIM --small           the same way in minutes, without a GPU
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rich.console import Console
from rich.table import Table

from examples.reproduce.claims import CLAIMS, Claim, Published

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "data" / "reproduction"
"""Results at full size, from which tools/reproduction_page.py writes the page."""


def main() -> int:
    """Run a claim; the exit code is 0 if its commands ran, whatever their numbers are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    names = {claim.name: claim for claim in CLAIMS}
    parser.add_argument("claim", nargs="?", choices=names, help="what to make again; none: list all")
    parser.add_argument("--small", action="store_true", help="at small scale, on data that are made here")
    parser.add_argument("--print", action="store_true", help="print the commands, run nothing")
    parser.add_argument(
        "--work", type=Path, help="directory to work in (default runs/reproduce, or its small/)"
    )
    parser.add_argument("--from-command", type=int, default=1, metavar="N", help="begin at the Nth command")
    options = parser.parse_args()
    if options.claim is None:
        show_list()
        return 0
    claim = names[options.claim]
    commands = claim.small_commands if options.small else claim.commands
    if options.print:
        print("\n".join(commands))
        return 0
    if not 1 <= options.from_command <= len(commands):
        parser.error(f"--from-command: {options.from_command} is outside [1, {len(commands)}]")
    work = options.work or ROOT / "runs" / "reproduce" / ("small" if options.small else "")
    work = work.resolve()
    prepare(work, small=options.small)
    started = time.time()
    for number, command in enumerate(commands[options.from_command - 1 :], start=options.from_command):
        print(f"[{number}/{len(commands)}] {command}", flush=True)
        code = subprocess.run(words_of(command), cwd=work, env=environment()).returncode
        if code:
            print(
                f"reproduce.py: error: exit code {code}; --from-command {number} goes on here",
                file=sys.stderr,
            )
            return code
    found = read(claim, work)
    show(claim, found)
    record = {
        "claim": claim.name,
        "date": time.strftime("%Y-%m-%d"),
        "hours": round((time.time() - started) / 3600, 2),
        "from_command": options.from_command,
        "commands": commands,
        "found": found,
    }
    target = (work / "results" if options.small else RESULTS) / f"{claim.name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(target)
    return 0


def prepare(work: Path, *, small: bool) -> None:
    """Make the directory, where the paths of the commands hold, and the data of the small commands."""
    work.mkdir(parents=True, exist_ok=True)
    links = ("examples",) if small else ("examples", "data", "gsm8k", "wiki.test.raw", "Llama-2-7b-hf")
    for name in links:
        if (ROOT / name).exists() and not (work / name).exists():
            (work / name).symlink_to(ROOT / name)
    if small:
        script = Path(__file__).with_name("small_data.py")
        subprocess.run([sys.executable, script, work], check=True, env=environment())


def words_of(command: str) -> list[str]:
    """A command's words; the package is that of this Python."""
    words = shlex.split(command)
    return [sys.executable, "-m", "megatron_dlm", *words[1:]] if words[0] == "megatron-dlm" else words


def environment() -> dict[str, str]:
    """The environment, in which this checkout is found."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def read(claim: Claim, work: Path) -> dict[str, float | None]:
    """Our number for each published one; None: it is not there, as at small scale."""
    found: dict[str, float | None] = {}
    for published in claim.values:
        try:
            found[published.label] = published.read(work)
        except (OSError, KeyError, ValueError, StopIteration):
            found[published.label] = None
    return found


def show(claim: Claim, found: dict[str, float | None]) -> None:
    """Print published numbers beside ours."""
    table = Table(
        "", "published", "tolerance", f"ours, {claim.unit}", title=claim.title, title_justify="left"
    )
    for published in claim.values:
        table.add_row(published.label, *cells(claim, published, found[published.label]))
    Console(width=110).print(table)


def cells(claim: Claim, published: Published, ours: float | None) -> tuple[str, str, str]:
    """A published number, its tolerance and ours, as tables have them."""
    if ours is None:
        shown = "not run"
    else:
        differs = published.value is not None and abs(ours - published.value) > published.tolerance
        shown = f"{ours:.{claim.digits}f}" + (", differs" if differs else "")
    if published.value is None:
        return "-", "-", shown
    return f"{published.value:.{claim.digits}f}", f"{published.tolerance:.{claim.digits}f}", shown


def show_list() -> None:
    """Print what can be made again."""
    table = Table("claim", "what", "numbers", "takes")
    for claim in CLAIMS:
        table.add_row(claim.name, claim.title, str(len(claim.values)), claim.needs)
    Console(width=120).print(table)


if __name__ == "__main__":
    sys.exit(main())
