"""Imports point one way: cli -> training -> {evaluation, conversion} -> parts -> platform, interfaces."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "megatron_dlm"
PARTS = {"objectives", "models", "data", "checkpointing", "telemetry"}
ALLOWED = {
    "cli": {"training", "evaluation", "conversion", "sampling", "platform", *PARTS},
    "training": {"evaluation", "conversion", "sampling", "kernels", "platform", *PARTS},
    "evaluation": {"sampling", "platform", *PARTS},
    "conversion": {"sampling", "platform", *PARTS},
    "sampling": {"platform"},
    # The head and losses meet through interfaces; checkpoints hold models; nothing else crosses.
    "checkpointing": {"models", "platform"},
    "models": {"kernels", "platform"},
    "objectives": {"kernels", "platform"},
    "kernels": {"platform"},
    "data": {"platform"},
    "telemetry": {"platform"},
    "platform": set(),
}


def imported_packages(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    parts = [name.split(".") for name in names if name.startswith("megatron_dlm.")]
    return {part[1] for part in parts if part[1] not in ("interfaces",)}


def test_imports_point_one_way():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        package = path.relative_to(PACKAGE).parts[0]
        if package not in ALLOWED:
            continue
        for name in sorted(imported_packages(path) - {package} - ALLOWED[package]):
            wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert not wrong, wrong


def test_tyro_and_gpu_extras_stay_in_their_place():
    """tyro only in cli, mpi4py and transformer_engine in one file each, apex nowhere."""
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        modules = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
        modules |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        roots = {module.split(".")[0] for module in modules}
        if path.relative_to(PACKAGE).parts[0] != "cli":
            assert "tyro" not in roots, path
        assert "apex" not in roots, path
        for root, file in (("mpi4py", "data/mpi.py"), ("transformer_engine", "models/transformer_engine.py")):
            assert root not in roots or path.relative_to(PACKAGE) == Path(file), path
