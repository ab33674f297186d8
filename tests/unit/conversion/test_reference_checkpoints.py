"""Lightning checkpoints of the paper's code: what is read, what is refused."""

import collections
import os
import pathlib
import subprocess
import types
import typing
from dataclasses import replace

import numpy
import pytest
import torch

from megatron_dlm.conversion.reference import (
    read_reference_checkpoint,
    write_reference_checkpoint,
)
from megatron_dlm.interfaces import InputError, Vocabulary
from megatron_dlm.models.config import ModelConfig
from tests.helpers.weights import random_state

MODEL = ModelConfig(
    num_layers=2, hidden_size=12, num_attention_heads=3, ffn_hidden_size=48, conditioning_size=8
)
VOCABULARY = Vocabulary(size=19, mask_token_id=18, eos_token_id=0, bos_token_id=1)


@pytest.fixture
def state():
    return random_state(MODEL, VOCABULARY.size)


def read(path):
    return read_reference_checkpoint(path, MODEL, VOCABULARY)


def test_round_trip_is_bit_exact(state, tmp_path):
    path = tmp_path / "new" / "directory" / "model.ckpt"
    write_reference_checkpoint(state, path, MODEL, step=7)
    again = read(path)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    raw = torch.load(path, weights_only=True)
    assert raw["global_step"] == 7 and "backbone.blocks.1.attn_qkv.weight" in raw["state_dict"]
    assert raw["state_dict"]["backbone.rotary_emb.inv_freq"].shape == (2,)
    with pytest.raises(InputError, match="exists already"):
        write_reference_checkpoint(state, path, MODEL, step=7)


def test_the_order_to_load_tensors_alone_is_lifted_for_this_file_only(state, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    path = lightning_file(state, tmp_path / "model.ckpt", data=pathlib.Path("/data"))
    assert read(path).keys() == state.keys()
    assert os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] == "1"


def test_names_are_those_of_the_reference(oracle):
    names = {key.removeprefix("net/w/") for key in oracle.files if key.startswith("net/w/")}
    assert names == random_state(MODEL, VOCABULARY.size).keys()


def lightning_file(state, path, **more):
    """As Lightning writes it: names with a prefix, and beside them whatever the run kept."""
    torch.save({"state_dict": {f"backbone.{k}": v for k, v in state.items()}, **more}, path)
    return path


def test_configuration_objects_become_placeholders(state, tmp_path, monkeypatch):
    import sys

    library = types.ModuleType("omegaconf")
    nested = types.ModuleType("omegaconf.dictconfig")
    kept = type("DictConfig", (dict,), {"__module__": "omegaconf.dictconfig", "__qualname__": "DictConfig"})
    nested.DictConfig = kept
    monkeypatch.setitem(sys.modules, "omegaconf", library)
    monkeypatch.setitem(sys.modules, "omegaconf.dictconfig", nested)
    # Items, attributes, builtin types and containers, as real configurations hold them.
    instance = kept(length=2048)
    instance.types = [int, dict, typing.Any]
    counts = collections.defaultdict(list, seen=[1, 2])
    kept_objects = {"config": instance, "counts": counts, "path": pathlib.Path("/data")}
    path = lightning_file(state, tmp_path / "model.ckpt", hyper_parameters=kept_objects)
    monkeypatch.undo()
    assert "omegaconf" not in sys.modules
    assert torch.equal(read(path)["blocks.0.norm1.weight"], state["blocks.0.norm1.weight"])
    assert "omegaconf" not in sys.modules


class Malicious:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "function", [os.system, eval, subprocess.getoutput, getattr], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("place", ["callbacks", "state_dict"])
def test_a_malicious_pickle_is_refused_and_does_not_run(state, tmp_path, place, function):
    witness = tmp_path / "witness"
    argument = f"open({str(witness)!r}, 'w')" if function is eval else f"touch {witness}"
    bad = Malicious(function, argument)
    if place == "state_dict":
        path = lightning_file(state | {"x": bad}, tmp_path / "model.ckpt")
    else:
        path = lightning_file(state, tmp_path / "model.ckpt", callbacks=bad)
    with pytest.raises(InputError, match=rf"its pickle names \w+\.{function.__name__}; refused"):
        read(path)
    assert not witness.exists()


class Program(torch.nn.Module):
    """Its state is set by compiled code."""

    @torch.jit.export
    def __getstate__(self):
        return 1, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[int, bool]):
        print("this ran")
        self.training = state[1]

    def forward(self, x):
        return x


def test_a_torchscript_program_is_refused_and_does_not_run(tmp_path, capfd):
    path = tmp_path / "model.ckpt"
    torch.jit.script(Program()).save(str(path))
    capfd.readouterr()
    with pytest.raises(InputError, match="is a TorchScript program, not a checkpoint; refused"):
        read(path)
    assert "this ran" not in "".join(capfd.readouterr())


def test_functions_of_inert_packages_do_not_run(state, tmp_path):
    witness = tmp_path / "witness"
    path = lightning_file(
        state, tmp_path / "model.ckpt", x=Malicious(numpy.memmap, str(witness), "uint8", "w+", 0, 1)
    )
    read(path)
    assert not witness.exists()


def test_wrong_contents_are_named(state, tmp_path):
    def complaint(name, path):
        with pytest.raises(InputError, match=name):
            read(path)

    path = tmp_path / "model.ckpt"
    complaint("no such file", path)
    path.write_bytes(b"not a checkpoint")
    complaint("unreadable", path)
    torch.save([1], path)
    complaint("holds a list", path)
    torch.save({"weights": {}}, path)
    complaint("has no state_dict", path)
    missing = dict(state)
    del missing["blocks.1.norm2.weight"]
    complaint(r"lacks backbone\.blocks\.1\.norm2\.weight", lightning_file(missing, path))
    complaint(
        r"has an unknown tensor backbone\.extra", lightning_file(state | {"extra": torch.ones(1)}, path)
    )
    wrong = state | {"blocks.0.norm1.weight": torch.ones(5)}
    complaint(
        r"backbone\.blocks\.0\.norm1\.weight has shape \(5,\), the model \(12,\)", lightning_file(wrong, path)
    )
    other = {"rotary_emb.inv_freq": torch.ones(2)}
    complaint("rotary_emb.inv_freq is not that of head dimension 4", lightning_file(state | other, path))
    other = {"rotary_emb.inv_freq": torch.ones(3)}
    complaint("rotary_emb.inv_freq is not that of head dimension 4", lightning_file(state | other, path))
    complaint(
        r"state_dict entry 'backbone\.x' is not a floating", lightning_file(state | {"x": "text"}, path)
    )
    torch.save({"state_dict": {1: torch.ones(1)}}, path)
    complaint("state_dict entry 1 is not a floating-point tensor", path)
    larger = replace(VOCABULARY, size=20)
    lightning_file(state, path)
    with pytest.raises(InputError, match=r"vocab_embed.embedding has shape \(19, 12\), the model \(20, 12\)"):
        read_reference_checkpoint(path, MODEL, larger)
