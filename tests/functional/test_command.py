"""The command line: help, speed of starting, and one clear line with exit code 2 for every bad input."""

import subprocess
import sys
import time

import pytest

from megatron_dlm.cli.main import VERBS
from tests.helpers.paths import ROOT
from tests.helpers.processes import TRAINER
from tests.helpers.runs import finish, start_interpreter
from tools import tiny

RECIPE = "examples/mdlm/tiny.py"


def test_help_needs_no_torch_and_answers_quickly():
    started = time.monotonic()
    code, text = finish(start_interpreter(*TRAINER, "--help"))
    assert code == 0
    assert time.monotonic() - started < 5  # far below in practice; a slow machine must not fail the test
    for verb in VERBS:
        assert verb in text
    script = (
        "import sys, megatron_dlm, megatron_dlm.cli.main;"
        "print('torch' in sys.modules, 'megatron.core' in sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == ["False", "False"]


@pytest.mark.parametrize(
    "verb",
    [
        ["tokenizer", "train"],
        ["index"],
        ["evaluate", "nll"],
        ["sample"],
        ["import"],
        ["export"],
        ["train", RECIPE],
    ],
)
def test_every_verb_describes_its_arguments(command, verb):
    text = command(*verb, "--help").stdout
    assert "--" in text
    if verb[0] == "train":
        assert "training.num-steps" in text and "Optimizer steps" in text
        assert "parallel.tensor-model-parallel-size" in text


def write(path, text):
    path.write_text(text)
    return path


BAD = {
    "a trained model that sees half": (
        ["train", "examples/mdlm/tiny.py", "--objective.lookahead", "0.5", "--dry-run", "2"],
        "objective.lookahead: 0.5, and a trained model sees the whole text",
    ),
    "recorded layers of a changing mask": (
        [
            *("train", "examples/mdlm/tiny.py", "--objective.schedules", "lookahead 0:0 100"),
            *("--parallel.cuda-graphs", "--training.recompute", "none", "--dry-run", "2"),
        ],
        "parallel.cuda_graphs: True needs no schedule of objective.lookahead",
    ),
    "documents cut into blocks": (
        ["train", "examples/block-diffusion/tiny.py", "--data.document-mask", "--dry-run", "2"],
        "data.document_mask: block-diffusion cuts samples, not documents, into blocks",
    ),
    "verb": (["trian"], "verb: 'trian' is not one of"),
    "flag": (["train", RECIPE, "--training.num-stepz", "3"], "--training.num-stepz"),
    "type": (["train", RECIPE, "--training.num-steps", "many"], "many"),
    "choice": (["train", RECIPE, "--training.precision", "fp4"], "fp4"),
    "range": (
        ["train", RECIPE, "--training.num-steps", "0"],
        "train: error: training.num_steps: 0 is below 1",
    ),
    "recipe": (["train", "no/such.py"], "recipe: no/such.py: no such file"),
    "recipe suffix": (["train", "README.md"], "recipe: README.md: suffix '.md' is neither .py nor .json"),
    "recipe first": (
        ["train", "--training.num-steps", "3"],
        "recipe: expected a file before --training.num-steps",
    ),
    "tensor": (
        ["train", RECIPE, "--parallel.tensor-model-parallel-size", "2"],
        "tensor_model_parallel_size 2 x pipeline_model_parallel_size 1 x context_parallel_size 1 "
        "does not divide the world size 1",
    ),
    "sequence without tensor": (
        ["train", RECIPE, "--parallel.sequence-parallel"],
        "parallel.sequence_parallel: needs parallel.tensor_model_parallel_size above 1",
    ),
    "sequence does not divide": (
        [
            *("train", RECIPE, "--parallel.sequence-parallel", "--parallel.tensor-model-parallel-size", "2"),
            *("--objective.ssl-ratio", "0.1", "--objective.ssl-multiple", "3", "--dry-run", "2"),
        ],
        "does not divide lengths that are multiples of 1; --objective.ssl-multiple has to be a multiple of ",
    ),
    "context does not divide": (
        [
            *("train", RECIPE, "--parallel.context-parallel-size", "2"),
            *("--objective.ssl-ratio", "0.1", "--objective.ssl-multiple", "2", "--dry-run", "2"),
        ],
        "parallel.context_parallel_size: twice 2 does not divide lengths that are multiples of 2",
    ),
    "no context": (
        ["train", RECIPE, "--parallel.context-parallel-size", "0"],
        "parallel.context_parallel_size: 0 is below 1",
    ),
    "too many stages": (
        ["train", RECIPE, "--parallel.pipeline-model-parallel-size", "5", "--dry-run", "5"],
        "parallel.pipeline_model_parallel_size: 5 exceeds model.num_layers 4",
    ),
    "too many chunks": (
        [
            *("train", RECIPE, "--parallel.pipeline-model-parallel-size", "2", "--dry-run", "2"),
            *("--parallel.virtual-pipeline-model-parallel-size", "3"),
        ],
        "parallel.virtual_pipeline_model_parallel_size: 3 chunks on 2 stages exceed model.num_layers 4",
    ),
    "chunks of one stage": (
        ["train", RECIPE, "--parallel.virtual-pipeline-model-parallel-size", "2", "--dry-run", "2"],
        "parallel.virtual_pipeline_model_parallel_size: needs parallel.pipeline_model_parallel_size above 1",
    ),
    "too few microbatches for chunks": (
        [
            *("train", RECIPE, "--parallel.pipeline-model-parallel-size", "2", "--dry-run", "4"),
            *("--parallel.virtual-pipeline-model-parallel-size", "2", "--training.micro-batch-size", "4"),
        ],
        "training.global_batch_size: 8 is 1 microbatches, and interleaved chunks need as many as",
    ),
    "tensor does not divide": (
        ["train", RECIPE, "--parallel.tensor-model-parallel-size", "5", "--dry-run", "5"],
        "parallel.tensor_model_parallel_size: 5 does not divide model.ffn_hidden_size 896",
    ),
    "fp8 weights of mxfp8": (
        ["train", RECIPE, "--training.precision", "fp8", "--fp8.weights", "--fp8.recipe", "mxfp8"],
        "fp8.weights: True, and mxfp8 keeps bf16 weights",
    ),
    "fp8 weights without shards": (
        [
            *("train", RECIPE, "--training.precision", "fp8", "--fp8.weights", "--dry-run", "1"),
            "--parallel.no-use-distributed-optimizer",
        ],
        "fp8.weights: True, and parallel.use_distributed_optimizer is False",
    ),
    "weights gathered late": (
        ["train", RECIPE, "--parallel.overlap-param-gather"],
        "parallel.overlap_param_gather: needs parallel.overlap_grad_reduce and parallel.use_distributed",
    ),
    "tensor parallel overlap": (
        [
            *("train", RECIPE, "--dry-run", "2", "--parallel.tensor-model-parallel-size", "2"),
            "--parallel.overlap-tensor-parallel",
        ],
        "parallel.overlap_tensor_parallel: needs parallel.sequence_parallel",
    ),
    "tensor parallel overlap of lengths": (
        [
            *("train", RECIPE, "--dry-run", "2", "--parallel.tensor-model-parallel-size", "2"),
            *("--parallel.overlap-tensor-parallel", "--parallel.sequence-parallel"),
            *("--objective.ssl-ratio", "0.1", "--objective.ssl-multiple", "2"),
            *("--training.precision", "bf16"),
        ],
        "parallel.overlap_tensor_parallel: True needs microbatches of one length, which mdlm here has not",
    ),
    "tensor parallel overlap of fp32": (
        [
            *("train", RECIPE, "--dry-run", "2", "--parallel.tensor-model-parallel-size", "2"),
            *("--parallel.overlap-tensor-parallel", "--parallel.sequence-parallel"),
        ],
        "parallel.overlap_tensor_parallel: True needs training.precision bf16 or fp8, not fp32",
    ),
    "buckets": (
        ["train", RECIPE, "--parallel.bucket-size", "100"],
        "parallel.bucket_size: nothing is cut into buckets without parallel.overlap_grad_reduce",
    ),
    "recorded layers": (
        ["train", RECIPE, "--parallel.cuda-graphs", "--dry-run", "1"],
        "parallel.cuda_graphs: True needs training.recompute none, not selective",
    ),
    "recorded lengths": (
        [
            *("train", RECIPE, "--parallel.cuda-graphs", "--dry-run", "1", "--training.recompute", "none"),
            *("--objective.ssl-ratio", "0.1"),
        ],
        "parallel.cuda_graphs: True needs microbatches of one length, which mdlm here has not",
    ),
    "size": (["train", RECIPE, "--model.size", "12M"], "model.size: '12M' is not one of 6M, tiny"),
    "odd head": (["train", RECIPE, "--model.num-attention-heads", "32"], "head dimension 7 is odd"),
    "alpha_0": (
        ["train", "examples/esolm/tiny.py", "--objective.alpha-0", "1.5"],
        "objective.alpha_0: 1.5 is outside [0, 1]",
    ),
    "batch split": (
        [
            *("train", "examples/esolm/tiny.py", "--dry-run", "1"),
            *("--objective.alpha-0", "0.5", "--objective.batch-split", "0.1"),
        ],
        "objective.batch_split: 0.1 of a global batch of 8 leaves 0 samples to diffusion",
    ),
    "time conditioning": (
        ["train", "examples/duo/tiny.py", "--objective.no-time-conditioning"],
        "objective.time_conditioning: False; Duo needs the noise level",
    ),
    "block size": (
        ["train", "examples/block-diffusion/tiny.py", "--objective.block-size", "7", "--dry-run", "1"],
        "objective.block_size: 7 does not divide data.seq_length 256",
    ),
    "reference checkpoint": (
        ["export", "no/checkpoint", "out.ckpt"],
        "no/checkpoint/manifest.json: no such file",
    ),
    "batch": (
        ["train", RECIPE, "--training.micro-batch-size", "3"],
        "training.global_batch_size: 8 is not a multiple of training.micro_batch_size 3",
    ),
    "shard": (["train", RECIPE, "--data.train", "no/shard"], "no/shard.json: no such file"),
    "budget": (["train", RECIPE, "--budget-flops", "much"], "--budget-flops: 'much' is not a number above 0"),
    "small budget": (["train", RECIPE, "--budget-flops", "1"], "budget_flops: 1.0 does not pay for one step"),
    "short budget": (
        ["train", RECIPE, "--budget-flops", "1e13"],
        "pays for 84 steps, not more than the warm-up's 100",
    ),
    "budget of another MLP": (
        ["train", RECIPE, "--budget-flops", "1e18", "--model.ffn-hidden-size", "64"],
        "model.ffn_hidden_size: 64 is not 4 x 224",
    ),
    "unknown option": (["train", RECIPE, "--no.such", "1"], "error: Unrecognized options: --no.such"),
    "fp8 lengths": (
        [
            "train",
            "examples/duo/1.7b.py",
            "--training.precision",
            "fp8",
            "--fp8.recipe",
            "blockwise",
            "--dry-run",
            "8",
        ],
        "--objective.ssl-multiple has to be a multiple of 8",
    ),
    "dry run": (["train", RECIPE, "--dry-run", "x"], "--dry-run: 'x' is not a number of processes"),
    "model": (
        ["evaluate", "nll", "no/model"],
        "model: no/model: neither a run, a checkpoint (step-NNNNNNNN) nor",
    ),
    "evaluate what": (["evaluate", "no/model"], "evaluate: 'no/model' is not one of nll"),
    "import": (["import", "no/folder", "out"], "no/folder: has no config.json"),
    "import of a file": (["import", "w.ckpt", "out"], "recipe, tokenizer: a .ckpt says neither shape nor"),
    "index flag": (["index", "--inptu", "x"], "inptu"),
    "index input": (
        ["index", "--input", "no.jsonl", "--output", "no/x", "--tokenizer", "no"],
        "input: no.jsonl: no such file",
    ),
    "device": (["train", RECIPE, "--parallel.device", "tpu"], "tpu"),
    "tokenizer verb": (["tokenizer"], "usage: megatron-dlm tokenizer train"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_usage_is_one_line_and_exit_code_2(command, name):
    arguments, message = BAD[name]
    finished = command(*arguments, check=False)
    assert finished.returncode == 2
    lines = finished.stderr.strip().splitlines()
    assert len(lines) == 1 and "error" in lines[0], finished.stderr
    assert message in lines[0]
    assert finished.stdout == ""


@pytest.mark.parametrize("environment", [{"MASTER_PORT": "abc"}, {"RANK": "x", "WORLD_SIZE": "2"}])
def test_a_bad_launcher_environment_is_one_line(command, environment):
    finished = command("train", RECIPE, check=False, **environment)
    assert finished.returncode == 2 and "is not a number" in finished.stderr
    assert len(finished.stderr.strip().splitlines()) == 1


def test_cuda_is_not_replaced_in_silence(command, corpus, tmp_path):
    words = ["--data.train", corpus.train, "--data.validation", corpus.validation, "--data.seq-length", 32]
    finished = command(
        "train", RECIPE, *words, "--directory", tmp_path, "--parallel.device", "cuda", check=False
    )
    assert finished.returncode == 2 and "cuda is asked for" in finished.stderr


def test_the_package_imports_quickly():
    script = "import time; t = time.perf_counter(); import megatron_dlm; print(time.perf_counter() - t)"
    seconds = [
        float(
            subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
        )
        for _ in range(3)
    ]
    # Without torch it is a few milliseconds; 0.2 s would mean that something heavy came in.
    assert min(seconds) < 0.2


def test_a_recipe_without_function_is_named(command, tmp_path):
    finished = command("train", write(tmp_path / "r.py", "x = 1\n"), check=False)
    assert finished.returncode == 2 and "has no function recipe()" in finished.stderr


def test_an_unknown_family_is_named(command, tmp_path):
    recipe = write(
        tmp_path / "recipe.py",
        """
from dataclasses import replace
from megatron_dlm.families.base import ObjectiveConfig
from megatron_dlm.run.config import load_recipe
from pathlib import Path

def recipe():
    return replace(load_recipe(Path("examples/mdlm/tiny.py")), objective=ObjectiveConfig())
""",
    )
    finished = command("train", recipe, "--dry-run", "1", check=False)
    assert finished.returncode == 2
    assert "objective: choose a family, one of ar, mdlm, duo, esolm, block-diffusion" in finished.stderr


def test_a_budget_gives_the_published_steps(command):
    arguments = ["train", "examples/mdlm/113m.py", "--model.size", "66M", "--budget-flops", "6e18"]
    printed = command(*arguments, "--dry-run", "1", "--training.micro-batch-size", 1).stdout
    assert "27,334 steps" in printed, printed
    assert "6e+18 by the published count, at 32,001 ids" in printed


def test_tokenizer_and_index_from_the_command_line(command, tmp_path, read_json):
    text = tiny.write_jsonl(tmp_path / "t.jsonl", tiny.sentences(200, seed=1))
    command("tokenizer", "train", "--input", text, "--output", tmp_path / "tok", "--vocab-size", 280)
    out = command("index", "--input", text, "--output", tmp_path / "d" / "s", "--tokenizer", tmp_path / "tok")
    manifest = read_json(tmp_path / "d" / "s.json")
    assert f"{manifest['num_tokens']:,} tokens" in out.stdout
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\nnonsense\n')
    bad = [
        "--input",
        tmp_path / "bad.jsonl",
        "--output",
        tmp_path / "d" / "t",
        "--tokenizer",
        tmp_path / "tok",
    ]
    failed = command("index", *bad, check=False)
    assert failed.returncode == 2 and "bad.jsonl:2: not JSON" in failed.stderr
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == ["s.bin", "s.idx", "s.json"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--parallel.cuda-graphs", "--training.recompute", "none"],
            "parallel.cuda_graphs: True, and this run is on a CPU",
        ),
        (["--training.precision", "fp8", "--fp8.weights"], "fp8.weights: True, and FP8 is emulated here"),
        (["--telemetry.energy"], "telemetry.energy: True, and this run is on a CPU"),
        (["--telemetry.memory-snapshot"], "telemetry.memory_snapshot: True, and this run is on a CPU"),
    ],
)
def test_what_only_a_gpu_has_is_refused_on_a_cpu(command, corpus, tmp_path, more, message):
    words = ["--data.train", corpus.train, "--data.validation", corpus.validation, "--data.seq-length", 32]
    finished = command("train", RECIPE, *words, *more, "--directory", tmp_path / "run", check=False)
    assert finished.returncode == 2
    assert message in finished.stderr
    assert not (tmp_path / "run").exists()


def test_a_reader_of_the_help_may_leave():
    pipe = f"{sys.executable} -m megatron_dlm train {RECIPE} --help | head -1"
    finished = subprocess.run(pipe, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert "usage" in finished.stdout and not finished.stderr
