"""Fixtures shared by all tests."""

import json
import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.helpers import processes
from tests.helpers.paths import COMMITTED, REFERENCE
from tools import tiny

# No test asks a hub; read when the libraries are imported.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
if not torch.cuda.is_available():
    # Read where Triton's kernels are defined; a run takes PyTorch on a CPU all the same.
    os.environ["TRITON_INTERPRET"] = "1"

# What tests start inherits it, and a program that nohup started ignores this signal.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

TABLES = {
    "table: layout": (
        "against one process, 3 steps: largest relative difference of loss and of any parameter's gradient",
        (
            *("tensor", "pipeline", "data", "micro-batch", "options"),
            *("family", "loss", "gradient"),
        ),
    ),
    "table: planned memory": (
        "peak memory of a rank on four CPU processes",
        ("layout", "predicted MiB", "measured MiB", "ratio"),
    ),
    "table: samples": (
        "one run over resumes: the same global batches as at one layout, bit for bit, no block twice",
        ("steps", "processes", "micro-batch", "workers", "shards", "digest of batches", "shard and block"),
    ),
    "table: bytes": (
        "one corpus indexed in different ways, and by Megatron-LM's scheme; of .bin and .idx together",
        ("how", "first half of SHA-256"),
    ),
    "table: kernels": (
        "Triton kernels compiled for GPUs that are not here",
        ("kernel", "GPU", "registers of a thread", "stack bytes"),
    ),
    "table: corpora": (
        "public corpora indexed, opened by megatron-core and decoded",
        ("corpus", "documents", "tokens", "bytes per token", "decoded documents"),
    ),
    "table: fuzz": (
        "damaged files of a shard opened, read and compared; no other tokens, no other errors",
        ("damage", "files", "refused", "same tokens"),
    ),
    "table: chi-square": (
        "50,000 samples against the enumerated law of the sampler's own chain",
        ("test", "cells", "p-value", "p-value under a wrong law"),
    ),
    "table: likelihood": (
        "one model by every route, nats per token at the same sequences and noise",
        ("family", "route", "protocol", "complete"),
    ),
    "table: exports": (
        "saved at 2 tensor x 2 pipeline parallel, exported, loaded by transformers in a process of its own",
        ("family", "bound", "logits", "greedy trace, equal tokens"),
    ),
    "table: resharding": (
        "saved at one layout, resumed at another: largest relative difference in the next 5 steps",
        ("saved", "resumed", "family", "loss", "gradient norm"),
    ),
}


@pytest.fixture(scope="session")
def oracle():
    """Arrays recorded from the paper's code."""
    import numpy as np

    path = REFERENCE / "oracle.npz"
    return np.load(path if path.is_file() else COMMITTED / "reference.npz", allow_pickle=False)


@pytest.fixture(scope="session")
def sizes_table():
    """The published sizes with their counts."""
    import csv

    with (COMMITTED / "sizes.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Tokenizer of 301 ids, which tensor parallelism pads, and two shards, made once."""
    return tiny.make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def command():
    """Run `megatron-dlm` arguments in a process of its own; returns the finished process."""
    return partial(processes.run, *processes.TRAINER)


@pytest.fixture
def read_json():
    """Parse a JSON file."""
    return lambda path: json.loads(Path(path).read_text())


def pytest_terminal_summary(terminalreporter):
    """Print the rows that tests have recorded for a table."""
    for name, (title, columns) in TABLES.items():
        reports = terminalreporter.getreports("passed")
        rows = sorted({value for report in reports for key, value in _properties(report) if key == name})
        if rows:
            from rich.console import Console
            from rich.markup import escape
            from rich.table import Table

            table = Table(*columns, title=title)
            for row in rows:
                table.add_row(*(escape(str(value)) for value in row))
            Console(width=120).print(table)


def _properties(report):
    # Values that crossed a process border are lists.
    return [(key, tuple(value)) for key, value in report.user_properties if isinstance(value, (list, tuple))]
