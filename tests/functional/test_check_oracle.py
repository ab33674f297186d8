"""tools/check_oracle.py on recorded numbers where present, and on files made here."""

from functools import partial

import numpy as np
import pytest

from tests.helpers.paths import COMMITTED, REFERENCE
from tests.helpers.processes import run

check = partial(run, "tools/check_oracle.py", check=False)


@pytest.fixture
def made():
    """Weights and draws with what the race must choose."""
    weights = np.array([[0.0, 1.0], [1.0, 0.0]])
    return {"cat/p": weights, "cat/u": np.full((2, 2), 0.5), "cat/x": np.array([1, 0])}


def test_the_committed_numbers_are_reproduced():
    finished = check(COMMITTED / "reference.npz")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "201 keys compared, 0 failed" in finished.stdout


def test_all_recorded_numbers_are_reproduced():
    path = REFERENCE / "oracle.npz"
    if not path.is_file():
        pytest.skip(f"no recorded reference numbers at {path}")
    finished = check(path)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "444 keys compared, 0 failed" in finished.stdout
    assert finished.stdout.count("not reproduced") == 30


def test_a_subset_passes_and_a_wrong_value_fails(made, tmp_path):
    np.savez(tmp_path / "good.npz", **made)
    finished = check(tmp_path / "good.npz")
    assert finished.returncode == 0 and "1 keys compared, 0 failed" in finished.stdout
    np.savez(tmp_path / "bad.npz", **(made | {"cat/x": np.array([0, 0])}))
    assert check(tmp_path / "bad.npz").returncode == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cat/y": np.zeros(2)}, "unknown key"),
        ({"V9/s0/f64/no_such": np.zeros(2)}, "unknown key"),
        ({"V9/s0/f64/duo_nll": np.zeros((1, 2))}, "lacks the input"),
        ({"cat/x": np.zeros((2, 3), dtype=np.int64)}, "shape"),
        ({"topp/logits": np.array("text"), "topp/out_0.9": np.zeros(2)}, "FAIL: TypeError"),
    ],
)
def test_what_cannot_be_checked_fails(made, tmp_path, change, message):
    np.savez(tmp_path / "file.npz", **(made | change))
    finished = check(tmp_path / "file.npz")
    assert finished.returncode == 1 and message in finished.stdout


def test_nothing_to_check_and_no_file(made, tmp_path):
    del made["cat/x"]
    np.savez(tmp_path / "inputs.npz", **made)
    finished = check(tmp_path / "inputs.npz")
    assert finished.returncode == 1 and "nothing to check" in finished.stderr
    (tmp_path / "text.npz").write_text("no numbers")
    finished = check(tmp_path / "text.npz")
    assert finished.returncode == 2 and finished.stderr.startswith("check_oracle: error:")
