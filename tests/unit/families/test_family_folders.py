"""What is of one family lies in its folder, and nothing outside knows its name."""

import ast
import sys
from pathlib import Path

import pytest

from megatron_dlm.conversion.remote_code import remote_code
from megatron_dlm.families import registry
from megatron_dlm.families.registry import FOLDERS, OBJECTIVES, folder_of, likelihood_of, sampler_of
from megatron_dlm.interfaces import InputError

PACKAGE = Path(registry.__file__).parents[1]
SHIPPED_MAY_IMPORT = {"torch", "numpy", "transformers", "safetensors", *sys.stdlib_module_names}


def trees():
    """Every file outside families/."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if PACKAGE / "families" not in path.parents:
            yield path.relative_to(PACKAGE), ast.parse(path.read_text())


def test_no_family_is_named_outside_its_folder():
    names = {*OBJECTIVES, *FOLDERS}
    found = [
        f"{path}:{node.lineno}: {node.value}"
        for path, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in names
    ]
    assert not found, found


def test_no_family_is_imported_outside_its_folder():
    folders = tuple(f"megatron_dlm.families.{folder}" for folder in FOLDERS)
    found = []
    for path, tree in trees():
        for node in ast.walk(tree):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found += [f"{path}:{node.lineno}: {module}" for module in modules if module.startswith(folders)]
    assert not found, found


def test_folders_and_registry_say_the_same():
    folders = {path.parent.name for path in (PACKAGE / "families").glob("*/objective.py")}
    assert folders == set(FOLDERS)
    for name, config in OBJECTIVES.items():
        assert config.name == name and folder_of(name) == name.replace("-", "_")


def test_a_missing_part_is_one_clear_line(monkeypatch):
    monkeypatch.setitem(registry._OBJECTIVE_IN, "toy", type("Toy", (), {"name": "toy"}))
    for part, of in (("sampler", sampler_of), ("likelihood", likelihood_of)):
        words = f"family toy has no {part}: families/toy/{part}.py is missing"
        with pytest.raises(InputError, match=words):
            of("toy")
        assert all(of(family) for family in OBJECTIVES)
    with pytest.raises(InputError, match="family toy has no sampler"):
        remote_code("toy")
    with pytest.raises(InputError, match="family: 'none' is not one of ar, "):
        sampler_of("none")


@pytest.mark.parametrize("family", OBJECTIVES)
def test_an_export_holds_its_own_family_alone(family):
    files = remote_code(family)
    others = {folder for folder in FOLDERS if folder != folder_of(family)}
    assert not [name for name in files for other in others if name.startswith(f"families_{other}_")]
    assert {f"families_{folder_of(family)}_{part}.py" for part in ("sampler", "likelihood")} <= files.keys()
    # A sampler that replaces tokens needs nothing of those that reveal masked ones, and the other way round.
    replaces = "sampling_replacing.py" in files
    assert replaces != any(
        f"sampling_{name}.py" in files for name in ("unmasking", "decoding_plan", "kv_reader")
    )
    for name, text in files.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert f"{node.module}.py" in files, (name, node.module)
            else:
                modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                for root in {module.split(".")[0] for module in modules}:
                    assert root in SHIPPED_MAY_IMPORT, (name, root)
        assert "import megatron_dlm" not in text and "from megatron_dlm" not in text
