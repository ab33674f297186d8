"""The container files: parsed, linted, and executed as far as that goes without a container engine."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers.paths import ROOT

DOCKER = ROOT / "docker"
FILES = sorted(DOCKER.glob("Dockerfile*"))


def instructions(path):
    parser = pytest.importorskip("dockerfile_parse").DockerfileParser
    with path.open("rb") as file:
        return [(each["instruction"], each["value"]) for each in parser(fileobj=file).structure]


def values_of(path, name):
    return [value for instruction, value in instructions(path) if instruction == name]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_hadolint_finds_nothing(path):
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    linted = subprocess.run([hadolint, "--no-color", str(path)], capture_output=True, text=True)
    assert linted.returncode == 0, linted.stdout


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_an_image_is_pinned_not_root_and_without_a_health_check(path):
    names = [name for name, _ in instructions(path)]
    assert values_of(path, "USER") == ["10001"] and "HEALTHCHECK" not in names
    base = (values_of(path, "ARG") if path.name == "Dockerfile" else values_of(path, "FROM"))[0]
    assert re.search(r":[\w.-]*\d", base) and "latest" not in base
    assert names.index("USER") > names.index("RUN")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_is_copied_is_there_and_not_ignored(path):
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {source for value in values_of(path, "COPY") for source in value.split()[:-1]}
    assert copied == allowed
    assert all((ROOT / source).exists() for source in copied)


def test_compose_starts_training_and_tensorboard():
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    assert set(services) == {"train", "tensorboard"}
    train = services["train"]
    assert train["build"] == {"context": "..", "dockerfile": "docker/Dockerfile"}
    assert train["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    script, recipe = train["command"]
    assert (ROOT / script.removeprefix("/opt/megatron-dlm/")).is_file()
    default = re.search(r":-(.*?)}", recipe)[1]
    assert (ROOT / default).is_file()


@pytest.mark.parametrize(("asked", "calls"), [("1", ["doctor --quick", "train x"]), ("0", ["train x"])])
def test_the_entry_point_looks_first_if_asked(tmp_path, asked, calls):
    command = tmp_path / "megatron-dlm"
    command.write_text('#!/bin/sh\necho "$@"\n')
    command.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "MEGATRON_DLM_DOCTOR": asked}
    words = [str(DOCKER / "entrypoint.sh"), "megatron-dlm", "train", "x"]
    ended = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines() == calls


def test_a_failed_look_starts_nothing(tmp_path):
    command = tmp_path / "megatron-dlm"
    command.write_text("#!/bin/sh\nexit 1\n")
    command.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "MEGATRON_DLM_DOCTOR": "1"}
    words = [str(DOCKER / "entrypoint.sh"), "echo", "started"]
    ended = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (1, "")


def test_slurm_runs_tasks_in_a_container():
    environment = os.environ | {"CONTAINER_IMAGE": "nvcr.io#nvidia/x:1", "PYTHON": sys.executable}
    words = [ROOT / "examples/slurm/train.sh", "--dry-run", "examples/mdlm/1.7b.py"]
    told = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    command = told.splitlines()[0].replace("\\", "")
    assert f"--container-image nvcr.io#nvidia/x:1 --container-mounts {ROOT}:{ROOT}" in command


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_cpu_image_s_commands_make_a_working_installation(tmp_path):
    """Its files and its RUN instruction that installs, in a clean virtual environment."""
    path = DOCKER / "Dockerfile.cpu"
    context = tmp_path / "opt"
    for value in values_of(path, "COPY"):
        *sources, target = value.split()
        for source in sources:
            place = context / (f"{target}{source}" if target == "./" else target)
            place.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if (ROOT / source).is_dir() else shutil.copy)(ROOT / source, place)
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"PATH": f"{tmp_path / 'venv' / 'bin'}:/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    (install,) = [value for value in values_of(path, "RUN") if "pip install" in value]
    ended = subprocess.run(
        ["bash", "-c", install], cwd=context, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    (tmp_path / "workspace").mkdir()
    for words in (
        ["megatron-dlm", "plan", str(context / "examples/mdlm/113m.py")],
        ["python", "-c", "import megatron_dlm; print(megatron_dlm.__file__)"],
    ):
        ended = subprocess.run(
            [str(context / "docker" / "entrypoint.sh"), *words],
            cwd=tmp_path / "workspace",
            env=environment | {"MEGATRON_DLM_DOCTOR": "1"},
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert " 0 failed" in ended.stdout
    assert "site-packages" in ended.stdout
