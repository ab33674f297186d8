"""Training on CUDA is training on the CPU, up to rounding."""

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
