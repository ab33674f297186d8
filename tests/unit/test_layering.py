"""Imports point one way, from the commands down to the platform, in every file of the package."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_dlm"
BELOW = {
    "attention_mask": set(),
    "interfaces": set(),
    "platform": set(),
    "kernels": {"platform"},
    "telemetry": {"platform"},
    "data": {"platform"},
    "diffusion": {"kernels", "platform"},
    "models": {"kernels", "platform"},
    "sampling": {"diffusion", "platform"},
    "families": {"sampling", "diffusion", "platform"},
    "checkpointing": {"models", "platform"},
    "execution": {"families", "diffusion", "models", "data", "platform"},
    "run": {"families", "sampling", "diffusion", "checkpointing", "models", "data", "kernels", "platform"},
}
"""What each package may import, beside itself and interfaces."""
BELOW["conversion"] = {*BELOW["run"], "run", "sampling"}
BELOW["evaluation"] = {*BELOW["conversion"], "conversion", "execution", "telemetry"}
BELOW["training"] = {*BELOW["evaluation"], "evaluation"} - {"sampling"}
BELOW["planning"] = {*BELOW["run"], "run"} - {"checkpointing", "kernels"}
BELOW["doctor"] = {"training", "evaluation", "planning", "run", "models", "platform"}
BELOW["scaling"] = {*BELOW["training"], "training"} - {"sampling", "kernels"}
BELOW["cli"] = {*BELOW["training"], "doctor", "planning", "scaling", "training", "sampling"}
BELOW["__main__"] = {"cli"}
BELOW["__init__"] = set()
FOR_ALL = {"attention_mask", "interfaces", "__version__"}


def imported_modules(path):
    """Dotted names of what a file imports, relative imports resolved."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            # `from megatron_dlm import x` names a package, or __version__.
            yield from (f"{module}.{alias.name}" for alias in node.names)


def test_imports_point_one_way():
    wrong, files = [], sorted(PACKAGE.rglob("*.py"))
    for path in files:
        package = path.relative_to(PACKAGE).with_suffix("").parts[0]
        imported = {name.split(".")[1] for name in imported_modules(path) if name.startswith("megatron_dlm.")}
        for name in sorted(
            imported - BELOW[package] - {package, "attention_mask", "interfaces", "__version__"}
        ):
            wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert not wrong, wrong
    assert len(files) > 150


def test_the_packages_have_an_order():
    """No package is below itself."""
    left = dict(BELOW)
    while left:
        lowest = [name for name, below in left.items() if not below & left.keys()]
        assert lowest, left
        left = {name: below for name, below in left.items() if name not in lowest}


def test_tyro_and_gpu_extras_stay_in_their_place():
    """tyro only in cli, mpi4py and transformer_engine in one file each, apex nowhere."""
    places = {
        "mpi4py": "data/preprocessing/mpi.py",
        "transformer_engine": "models/precision/transformer_engine.py",
    }
    for path in sorted(PACKAGE.rglob("*.py")):
        roots = {module.split(".")[0] for module in imported_modules(path)}
        if path.relative_to(PACKAGE).parts[0] != "cli":
            assert "tyro" not in roots, path
        assert "apex" not in roots, path
        for root, file in places.items():
            assert root not in roots or path.relative_to(PACKAGE) == Path(file), path


def test_private_names_of_others_come_through_one_door():
    """megatron-core's through platform/megatron.py, torch's through platform/."""
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        file = path.relative_to(PACKAGE)
        for name in imported_modules(path):
            root, *rest = name.split(".")
            if not any(part.startswith("_") for part in rest):
                continue
            if root == "megatron" and file != Path("platform/megatron.py"):
                wrong.append(f"{file} imports {name}")
            if root == "torch" and file.parts[0] != "platform":
                wrong.append(f"{file} imports {name}")
    assert not wrong, wrong


IMPORTED_FOR_ITS_EFFECT = {"cli/preload.py"}
"""A fork server can be given modules only."""


def is_harmless(statement):
    """Whether a statement of a module's body defines something, and does nothing else."""
    if isinstance(statement, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.AnnAssign)):
        return True
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Constant)
    if isinstance(statement, ast.Assign):
        return all(isinstance(target, (ast.Name, ast.Tuple)) for target in statement.targets)
    if isinstance(statement, ast.AugAssign):
        return isinstance(statement.target, ast.Name)
    condition = ast.unparse(statement.test) if isinstance(statement, ast.If) else ""
    return condition in ("TYPE_CHECKING", "__name__ == '__main__'")


def test_importing_a_module_changes_nothing_outside_it():
    """No environment variable, no attribute of another module, no call for its effect, no import for one."""
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.relative_to(PACKAGE).as_posix() in IMPORTED_FOR_ITS_EFFECT:
            continue
        tree = ast.parse(path.read_text())
        for statement in tree.body:
            if not is_harmless(statement):
                wrong.append(f"{path.relative_to(PACKAGE)}:{statement.lineno}")
            if isinstance(statement, (ast.Import, ast.ImportFrom)):
                unused = [alias.name for alias in statement.names if alias.asname == alias.name]
                wrong += [f"{path.relative_to(PACKAGE)}:{statement.lineno}: {name}" for name in unused]
    assert not wrong, wrong


def test_tests_mirror_the_package_and_share_through_helpers():
    """tests/unit has the package's folders, and no test imports from another."""
    folders = [path for path in (ROOT / "tests" / "unit").rglob("*") if (path / "__init__.py").is_file()]
    for folder in folders:
        name = folder.relative_to(ROOT / "tests" / "unit")
        assert (PACKAGE / name).is_dir() or (ROOT / name).is_dir(), f"{folder} tests no package"
    wrong = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for module in imported_modules(path):
            if module.startswith("tests.") and not module.startswith(("tests.helpers", "tests.gpu.CASES")):
                wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong, wrong
    for path in sorted((ROOT / "tools").rglob("*.py")):
        assert not any(module.startswith("tests") for module in imported_modules(path)), path
