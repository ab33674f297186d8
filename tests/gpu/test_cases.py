"""The table of this folder is complete, on any machine."""

import ast
from pathlib import Path

from tests.gpu import CASES

HERE = Path(__file__).parent
REQUIRED = """
each family trains|kernels, compiled|Engine's bf16|FP8 recipe|save synchronous|save asynchronous
SIGKILL|SIGTERM|graphs train|3 microbatches|pinned|workers|DALI|sample, every family|nll
export and its check|forward and backward|FlexAttention's speed|sanitizer|TP 2|PP 2|CP 2|DP 2
distributed optimizer|fully sharded|user buffers|asynchronous save|reshard|one card
"""


def names_in(path):
    body = ast.parse(path.read_text()).body
    names = (node.name for node in body if isinstance(node, ast.FunctionDef))
    return {name for name in names if name.startswith("test_")}


def test_every_row_names_a_test_that_is_there():
    for case, test in CASES.items():
        file, _, name = test.partition("::")
        found = names_in((HERE / file).resolve())
        assert found and (not name or name in found), f"{case}: no {test}"


def test_every_test_has_a_row():
    for path in HERE.glob("test_*.py"):
        if path.name != Path(__file__).name:
            missing = {f"{path.name}::{name}" for name in names_in(path)} - set(CASES.values())
            assert not missing


def test_no_required_case_is_missing():
    for words in REQUIRED.strip().replace("\n", "|").split("|"):
        assert [case for case in CASES if words in case], f"no case of {words!r}"
