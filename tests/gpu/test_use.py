"""What is done with a GPU run's checkpoint: texts, likelihoods, an export that proves itself; in time."""

import json
import os

import pytest

from megatron_dlm.families.registry import OBJECTIVES
from tests.helpers.devices import DEVICE, HAS_CUDA
from tests.helpers.gpu_runs import DEVICE_WORDS
from tests.helpers.processes import TRAINER, run
from tests.helpers.runs import arguments_for

SAMPLE_SECONDS, NLL_SECONDS, EXPORT_SECONDS = 20, 20, 60
"""Bounds; the first call of a process compiles."""


@pytest.fixture(scope="module")
def checkpoint_of(verbs, corpus, tmp_path_factory):
    made = {}

    def of(family):
        if family not in made:
            directory = tmp_path_factory.mktemp(family)
            recipe = f"examples/{family}/tiny.py"
            words = arguments_for(corpus, directory, *DEVICE_WORDS, recipe=recipe, steps=4)
            assert verbs.run(*words, seconds=120)[0] == 0
            made[family] = directory / "checkpoints" / "step-00000004"
        return made[family]

    return of


@pytest.mark.parametrize("family", OBJECTIVES)
def test_every_family_samples_in_time(verbs, checkpoint_of, tmp_path, family):
    checkpoint = checkpoint_of(family)
    words = ["--num-samples", 2, "--device", DEVICE, "--output", tmp_path / "texts.jsonl"]
    code, _ = verbs.run("sample", checkpoint, *words, seconds=SAMPLE_SECONDS)
    lines = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert code == 0 and [len(line["token_ids"]) for line in lines] == [32, 32]


def test_nll_in_time(verbs, verbs_on_cpu, checkpoint_of, tmp_path):
    """The CPU finds the same bound for the same noise."""
    bounds = []
    for process in (verbs, verbs_on_cpu):
        output = tmp_path / f"{len(bounds)}.json"
        words = ["--num-sequences", 4, "--num-times", 4, "--parallel.device", process.device]
        words += ["--output", output]
        code, _ = process.run("evaluate", "nll", checkpoint_of("mdlm"), *words, seconds=NLL_SECONDS + 40)
        assert code == 0
        bounds.append(json.loads(output.read_text())["protocol"]["nats_per_token"])
    assert bounds[0] == pytest.approx(bounds[1], rel=1e-4)
    words = ["--num-sequences", 4, "--num-times", 4, "--parallel.device", verbs.device]
    assert verbs.run("evaluate", "nll", checkpoint_of("mdlm"), *words, seconds=NLL_SECONDS)[0] == 0


def test_export_proves_itself_in_time(verbs, checkpoint_of, tmp_path):
    folder = tmp_path / "exported"
    pytest.importorskip("transformers")
    # A process of its own: the exported model's arithmetic is compared on the CPU, whatever GPUs there are.
    visible = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")} if HAS_CUDA else {}
    run(*TRAINER, "export", checkpoint_of("mdlm"), folder, timeout=EXPORT_SECONDS, **visible)
    assert (folder / "export_report.json").is_file() and (folder / "config.json").is_file()
    words = ["--num-samples", 1, "--device", DEVICE, "--output", tmp_path / "text.jsonl"]
    assert verbs.run("sample", folder, *words, seconds=SAMPLE_SECONDS)[0] == 0
