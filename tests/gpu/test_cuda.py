"""Training on CUDA is training on the CPU, up to rounding."""

import importlib.util

import pytest
import torch

from megatron_dlm.objectives.registry import OBJECTIVES
from megatron_dlm.telemetry.writers import read_metrics
from tests.helpers.runs import arguments_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("family", OBJECTIVES)
def test_losses_on_cuda_are_those_on_the_cpu(command, corpus, tmp_path, family):
    recipe = f"examples/{family}/tiny.py"
    for device, visible in (("cuda", {"CUDA_VISIBLE_DEVICES": "0"}), ("cpu", {})):
        command(*arguments_for(corpus, tmp_path / device, recipe=recipe, steps=4), **visible)
    curves = [
        [
            (entry["fingerprint"], entry["loss"])
            for entry in read_metrics(tmp_path / device)
            if entry["kind"] == "train"
        ]
        for device in ("cuda", "cpu")
    ]
    for (ours, loss), (theirs, expected) in zip(*curves, strict=True):
        assert ours == theirs
        assert loss == pytest.approx(expected, rel=1e-4)


def test_recorded_layers_train_as_layers_that_run(command, corpus, tmp_path):
    curves = []
    for words in ((), ("--parallel.cuda-graphs", "--data.loader", "pinned")):
        run = tmp_path / str(len(curves))
        more = ("--training.recompute", "none", *words)
        arguments = arguments_for(corpus, run, *more, recipe="examples/mdlm/tiny.py", steps=6)
        command(*arguments, CUDA_VISIBLE_DEVICES="0")
        curves.append([entry["loss"] for entry in read_metrics(run) if entry["kind"] == "train"])
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason="no Transformer Engine")
@pytest.mark.parametrize("family", OBJECTIVES)
def test_transformer_engine_trains_as_the_local_layers_do(command, corpus, tmp_path, family):
    """bf16 up to its rounding, FP8 up to FP8's; the same noise."""
    curves = {}
    for name, words in {
        "local": ("--training.precision", "bf16", "--training.transformer-impl", "local"),
        "bf16": ("--training.precision", "bf16", "--training.transformer-impl", "transformer_engine"),
        "fp8": ("--training.precision", "fp8", "--fp8.recipe", "tensorwise"),
    }.items():
        run = tmp_path / name
        command(
            *arguments_for(corpus, run, *words, recipe=f"examples/{family}/tiny.py", steps=4),
            CUDA_VISIBLE_DEVICES="0",
        )
        curves[name] = [
            (entry["fingerprint"], entry["loss"]) for entry in read_metrics(run) if entry["kind"] == "train"
        ]
    for name, tolerance in (("bf16", 1e-2), ("fp8", 5e-2)):
        for (ours, loss), (theirs, expected) in zip(curves[name], curves["local"], strict=True):
            assert ours == theirs
            assert loss == pytest.approx(expected, rel=tolerance)


@pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason="no Transformer Engine")
@pytest.mark.parametrize("words", [(), ("--fp8.weights",)], ids=["bf16 weights", "fp8 weights"])
def test_fp8_goes_on_where_it_stopped(command, corpus, tmp_path, words):
    more = ("--training.precision", "fp8", "--parallel.deterministic", *words)
    for run, steps in (("whole", 8), ("parts", 4), ("parts", 8)):
        command(*arguments_for(corpus, tmp_path / run, *more, steps=steps), CUDA_VISIBLE_DEVICES="0")
    whole, parts = (
        [entry["loss"] for entry in read_metrics(tmp_path / run) if entry["kind"] == "train"]
        for run in ("whole", "parts")
    )
    assert len(whole) == 8 and parts == whole
