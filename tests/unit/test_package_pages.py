"""Each package has a page with its five most important names, which exist, and an example that fits them."""

import ast
import inspect
import re
from importlib import import_module

import pytest

from tests.helpers.paths import ROOT

PACKAGES = sorted(path.parent.name for path in (ROOT / "megatron_dlm").glob("*/__init__.py"))
ALONE = ("diffusion", "models", "platform")
"""Packages whose example needs no data, model or GPU."""
ELSEWHERE = ("tools/checkpoint/convert.py",)
"""Files of Megatron-LM that pages speak of."""


def page(package):
    return (ROOT / "docs" / "packages" / f"{package}.md").read_text()


def named(path):
    """What a dotted name under megatron_dlm stands for."""
    module, _, name = path.rpartition(".")
    return getattr(import_module(f"megatron_dlm.{module}"), name)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_page_has_five_names_that_exist(package):
    if package == "kernels":
        pytest.importorskip("triton")
    names = re.findall(r"^\| `([\w.]+)` \| (\S.*) \|$", page(package), re.MULTILINE)
    assert len(names) == 5
    for name, _ in names:
        assert name.startswith(f"{package}.")
        assert inspect.getdoc(named(name)) or isinstance(named(name), dict), name


@pytest.mark.parametrize("package", PACKAGES)
def test_an_example_imports_what_is_there(package):
    if package == "kernels":
        pytest.importorskip("triton")
    for code in re.findall(r"```python\n(.*?)```", page(package), re.DOTALL):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("megatron_dlm"):
                module = import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), node.module
        if package in ALONE:
            exec(code, {})


def test_the_list_of_packages_is_complete():
    listed = re.findall(r"^\| \[(\w+)\]\(\1\.md\)", page("README"), re.MULTILINE)
    assert sorted(listed) == PACKAGES


def test_every_link_between_pages_leads_somewhere():
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "tests" / "data" / "README.md"]:
        for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", path.read_text()):
            assert (path.parent / target).exists(), f"{path}: {target}"


def test_every_file_that_a_page_or_a_docstring_names_is_there():
    named_file = re.compile(
        r"(?<![\w/.])(?:tests|tools|megatron_dlm|examples|docs)/[\w/.-]+\.(?:py|sh|npz|csv|md)\b"
    )
    places = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    places += [
        path for folder in ("megatron_dlm", "tools", "tests") for path in (ROOT / folder).rglob("*.py")
    ]
    missing = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in places
        for name in named_file.findall(path.read_text())
        if not (ROOT / name).exists() and name not in ELSEWHERE and "/FAMILY/" not in name
    }
    assert not missing, sorted(missing)
