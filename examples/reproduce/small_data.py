"""Data of the small commands: Python's own sources as text, problems in GSM8K's format, a multiple choice.

python examples/reproduce/small_data.py DIRECTORY
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.quickstart import HELD_OUT_EVERY, standard_library_sources

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = 600
TASK = """task: small_choice
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: "{{choices}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""


def main() -> None:
    """Write everything that is not there yet."""
    work = Path(sys.argv[1])
    data = work / "runs" / "small-scale-study" / "data"
    if (work / "problems" / "held-out.idx").exists():
        return
    texts = [{"text": text} for text in islice(standard_library_sources(), DOCUMENTS)]
    held_out = texts[::HELD_OUT_EVERY]
    write(work / "text" / "held-out.jsonl", held_out)
    write(work / "text" / "train.jsonl", (text for text in texts if text not in held_out))
    choices = [{"question": "for i in", "choices": [" range(", " zq~~"], "answer": 0}] * 4
    write(work / "tasks" / "choices.jsonl", choices)
    (work / "tasks" / "small_choice.yaml").write_text(TASK % (work / "tasks" / "choices.jsonl").resolve())
    tokenizer = work / "tokenizer"
    call(
        "tokenizer",
        "train",
        "--input",
        work / "text" / "held-out.jsonl",
        "--vocab-size",
        512,
        "--output",
        tokenizer,
    )
    problems = work / "problems"
    script = ROOT / "examples" / "small-scale-study" / "arithmetic.py"
    subprocess.run([sys.executable, script, problems], check=True)
    for part in ("train", "held-out"):
        places = ["--tokenizer", tokenizer, "--output"]
        call("index", "--input", work / "text" / f"{part}.jsonl", *places, data / part)
        keys = ["--prompt-key", "question", "--json-keys", "answer"]
        call("index", "--input", problems / f"{part}.jsonl", *keys, *places, problems / part)


def write(path: Path, lines: Iterable[Mapping[str, object]]) -> None:
    """Write JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def call(*words: object) -> None:
    """Run a command of the package."""
    subprocess.run([sys.executable, "-m", "megatron_dlm", *map(str, words)], check=True)


if __name__ == "__main__":
    main()
