"""What pip does with this package's requirements, by its own resolver on made-up packages, offline."""

import json
import re
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import metadata, requires

import pytest
from packaging.requirements import Requirement

from megatron_dlm.platform import versions

# As NVIDIA's PyTorch image 25.12 has and pins them, in /etc/pip/constraint.txt, where PIP_CONSTRAINT points.
IMAGE = {"torch": "2.10.0a0+b4e4ee81d3.nv25.12", "transformer-engine": "2.10.0+769ed778", "numpy": "2.1.0"}
NEWEST = {"torch": "2.14.1", "transformer-engine": "2.20.2", "numpy": "2.4.0"}


def least(requirement):
    """A version that a requirement takes: its lower bound, or any."""
    found = [s.version for s in requirement.specifier if s.operator in ("==", ">=")]
    return found[0] if found else "1.0"


def wheel(directory, name, version, needs=(), extras=()):
    name = re.sub(r"[-_.]+", "_", name)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Provides-Extra: {extra}" for extra in extras] + [f"Requires-Dist: {need}" for need in needs]
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(directory / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{info}/METADATA", "\n".join(lines) + "\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """Wheels with nothing in them: this package with its real requirements, and what these name."""
    directory = tmp_path_factory.mktemp("wheels")
    needs = requires("megatron-dlm")
    wheel(directory, "megatron-dlm", "0.1.0", needs, metadata("megatron-dlm").get_all("Provides-Extra"))
    for requirement in map(Requirement, needs):
        if requirement.name not in NEWEST:
            wheel(directory, requirement.name, least(requirement))
    extras = ("core-cu12", "core-cu13", "pytorch")
    for version in ("2.9.0", "2.11.0", NEWEST["transformer-engine"]):
        wheel(directory, "transformer-engine", version, extras=extras)
    for version in ("2.9.1", "2.10.0", NEWEST["torch"]):
        wheel(directory, "torch", version)
    wheel(directory, "numpy", NEWEST["numpy"])
    return directory


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """Python of an environment that has what the image has, and its constraints."""
    directory = tmp_path_factory.mktemp("image")
    venv.create(directory / "venv")
    (site,) = (directory / "venv").glob("lib/python*/site-packages")
    for name, version in IMAGE.items():
        wheel(directory, name, version)
    for path in directory.glob("*.whl"):
        zipfile.ZipFile(path).extractall(site)
    constraints = directory / "constraint.txt"
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in IMAGE.items()))
    return directory / "venv" / "bin" / "python", constraints


def installed(python, index, *words):
    """What pip would install, by name, or None where it finds no way."""
    command = [sys.executable, "-m", "pip", "--python", str(python), "--isolated", "install", "--quiet"]
    command += ["--dry-run", "--no-index", "--find-links", str(index), "--report", "-", *map(str, words)]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        assert "No matching distribution" in finished.stderr or "conflict" in finished.stderr, finished.stderr
        return None
    report = json.loads(finished.stdout)["install"]
    return {each["metadata"]["name"].replace("_", "-"): each["metadata"]["version"] for each in report}


@pytest.mark.parametrize(
    "package", ["megatron-dlm[mcore-0.16]", "megatron-dlm[gpu]", "megatron-dlm[gpu,hf,eval]"]
)
def test_an_image_keeps_its_own_builds(index, image, package):
    python, constraints = image
    found = installed(python, index, "--constraint", constraints, package)
    assert found and "megatron-dlm" in found and "megatron-core" in found
    assert not set(found) & set(IMAGE)


def test_a_floor_without_a0_would_not_take_the_image(index, image):
    python, constraints = image
    assert installed(python, index, "--constraint", constraints, "torch>=2.10") is None
    assert installed(python, index, "--constraint", constraints, "torch>=2.10.0a0") == {}


def test_a_bare_host_gets_a_pair_that_fits(index, tmp_path):
    venv.create(tmp_path / "venv")
    found = installed(tmp_path / "venv" / "bin" / "python", index, "megatron-dlm[gpu]")
    assert found["transformer-engine"] == "2.11.0" and found["torch"] == NEWEST["torch"]
    assert found["megatron-core"] == versions.MEGATRON_CORE


@pytest.mark.parametrize("extra", ["cpu", "gpu", "gpu-cu12", "mcore-0.16", "mcore-0.19", ""])
def test_the_newer_megatron_core_comes_only_where_it_is_asked_for_or_nothing_is(extra):
    asked = [r for r in map(Requirement, requires("megatron-dlm")) if r.name == "megatron-core"]
    environment = {"extra": extra, "python_version": "3.12"}
    wanted = [r.specifier for r in asked if r.marker is None or r.marker.evaluate(environment)]
    versions_there = ("0.16.1", "0.16.2", "0.17.0", "0.18.2", "0.19.0", "0.19.2", "0.19.9", "0.20.0")
    taken = {v for v in versions_there if all(specifier.contains(v) for specifier in wanted)}
    newer = {"0.19.2", "0.19.9"}
    expected = {"mcore-0.19": newer, "": {*newer, versions.MEGATRON_CORE}}
    assert taken == expected.get(extra, {versions.MEGATRON_CORE})
    older = environment | {"python_version": "3.11"}
    assert all(r.marker is None or not r.marker.evaluate(older) or "0.16.1" in r.specifier for r in asked)


def test_extras_and_the_check_at_start_say_the_same():
    wanted = [Requirement(text) for text in requires("megatron-dlm")]
    engines = [each for each in wanted if each.name == "transformer-engine"]
    assert {frozenset(each.extras) for each in engines} == {
        frozenset({"core_cu13", "pytorch"}),
        frozenset({"core_cu12", "pytorch"}),
    }
    assert {str(each.specifier) for each in engines} == {"<2.12,>=2.9"}
    assert set(versions.TRANSFORMER_ENGINE.split(",")) == {">=2.9", "<2.12"}
