"""Every command in README and docs is run as it stands, in order, on small inputs at the text's paths."""

import contextlib
import importlib
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.processes import CPU
from tools import tiny

FEW = (
    " --training.num-steps 4 --evaluation.num-batches 1 --evaluation.batch-size 8"
    " --model.num-layers 2 --model.hidden-size 64 --model.num-attention-heads 2 --model.ffn-hidden-size 256"
)
EXCEPTIONS = {
    "examples/quickstart.sh": ("six minutes; test_examples.py runs it", "bash -n examples/quickstart.sh"),
    "tests/run.sh": ("this is one of its tests", "bash -n tests/run.sh"),
    "tests/run.sh -k layout": ("this is one of its tests", "bash -n tests/run.sh"),
    "tests/run.sh --all": ("this is one of its tests", "bash -n tests/run.sh"),
    "tools/check.sh": ("tests/run.sh runs it", "bash -n tools/check.sh"),
    "tools/install.sh": ("changes the environment; tests/run.sh runs it", "bash -n tools/install.sh"),
    "pip install": ("changes the environment", None),
    "docker ": ("needs a container engine", None),
    "RECIPE=examples/mdlm/113m.py docker compose": ("needs a container engine", None),
    "CONTAINER_IMAGE=$PWD/megatron-dlm.sqsh sbatch": (
        "needs Slurm with Pyxis",
        "CONTAINER_IMAGE=$PWD/megatron-dlm.sqsh examples/slurm/train.sh --dry-run examples/mdlm/1.7b.py",
    ),
    "megatron-dlm doctor examples/mdlm/tiny.py": (
        "the quickstart's data are not there",
        ("--quick", "--quick --data.train data/held-out --data.validation data/held-out"),
    ),
    "megatron-dlm tokenizer train": ("a small text has fewer words", ("32768", "320")),
    "examples/torchrun/train.sh examples/mdlm/tiny.py": (
        "minutes of training", ("runs/first", "runs/first" + FEW)
    ),
    "GPUS_PER_NODE=2 examples/torchrun/train.sh": (
        "minutes of training, and GPUs may be fewer",
        ("runs/second", "runs/second --parallel.device cpu" + FEW),
    ),
    "GPUS_PER_NODE=8 examples/torchrun/train.sh": (
        "needs GPUs and a corpus", ("train.sh ", "train.sh --dry-run ")
    ),
    "NUM_NODES=1:2": (
        "needs two nodes; test_elastic.py runs it",
        ("train.sh RECIPE", "train.sh --dry-run examples/mdlm/113m.py"),
    ),
    "megatron-dlm watch": ("follows a run; test_watch.py runs it", "megatron-dlm watch --help"),
    "tensorboard --logdir": ("serves until it is stopped", "tensorboard --version"),
    "sbatch": (
        "needs Slurm; test_slurm.py runs it where Slurm is installed",
        "examples/slurm/train.sh --dry-run examples/mdlm/1.7b.py",
    ),
    "NUM_PROCESSES=8 examples/mpi/train.sh": (
        "needs GPUs and a corpus", "NUM_PROCESSES=8 examples/mpi/train.sh --dry-run examples/ar/113m.py"
    ),
    "megatron-dlm export runs/first@320": ("the run here has 4 steps", ("@320", "@4")),
    "python tools/bench/gpu.py": ("needs a GPU", "python tools/bench/gpu.py --help"),
    "examples/torchrun/train.sh examples/duo/gsm8k.py": (
        "needs GPUs and the weights of a 1.7B model",
        "examples/torchrun/train.sh --dry-run examples/duo/gsm8k.py",
    ),
    "megatron-dlm evaluate gsm8k runs/duo": (
        "needs the weights of a 1.7B model", "megatron-dlm evaluate gsm8k --help"
    ),
    "megatron-dlm evaluate gate": (
        "needs two trainings, one of them in FP8", "megatron-dlm evaluate gate --help"
    ),
}  # fmt: skip
"""Commands, by how they begin, that are not run as they stand: why, and what is run in their place: a
command, or a text of theirs and what replaces it; None: nothing."""


def commands_of(path):
    """Commands of a page's shell blocks in order, without comments and with their lines joined."""
    found = []
    for block in re.findall(r"^```(?:sh|bash)\n(.*?)^```", path.read_text(), re.S | re.M):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                found.append(re.sub(r"\s+#.*$", "", " ".join(line.split())))
    return found


