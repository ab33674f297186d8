"""Every file under examples/: recipes build, launchers start them."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dlm.families.registry import OBJECTIVES
from megatron_dlm.run.config import load_recipe
from megatron_dlm.run.validation import check_run
from megatron_dlm.telemetry.writers import read_metrics
from tests.helpers.hang import HANG_SECONDS
from tests.helpers.mpi import find_mpirun
from tests.helpers.paths import ROOT
from tests.helpers.runs import arguments_for, finish, train_metrics, wait_for_step
from tools.ports import free_port

RECIPES = sorted(path for family in OBJECTIVES for path in (ROOT / "examples" / family).glob("*.py"))
WORLD = {"tiny": 2, "113m": 8, "113m-elbo": 8, "1.7b": 128, "1.7b-phase2": 128, "gsm8k": 8}
SLOW = pytest.mark.slow
CPU_ONLY = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
LAUNCHERS = ("torchrun", "slurm", "mpi")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_recipes_fit_their_machines(path):
    config = load_recipe(path)
    assert config.objective.name == path.parent.name
    check_run(config, WORLD[path.stem])


def test_the_paper_runs_are_the_paper_s():
    phase1 = load_recipe(ROOT / "examples" / "mdlm" / "1.7b.py")
    phase2 = load_recipe(ROOT / "examples" / "mdlm" / "1.7b-phase2.py")
    assert (phase1.model.hidden_size, phase1.model.num_layers, phase1.model.num_attention_heads) == (
        2176,
        28,
        17,
    )
    assert (phase1.schedule.lr, phase1.schedule.min_lr, phase1.schedule.warmup_steps) == (4e-4, 1e-4, 2000)
    assert (phase1.training.num_steps, phase1.schedule.decay_steps) == (500_000, 1_280_000)
    assert (phase2.schedule.lr, phase2.schedule.min_lr, phase2.training.num_steps) == (3e-4, 4e-5, 350_000)
    assert phase1.training.global_batch_size == phase2.training.global_batch_size == 1024
    assert phase2.checkpoint.initialize_from == phase1.directory / "checkpoints" / "step-00500000"
    isoflop = load_recipe(ROOT / "examples" / "ar" / "113m.py")
    assert (isoflop.training.global_batch_size, isoflop.schedule.warmup_steps) == (256, 173)


def launch(launcher, *arguments, check=True, **environment):
    script = ROOT / "examples" / launcher / "train.sh"
    env = os.environ | CPU_ONLY | {"PYTHON": sys.executable, **environment}
    finished = subprocess.run(
        [str(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=env,
        timeout=HANG_SECONDS,
    )
    if check and finished.returncode:
        pytest.fail(f"{finished.stdout}\n{finished.stderr}")
    return finished


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_dry_run_prints_command_and_layout(launcher):
    sizes = {"NUM_NODES": "16", "GPUS_PER_NODE": "8", "NUM_PROCESSES": "128", "MASTER_ADDR": "node0"}
    more = ["--parallel.tensor-model-parallel-size", "2", "--directory", "a b$(touch x)"]
    out = launch(launcher, "--dry-run", "examples/mdlm/1.7b.py", *more, **sizes).stdout.splitlines()
    words = shlex.split(out[0])
    assert words[-4:] == more and "examples/mdlm/1.7b.py" in words
    layout = "\n".join(out[1:])
    assert "128 = 2 tensor x 1 pipeline x 1 context x 64 data parallel" in layout
    assert "17 heads (18 with padding)" in layout and "2,097,152 tokens, 8 microbatches" in layout


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers_explain_themselves_and_pass_errors_on(launcher):
    usage = launch(launcher, check=False)
    assert usage.returncode == 2 and "train.sh" in usage.stdout and "#!" not in usage.stdout
    wrong = launch(launcher, "--dry-run", "examples/mdlm/tiny.py", "--no.such", "1", check=False)
    assert wrong.returncode == 2 and "--no.such" in wrong.stderr


@pytest.mark.parametrize(("launcher", "program"), [("mpi", "mpirun"), ("slurm", "srun")])
def test_a_launcher_that_is_not_there_is_named(launcher, program):
    if shutil.which(program, path="/usr/bin:/bin"):
        pytest.skip(f"{program} is there")
    finished = launch(launcher, "examples/mdlm/tiny.py", check=False, PATH="/usr/bin:/bin")
    assert finished.returncode == 2 and f"{program}: not found" in finished.stderr
    assert len(finished.stderr.splitlines()) == 1


@pytest.fixture(scope="module")
def torchrun_run(corpus, tmp_path_factory):
    """Three MDLM steps at tensor parallelism 2 from examples/torchrun."""
    directory = tmp_path_factory.mktemp("torchrun") / "run"
    more = ["--parallel.tensor-model-parallel-size", "2"]
    launch(
        "torchrun",
        *arguments_for(corpus, directory, *more, steps=3)[1:],
        GPUS_PER_NODE="2",
        MASTER_PORT=str(free_port()),
    )
    return directory


def losses(directory):
    return [entry["loss"] for entry in read_metrics(directory) if entry["kind"] == "train"]


def mpi_environment(port):
    mpirun = find_mpirun()
    if mpirun is None:
        pytest.skip("mpirun is not installed")
    return {
        "PATH": f"{Path(mpirun).parent}:{os.environ['PATH']}",
        "NUM_PROCESSES": "2",
        "MASTER_PORT": port,
        "MPIRUN_FLAGS": "--allow-run-as-root --oversubscribe",
    }


@pytest.mark.slow
def test_mpirun_trains_what_torchrun_trains(corpus, tmp_path, torchrun_run):
    more = ["--parallel.tensor-model-parallel-size", "2"]
    launch("mpi", *arguments_for(corpus, tmp_path / "run", *more, steps=3)[1:], **mpi_environment("29612"))
    assert losses(tmp_path / "run") == losses(torchrun_run)


@SLOW
def test_a_signal_to_mpirun_saves(corpus, tmp_path):
    environment = os.environ | CPU_ONLY | {"PYTHON": sys.executable} | mpi_environment("29613")
    words = ["examples/mpi/train.sh", *map(str, arguments_for(corpus, tmp_path, steps=2000)[1:])]
    process = subprocess.Popen(
        words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for_step(process, tmp_path, 3)
    process.send_signal(signal.SIGUSR1)
    code, output = finish(process)
    assert code == 3, output
    stopped = max(train_metrics(tmp_path))
    assert stopped < 2000 and (tmp_path / "checkpoints" / f"step-{stopped:08d}").is_dir()


@pytest.mark.parametrize("family", [pytest.param(f, marks=SLOW) for f in ("mdlm", "ar", "duo", "esolm")])
def test_large_recipes_run_for_a_few_toy_steps(command, corpus, tmp_path, family):
    """bf16 as written; phase 2 starts from the weights phase 1 has saved."""
    toy = ["--training.global-batch-size", 8, "--schedule.warmup-steps", 2]
    for stem in ("113m", "1.7b", "1.7b-phase2"):
        recipe = f"examples/{family}/{stem}.py"
        start = tmp_path / "1.7b" / "checkpoints" / "step-00000002"
        more = ["--checkpoint.initialize-from", start] if stem == "1.7b-phase2" else []
        command(*arguments_for(corpus, tmp_path / stem, *toy, *more, recipe=recipe, steps=2))
        assert len(losses(tmp_path / stem)) == 2
    validation = {
        stem: [
            entry["nats_per_token"]
            for entry in read_metrics(tmp_path / stem)
            if entry["kind"] == "validation"
        ]
        for stem in ("1.7b", "1.7b-phase2")
    }
    assert validation["1.7b-phase2"][0] == pytest.approx(validation["1.7b"][-1], rel=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("objective", ["mdlm", "ar", "duo", "esolm"])
def test_quickstart(objective, tmp_path, read_json):
    output = tmp_path / "quickstart"
    command = [sys.executable, "examples/quickstart.py", "--objective", objective, "--output", str(output)]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert read_json(output / "summary.json")["end below the training data's entropy"] == "yes"
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
