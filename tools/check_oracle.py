"""Compare this package with numbers recorded from the reference code, key by key.

    python tools/check_oracle.py FILE.npz

The file holds inputs, every random draw among them, and what the reference functions made of them. Each
output is computed again by this package's own objectives, head, samplers, schedules and denoiser, and its
largest absolute and relative difference is printed. Exit code 1 when a key differs, is unknown or cannot be
computed from the inputs in the file, or when there is nothing to check.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from megatron_dlm.diffusion.noisy_then_clean import noisy_then_clean_mask
from megatron_dlm.interfaces import InputError
from megatron_dlm.platform.launch import detect_environment
from megatron_dlm.platform.parallel import prepare_device
from megatron_dlm.platform.parallel_config import ParallelConfig
from tools.oracle.families import Case
from tools.oracle.networks import Networks
from tools.oracle.noise import Array
from tools.oracle.tables import table_method

MASK_LOGIT = -1e5
"""Recorded log-probabilities of the mask lie below this; here they are -inf."""
DEFECTS = re.compile(r"esoS_(seq|loss_a05|nlls_a05)$")
"""One repository gathers raw logits as log-probabilities in its sequential term: recorded, not reproduced."""

CASE = re.compile(r"(V\d+/s\d+)/(f32|f64)/([a-z]\w*)")
"""Numbers of one vocabulary, seed and precision."""


@dataclass(frozen=True)
class Tolerance:
    """A value passes within absolute + relative * |expected|."""

    absolute: float
    relative: float
    why: str = ""


EXACT = Tolerance(0.0, 0.0)
FLOAT64 = Tolerance(1e-12, 1e-9)
FLOAT32 = Tolerance(2e-5, 2e-5)
LARGE_VOCABULARY = 1000
# Measured on the reference's own float32 divergence at 32,001 ids.
DUO_FLOAT32 = Tolerance(8e-3, 1e-4, "the reference's float32 divergence is this far off at t near 0 and 1")
SPLIT_TIMES = Tolerance(1e-7, 0.0, "the reference adds its strata's edges in float32")
KL_RATE = Tolerance(1e-8, 1e-4, "recorded as a difference quotient")


class Checker:
    """Computes each recorded key and keeps the comparison."""

    def __init__(self, file: Path) -> None:
        try:
            with np.load(file, allow_pickle=False) as loaded:
                self._arrays = dict(loaded)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{file}: not a readable .npz file: {error}") from error
        except Exception as error:  # zipfile has its own
            raise InputError(f"{file}: damaged: {error}") from error
        self._networks: Networks | None = None
        self.rows: list[tuple[str, str, str, str]] = []
        self.num_checked = self.num_failed = 0

    def run(self) -> None:
        """Check every key that is not an input."""
        for key in self._arrays:
            if not self._is_input(key):
                self._check(key)
        if self._networks is not None:
            self._networks.close()

    def _is_input(self, key: str) -> bool:
        inputs = (
            r"V\d+/s\d+/in/\w+|tsplit/(u|shape)|lr/\w+/(cfg|step)|steps/(names|budgets_1e18)|block/(u|T_P)"
            r"|blockar/T_S_P|cat/[pu]|topp/logits|temb/sigma"
            r"|net/(w/.+|x|sigma|order|cfg|eso_xm|eso_u|eso_samp_k)"
        )
        return re.fullmatch(inputs, key) is not None

    def _check(self, key: str) -> None:
        if DEFECTS.search(key):
            self.rows.append((key, "-", "-", "defect of that code, not reproduced"))
            return
        expected = self._arrays[key]
        try:
            compute = self._computation(key)
        except KeyError:
            self._fail(key, "unknown key")
            return
        try:
            ours = np.asarray(compute())
        except KeyError as error:
            self._fail(key, f"the file lacks the input {error}")
        except Exception as error:  # whatever odd inputs lead to; the other keys are still checked
            self._fail(key, f"{type(error).__name__}: {error}")
        else:
            self._compare(key, ours, expected, _tolerance(key, expected))

    def _fail(self, key: str, why: str) -> None:
        self.num_failed += 1
        self.rows.append((key, "-", "-", f"FAIL: {why}"))

    def _compare(self, key: str, ours: Array, expected: Array, tolerance: Tolerance) -> None:
        self.num_checked += 1
        if ours.shape != expected.shape:
            self._fail(key, f"shape {ours.shape}, recorded {expected.shape}")
            return
        ours, expected = ours.astype(np.float64), expected.astype(np.float64)
        same = (ours == expected) | (np.isneginf(ours) & (expected < MASK_LOGIT))
        with np.errstate(invalid="ignore", divide="ignore"):
            absolute = np.where(same, 0.0, np.abs(ours - expected))
            relative = np.where(same, 0.0, absolute / np.abs(expected))
        ok = bool((absolute <= tolerance.absolute + tolerance.relative * np.abs(expected))[~same].all())
        self.num_failed += not ok
        note = f" ({tolerance.why})" if ok and tolerance.why else ""
        a, r = (f"{float(values.max(initial=0.0)):.1e}" for values in (absolute, relative))
        self.rows.append((key, a, r, ("pass" if ok else "FAIL") + note))

    def _computation(self, key: str) -> Callable[[], Any]:
        """How to compute `key`; KeyError where it is unknown."""
        if found := CASE.fullmatch(key):
            prefix, precision, name = found.groups()
            dtype = torch.float64 if precision == "f64" else torch.float32
            return _method(Case(self._below(f"{prefix}/in/"), dtype), name)
        if found := re.fullmatch(r"net/seq_mask_L(\d+)", key):
            return lambda: noisy_then_clean_mask(int(found[1]), 1).dense()[0, 0].numpy()
        if key.startswith("net/"):
            return self._network_method(key.removeprefix("net/"))
        return table_method(key, self._below(f"{key.partition('/')[0]}/"))

    def _below(self, prefix: str) -> dict[str, Array]:
        return {name.removeprefix(prefix): a for name, a in self._arrays.items() if name.startswith(prefix)}

    def _network_method(self, name: str) -> Callable[[], Array]:
        _method(Networks, name)

        def compute() -> Array:
            if self._networks is None:
                self._networks = Networks(self._below("net/"))
            result: Array = _method(self._networks, name)()
            return result

        return compute


def _tolerance(key: str, expected: Array) -> Tolerance:
    """How far `key` may be off."""
    if key.startswith("tsplit/"):
        return SPLIT_TIMES
    if expected.dtype.kind in "iub":
        return EXACT
    single = expected.dtype == np.float32
    if found := CASE.fullmatch(key):
        prefix, precision, name = found.groups()
        single = single or precision == "f32"
        if name == "duo_kl_rate":
            return KL_RATE
        large = int(prefix[1:].split("/")[0]) > LARGE_VOCABULARY
        if name.startswith("duo_nll") and precision == "f32" and large:
            return DUO_FLOAT32
    return FLOAT32 if single else FLOAT64


def _method(owner: Any, name: str) -> Callable[..., Any]:
    if name.startswith("_") or name == "close" or not callable(getattr(owner, name, None)):
        raise KeyError(name)
    method: Callable[..., Any] = getattr(owner, name)
    return method


def main() -> int:
    """Check one file; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, help=".npz file of recorded inputs and outputs")
    file: Path = parser.parse_args().file
    prepare_device(detect_environment(), ParallelConfig(device="cpu"))
    try:
        checker = Checker(file)
        checker.run()
    except InputError as error:
        print(f"check_oracle: error: {error}", file=sys.stderr)
        return 2
    from rich.console import Console
    from rich.table import Table

    table = Table("key", "absolute", "relative", "result", box=None)
    for row in checker.rows:
        table.add_row(*row)
    Console(width=130).print(table)
    if not checker.num_checked and not checker.num_failed:
        print(f"check_oracle: error: {file}: nothing to check", file=sys.stderr)
        return 1
    listed = len(checker.rows) - checker.num_checked
    print(f"{checker.num_checked} keys compared, {checker.num_failed} failed, {listed} not compared")
    return int(checker.num_failed > 0)


if __name__ == "__main__":
    sys.exit(main())
