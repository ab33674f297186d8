"""Transformer Engine's bf16 and FP8 train as the local layers do, up to their rounding; the same noise."""

import importlib.util

import pytest
import torch

from megatron_dlm.families.registry import OBJECTIVES
from megatron_dlm.models.precision.fp8 import CAPABILITIES
from tests.helpers.devices import HAS_CUDA
from tests.helpers.gpu_runs import DEVICE_WORDS, curve
from tests.helpers.runs import arguments_for

HAS_ENGINE = HAS_CUDA and importlib.util.find_spec("transformer_engine") is not None
pytestmark = pytest.mark.skipif(HAS_CUDA and not HAS_ENGINE, reason="no Transformer Engine")
# A rehearsal compares the local layers with themselves and with emulated FP8.
ENGINE = "transformer_engine" if HAS_ENGINE else "auto"
CAPABILITY = torch.cuda.get_device_capability() if HAS_CUDA else (10, 0)


def needs(recipe):
    least = CAPABILITIES[recipe]
    reason = f"{recipe} needs compute capability {least[0]}.{least[1]}"
    # Consumer Blackwell, 12.x, has no MXFP8 products in Transformer Engine 2.11.
    missing = CAPABILITY < least or (recipe == "mxfp8" and CAPABILITY[0] == 12)
    return pytest.param(recipe, marks=pytest.mark.skipif(missing, reason=reason))


RECIPES = [needs(recipe) for recipe in CAPABILITIES]


def train(verbs, corpus, directory, family, *words, steps=4):
    recipe = f"examples/{family}/tiny.py"
    words = arguments_for(corpus, directory, *words, *DEVICE_WORDS, recipe=recipe, steps=steps)
    assert verbs.run(*words, seconds=120)[0] == 0
    return curve(directory)


@pytest.fixture(scope="module")
def local_curve(verbs, corpus, tmp_path_factory):
    """bf16 of a family on local layers, made once."""
    made = {}

    def of(family):
        if family not in made:
            words = ("--training.precision", "bf16", "--training.transformer-impl", "local")
            made[family] = train(verbs, corpus, tmp_path_factory.mktemp(family), family, *words)
        return made[family]

    return of


def assert_close(ours, theirs, tolerance):
    for (fingerprint, loss), (expected_fingerprint, expected) in zip(ours, theirs, strict=True):
        assert fingerprint == expected_fingerprint
        assert loss == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("family", OBJECTIVES)
def test_bf16_trains_as_local_layers(verbs, corpus, tmp_path, local_curve, family):
    words = ("--training.precision", "bf16", "--training.transformer-impl", ENGINE)
    assert_close(train(verbs, corpus, tmp_path, family, *words), local_curve(family), 1e-2)


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_trains_as_local_layers(verbs, corpus, tmp_path, local_curve, recipe):
    words = ("--training.precision", "fp8", "--fp8.recipe", recipe)
    assert_close(train(verbs, corpus, tmp_path, "mdlm", *words), local_curve("mdlm"), 5e-2)


@pytest.mark.parametrize("family", OBJECTIVES)
def test_every_family_trains_in_fp8(verbs, corpus, tmp_path, local_curve, family):
    words = ("--training.precision", "fp8", "--fp8.recipe", "tensorwise")
    assert_close(train(verbs, corpus, tmp_path, family, *words), local_curve(family), 5e-2)


@pytest.mark.parametrize("weights", [False, True], ids=["bf16 weights", "fp8 weights"])
def test_fp8_goes_on_where_it_stopped(verbs, corpus, tmp_path, weights):
    if weights and not HAS_ENGINE:
        pytest.skip("FP8 weights are Transformer Engine's")
    words = ("--training.precision", "fp8", "--parallel.deterministic", *["--fp8.weights"] * weights)
    whole = train(verbs, corpus, tmp_path / "whole", "mdlm", *words, steps=8)
    train(verbs, corpus, tmp_path / "parts", "mdlm", *words, steps=4)
    parts = train(verbs, corpus, tmp_path / "parts", "mdlm", *words, steps=8)
    assert len(whole) == 8 and parts == whole
