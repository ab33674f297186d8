"""Virtual environments with torch and one version of transformers, and nothing else of this one."""

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from tests.helpers.paths import ROOT

PEFT = {"4.51": "peft==0.15.*", "4.57": "peft==0.17.*", "5": "peft>=0.18"}
"""A peft of each version's time."""


def environment_with(version):
    """The interpreter of an environment with transformers of a version, accelerate and peft.

    Args:
        version: key of PEFT.

    Returns:
        Path of its Python.
    """
    directory = ROOT / f".venv-transformers-{version}"
    python = directory / "bin" / "python"
    if not (directory / ".installed").is_file():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(directory)], check=True)
        _link_torch(next(directory.glob("lib/python*/site-packages")))
        words = [str(python), "-m", "pip", "install", "--quiet", "accelerate>=1.3"]
        subprocess.run([*words, f"transformers=={version}.*", PEFT[version]], check=True)
        (directory / ".installed").touch()
    found = [str(python), "-c", "import transformers; print(transformers.__version__)"]
    assert subprocess.check_output(found, text=True).startswith(version)
    return python


def _link_torch(site_packages):
    """Links to the files of torch and of all that it requires, so that it is not installed again."""
    waiting, seen = ["torch", "numpy"], set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            # Of another platform, or optional.
            continue
        waiting += [re.match(r"[\w.-]+", line)[0] for line in found.requires or [] if "extra ==" not in line]
        for top in {file.parts[0] for file in found.files or [] if file.parts[0] != ".."}:
            source, link = Path(found.locate_file(top)), site_packages / top
            if top != "__pycache__" and source.exists() and not link.exists():
                link.symlink_to(source)
