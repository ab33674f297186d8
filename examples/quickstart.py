"""Tokenize, train, evaluate, export and sample a tiny model with the commands a user would type."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_dlm.checkpointing.layout import CheckpointRoot
from megatron_dlm.data.preprocessing.document_readers import read_texts
from megatron_dlm.data.preprocessing.input_files import find_sources
from megatron_dlm.data.shards.manifest import read_manifest
from megatron_dlm.families.registry import OBJECTIVES
from megatron_dlm.interfaces import InputError
from megatron_dlm.run.config import load_recipe
from megatron_dlm.telemetry.plots import plot_loss
from megatron_dlm.telemetry.writers import duration, read_metrics
from megatron_dlm.training.signals import EXIT_PREEMPTED

ROOT = Path(__file__).resolve().parent.parent
SMALLEST_STEPS = 30
PROCESSES = 2
HELD_OUT_EVERY = 20
SMALLEST_CORPUS_BYTES = 10_000_000


def main() -> int:
    """Run every stage; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--objective", choices=tuple(OBJECTIVES), default="mdlm")
    parser.add_argument(
        "--data", type=Path, help=".jsonl or .txt file to train on (default: Python's standard library)"
    )
    parser.add_argument(
        "--json-key", default="text", help="key of each JSON line that holds the text (default text)"
    )
    parser.add_argument(
        "--output", type=Path, help="dedicated directory, emptied first (default runs/quickstart-OBJECTIVE)"
    )
    parser.add_argument("--steps", type=int, help="optimizer steps (default: the recipe's)")
    parser.add_argument(
        "--vocab-size",
        type=int,
        default=8192,
        help="vocabulary size; use less for a small file (default 8192)",
    )
    arguments = parser.parse_args()
    output: Path = arguments.output or ROOT / "runs" / f"quickstart-{arguments.objective}"
    try:
        recipe = load_recipe(ROOT / "examples" / arguments.objective / "tiny.py")
        steps = recipe.training.num_steps if arguments.steps is None else arguments.steps
        job = Quickstart(output, arguments.objective, steps, arguments.vocab_size)
        job.run(arguments.data, arguments.json_key)
    except InputError as error:
        print(f"quickstart: error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"quickstart: error: {shlex.join(error.cmd)} ended with {error.returncode}", file=sys.stderr)
        return error.returncode
    return 0


class Quickstart:
    """All stages of the quickstart, run in order in one output directory."""

    def __init__(self, output: Path, objective: str, steps: int, vocabulary_size: int) -> None:
        self._started = time.monotonic()
        self._laps: dict[str, float] = {}
        self._output = output
        self._objective = objective
        self._steps = steps
        self._vocabulary_size = vocabulary_size
        self._run_directory = output / "run"
        self._checkpoints = CheckpointRoot(self._run_directory / "checkpoints")

    def run(self, data: Path | None, json_key: str) -> None:
        """Run all stages, then print the summary."""
        if data is not None:
            find_sources([data])
        if self._steps < SMALLEST_STEPS:
            raise InputError(f"--steps: {self._steps} is below {SMALLEST_STEPS}")
        self._empty_output()
        texts = standard_library_sources() if data is None else read_texts([data], json_key)
        train_text, held_out_text = self._split(texts)
        tokenizer, shards = self._index(train_text, held_out_text)
        self._lap("corpus, tokenizer, shards")
        stopped_at = self._train(shards)
        self._lap("training")
        checkpoint = self._checkpoints.complete()[-1]
        evaluation = self._evaluate(checkpoint, shards)
        self._lap("evaluation")
        export = self._export(checkpoint, tokenizer, shards)
        self._lap("export and check")
        below = self._report(stopped_at, evaluation, export, shards)
        if data is None and not below:
            raise InputError(f"--steps: {self._steps} steps do not reach the unigram entropy of the data")

    def _empty_output(self) -> None:
        """Empty the output directory; refuses a directory with files that no quickstart wrote."""
        marker = self._output / ".megatron-dlm-quickstart"
        if self._output.exists() and any(self._output.iterdir()) and not marker.exists():
            raise InputError(f"--output: {self._output} holds files that no quickstart made")
        shutil.rmtree(self._output, ignore_errors=True)
        self._output.mkdir(parents=True)
        marker.touch()

    def _lap(self, stage: str) -> None:
        """Record how long a stage took."""
        now = time.monotonic()
        self._laps[stage] = now - self._started - sum(self._laps.values())

    def _split(self, texts: Iterator[str]) -> tuple[Path, Path]:
        """Write the training and held-out documents to two files; every twentieth document is held out."""
        paths = self._output / "train.jsonl", self._output / "held-out.jsonl"
        counts = [0, 0]
        with paths[0].open("w", encoding="utf-8") as train, paths[1].open("w", encoding="utf-8") as held_out:
            for index, text in enumerate(texts):
                held = index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
                (held_out if held else train).write(json.dumps({"text": text}) + "\n")
                counts[held] += 1
        if not all(counts):
            raise InputError(
                f"--data: {sum(counts)} documents; at least {HELD_OUT_EVERY} are needed to hold one out"
            )
        print(f"corpus: {counts[0]} training and {counts[1]} held-out documents")
        return paths

    def _index(self, train_text: Path, held_out_text: Path) -> tuple[Path, tuple[Path, Path]]:
        tokenizer = self._output / "tokenizer"
        call(
            "tokenizer",
            "train",
            "--input",
            train_text,
            "--output",
            tokenizer,
            "--vocab-size",
            self._vocabulary_size,
        )
        shards = self._output / "data" / "train", self._output / "data" / "held-out"
        for text, shard in zip((train_text, held_out_text), shards, strict=True):
            call("index", "--input", text, "--output", shard, "--tokenizer", tokenizer)
        return tokenizer, shards

    def _train(self, shards: tuple[Path, Path]) -> int:
        """Train on two processes, stop half way by SIGTERM, resume; returns the step of the stop."""
        threads = max(1, (os.cpu_count() or 1) // PROCESSES)
        command = [
            # torchrun's arguments, as in examples/torchrun/train.sh.
            *(sys.executable, "-m", "megatron_dlm.cli.torchrun", "--standalone", "--local-addr", "127.0.0.1"),
            *(
                "--nproc-per-node",
                PROCESSES,
                "-m",
                "megatron_dlm",
                "train",
                ROOT / "examples" / self._objective / "tiny.py",
            ),
            *("--directory", self._run_directory),
            *("--data.train", shards[0], "--data.validation", shards[1]),
            *("--training.num-steps", self._steps, "--schedule.decay-steps", self._steps),
            *("--evaluation.every", max(1, self._steps // 4)),
            *("--parallel.device", "cpu", "--parallel.tensor-model-parallel-size", PROCESSES),
            *("--parallel.intra-op-threads", threads),
        ]
        words = announce(command)
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        process = subprocess.Popen(words, env=environment)
        while process.poll() is None and self._last_step() < self._steps // 2:
            time.sleep(0.2)
        if process.poll() is None:
            print("-- SIGTERM: the run saves and stops", flush=True)
            process.send_signal(signal.SIGTERM)
        if process.wait() != EXIT_PREEMPTED:
            raise subprocess.CalledProcessError(process.returncode, words)
        stopped_at = int(self._checkpoints.complete()[-1].name.removeprefix("step-"))
        print(f"-- stopped and saved at step {stopped_at}; the same command resumes", flush=True)
        subprocess.run(announce(command), check=True, env=environment)
        return stopped_at

    def _last_step(self) -> int:
        return max((entry["step"] for entry in read_metrics(self._run_directory)), default=0)

    def _evaluate(self, checkpoint: Path, shards: tuple[Path, Path]) -> dict[str, Any]:
        result = self._output / "evaluation.json"
        call("evaluate", "nll", checkpoint, "--data", shards[1], "--num-sequences", 64, "--output", result)
        return read_json(result)

    def _export(self, checkpoint: Path, tokenizer: Path, shards: tuple[Path, Path]) -> dict[str, Any]:
        folder, texts = self._output / "hugging-face", self._output / "texts.jsonl"
        call("export", checkpoint, folder, "--tokenizer", tokenizer, "--data", shards[1])
        trace = self._output / "trace.html"
        call("sample", folder, "--num-samples", 2, "--length", 64, "--output", texts, "--trace", trace)
        first = json.loads(texts.read_text(encoding="utf-8").splitlines()[0])
        return read_json(folder / "export_report.json") | {"generated": first["text"]}

    def _report(
        self, stopped_at: int, evaluation: dict[str, Any], export: dict[str, Any], shards: tuple[Path, Path]
    ) -> bool:
        """Print and write the summary; returns whether the model beats a context-free one."""
        from rich.console import Console
        from rich.table import Table

        curve = self._output / "loss.png"
        train, held_out = (read_manifest(shard) for shard in shards)
        entropy = train.unigram_entropy_nats
        plot_loss(self._run_directory, curve, title=f"{self._objective}, tiny", unigram_entropy=entropy)
        entries = read_metrics(self._run_directory)
        start = next(entry["nats_per_token"] for entry in entries if entry["kind"] == "validation")
        speeds = [entry["tokens_per_second"] for entry in entries if entry["kind"] == "train"]
        bound = evaluation["protocol"]
        end = bound["nats_per_token"]
        difference, trace = export["nats_per_token"]["relative_difference"], export["greedy_trace"]
        table = Table("quantity", "value", title=f"{self._objective} quickstart")
        rows = {
            "training tokens in the corpus": f"{train.num_tokens:,}",
            "steps; stopped by SIGTERM and resumed at": f"{self._steps}; {stopped_at}",
            "training speed (median)": f"{statistics.median(speeds):,.0f} tokens/s on {PROCESSES} processes",
            "ln(V - 1)": f"{math.log(self._vocabulary_size - 1):.4f} nats/token",
            "validation bound, start": f"{start:.4f} nats/token",
            "unigram entropy of the training data": f"{entropy:.4f} nats/token",
            "unigram entropy of the held-out data": f"{held_out.unigram_entropy_nats:.4f} nats/token",
            "validation bound, end": f"{end:.4f} [{bound['low']:.4f}, {bound['high']:.4f}] nats/token",
            "validation bound, end, per byte": f"{evaluation['bits_per_byte']:.4f} bits/byte",
            "export against trained model": f"{difference:.1e} relative, on fixed noise",
            "tokens of a greedy trace, equal": f"{trace['equal_tokens']} of {trace['compared_tokens']}",
            "end below the training data's entropy": "yes" if end < entropy else "NO",
            "loss curve": str(curve),
            "Hugging Face folder": str(self._output / "hugging-face"),
            "sampling, step by step": str(self._output / "trace.html"),
            "time": duration(time.monotonic() - self._started),
            **{f"    {stage}": duration(seconds) for stage, seconds in self._laps.items()},
        }
        for name, value in rows.items():
            table.add_row(name, value)
        Console(width=110).print(table)
        print(f"generated: {export['generated']!r}")
        (self._output / "summary.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        return end < entropy


def standard_library_sources() -> Iterator[str]:
    """The .py files of the running Python's standard library."""
    library = Path(sysconfig.get_paths()["stdlib"])
    total = 0
    for path in sorted(library.rglob("*.py")):
        if "site-packages" in path.parts or "dist-packages" in path.parts:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            # Tests of other encodings.
            continue
        total += len(text)
        if text.strip():
            yield text
    if total < SMALLEST_CORPUS_BYTES:
        raise InputError(f"{library}: only {total:,} bytes of source; pass a text file with --data")


def announce(command: list[Any]) -> list[str]:
    """Print a command as a user would type it; returns its words."""
    words = [str(word) for word in command]
    print("\n$ " + shlex.join(words).replace(sys.executable, "python"), flush=True)
    return words


def call(*arguments: Any) -> None:
    """Run one `megatron-dlm` verb."""
    command = announce(["megatron-dlm", *arguments])
    subprocess.run([sys.executable, "-m", "megatron_dlm", *command[1:]], check=True)


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object."""
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


if __name__ == "__main__":
    sys.exit(main())
