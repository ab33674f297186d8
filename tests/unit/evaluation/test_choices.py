"""Whose kernels, linears and attention a run takes, by device and by what is asked for."""

from dataclasses import replace

import pytest
import torch

from megatron_dlm.families.ar.objective import ARConfig
from megatron_dlm.interfaces import InputError
from megatron_dlm.kernels.choice import INTERPRETER, wants_triton
from megatron_dlm.run import validation
from megatron_dlm.run.validation import transformer_impl
from tools import tiny

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    """What the choices ask of a GPU, as an H100 and a Transformer Engine that fits answer."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(validation, "check_transformer_engine", lambda: None)


def test_kernels(monkeypatch):
    pytest.importorskip("triton")
    assert [wants_triton("auto", device) for device in (CPU, CUDA)] == [False, True]
    assert not wants_triton("torch", CUDA)
    monkeypatch.setenv(INTERPRETER, "1")
    assert wants_triton("triton", CPU)
    monkeypatch.delenv(INTERPRETER)
    with pytest.raises(InputError, match=r"kernels: triton on a CPU .* TRITON_INTERPRET=1"):
        wants_triton("triton", CPU)


def test_kernels_without_triton(monkeypatch):
    """CUDA does not fall back to slow code by itself."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="auto on cuda needs triton; or choose torch"):
        wants_triton("auto", CUDA)
    assert not wants_triton("torch", CUDA)


@pytest.mark.parametrize(
    "asked, device, has_triton, graphs, expected",
    [
        ("auto", CPU, False, False, False),
        ("auto", CUDA, True, False, True),
        ("auto", CUDA, False, False, False),
        ("auto", CUDA, True, True, False),
        ("dense", CUDA, True, False, False),
        ("flex", CUDA, True, False, True),
        ("flex", CPU, True, False, "flex needs CUDA: FlexAttention has no gradient on a CPU"),
    ],
)
def test_masked_attention(corpus, asked, device, has_triton, graphs, expected):
    config = tiny.run_config(
        corpus,
        corpus.directory,
        ARConfig(),
        training__masked_attention=asked,
        parallel__cuda_graphs=graphs,
    )
    if isinstance(expected, bool):
        assert validation.wants_flex_attention(config, device, has_triton=has_triton) == expected
    else:
        with pytest.raises(InputError, match=expected):
            validation.wants_flex_attention(config, device, has_triton=has_triton)


def test_masked_attention_on_an_old_gpu(corpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    config = tiny.run_config(corpus, corpus.directory, ARConfig(), training__masked_attention="flex")
    with pytest.raises(
        InputError, match=r"masked_attention: flex needs Triton and a GPU that it compiles for"
    ):
        validation.wants_flex_attention(config, CUDA, has_triton=False)


@pytest.mark.parametrize(
    "precision, asked, device, present, expected",
    [
        ("bf16", "auto", CPU, True, "local"),
        ("fp8", "auto", CPU, False, "local"),
        ("bf16", "auto", CUDA, False, "local"),
        ("bf16", "auto", CUDA, True, "transformer_engine"),
        ("fp8", "auto", CUDA, True, "transformer_engine"),
        ("fp8", "local", CUDA, True, "local"),
        ("fp8", "auto", CUDA, False, "training.precision: fp8 on CUDA needs Transformer Engine"),
        ("bf16", "transformer_engine", CUDA, False, "transformer_engine needs CUDA and"),
        ("bf16", "transformer_engine", CPU, True, "transformer_engine needs CUDA and"),
    ],
)
def test_linears_and_attention(corpus, monkeypatch, precision, asked, device, present, expected):
    monkeypatch.setattr(validation, "has_transformer_engine", lambda: present)
    config = tiny.run_config(corpus, corpus.directory, ARConfig())
    config = replace(config, training=replace(config.training, precision=precision, transformer_impl=asked))
    if expected in ("local", "transformer_engine"):
        assert transformer_impl(config, device) == expected
    else:
        with pytest.raises(InputError, match=expected):
            transformer_impl(config, device)