def exception_of(command):
    return next((begin for begin in EXCEPTIONS if command.startswith(begin)), None)


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_no_exception_is_for_a_command_that_is_gone():
    commands = [command for page in PAGES for command in commands_of(page)]
    longest_first = sorted(EXCEPTIONS, key=len, reverse=True)
    used = {next((b for b in longest_first if c.startswith(b)), None) for c in commands}
    assert set(EXCEPTIONS) <= used | {exception_of(command) for command in commands}


@pytest.fixture
def room(tmp_path):
    """A directory as after `git clone` and with the files that the text speaks of."""
    for name in ("examples", "tools", "tests", "setup.py", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    tiny.write_jsonl(tmp_path / "text.jsonl", tiny.sentences(4000, seed=1))
    tiny.write_jsonl(tmp_path / "held-out.jsonl", tiny.sentences(60, seed=2))
    questions = [{"question": f"what is {n} and {n}", "answer": f"{2 * n} #### {2 * n}"} for n in range(40)]
    for name in ("qa.jsonl", "test.jsonl", "gsm8k/train.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in questions))
    chat = {"messages": [{"role": "user", "content": "and?"}, {"role": "assistant", "content": "the next"}]}
    (tmp_path / "chats.jsonl").write_text((json.dumps(chat) + "\n") * 9)
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}{{ m.content + '\\n' }}{% endfor %}")
    for name in ("SlimPajama-627B/train/chunk1", "SlimPajama-627B/validation/chunk1", "Nemotron-CC-v2"):
        directory = tmp_path / "downloads" / name
        directory.mkdir(parents=True)
        for number in range(2):
            tiny.write_jsonl(directory / f"{number}.jsonl", tiny.sentences(40, seed=number))
    return tmp_path


def run_all(commands, room):
    """Run commands or what stands for them; each must succeed."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | CPU | {"PATH": path, "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    ran = []
    for command in commands:
        begin = exception_of(command)
        if begin is not None:
            _, substitute = EXCEPTIONS[begin]
            if substitute is None:
                continue
            command = substitute if isinstance(substitute, str) else command.replace(*substitute)
        finished = subprocess.run(
            ["bash", "-c", command], cwd=room, env=environment, capture_output=True, text=True, timeout=200
        )
        assert finished.returncode == 0, f"{command}\n{finished.stdout}\n{finished.stderr}"
        ran.append(command)
    return ran


def words_of_the_package():
    """Arguments of every documented `megatron-dlm` command, each once."""
    commands = {command for page in PAGES for command in commands_of(page)}
    split = (shlex.split(command) for command in sorted(commands) if command.startswith("megatron-dlm "))
    return [
        list(itertools.takewhile(lambda word: word not in ("|", ">", "&&", "&"), words[1:]))
        for words in split
    ]


def test_documented_options_exist(monkeypatch, capsys):
    """In the help of the verb that they are given to; --all also runs the commands."""
    monkeypatch.chdir(ROOT)
    unknown = []
    for verb, *arguments in words_of_the_package():
        options = {word.partition("=")[0] for word in arguments if word.startswith("--")}
        with contextlib.suppress(SystemExit):
            importlib.import_module(f"megatron_dlm.cli.{verb}").run([*arguments, "--help"])
        told = capsys.readouterr()
        unknown += [(verb, option) for option in options if option not in told.out]
    assert not unknown, unknown


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_commands_of_readme(room):
    ran = run_all(commands_of(ROOT / "README.md"), room)
    assert len(ran) > 15
    for name in (
        "loss-by-time.png",
        "trace.html",
        "exported/export_report.json",
        "weights.ckpt",
        "data/qa.bin",
    ):
        assert (room / name).is_file(), name
    assert (room / "runs" / "imported" / "checkpoints").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES[1:] if commands_of(page)], ids=lambda page: page.name
)
def test_the_commands_of_docs(room, page):
    """After README's first ones, which make the tokenizer that they use."""
    made = ("megatron-dlm tokenizer", "megatron-dlm index --input held-out.jsonl")
    setup = [c for c in commands_of(ROOT / "README.md") if c.startswith(made)]
    run_all(setup, room)
    assert run_all(commands_of(page), room)
