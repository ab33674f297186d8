"""Folders of published models: read in each form that they may have, refused where they do not fit."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from megatron_dlm.conversion.hugging_face_model.configuration_megatron_dlm import MegatronDlmConfig
from megatron_dlm.conversion.hugging_face_model.modeling_megatron_dlm import MegatronDlmModel
from megatron_dlm.conversion.published_folder import PublishedFolder
from megatron_dlm.conversion.reference import ROTARY_BUFFER
from megatron_dlm.conversion.to_hugging_face import hugging_face_fields
from megatron_dlm.families.duo.objective import DuoConfig
from megatron_dlm.families.mdlm.objective import MDLMConfig
from megatron_dlm.interfaces import InputError, Vocabulary
from megatron_dlm.models.config import ModelConfig
from tests.helpers.weights import random_state
from tools.oracle.networks import recorded_shape

MODEL = ModelConfig(
    num_layers=2, hidden_size=12, num_attention_heads=3, ffn_hidden_size=48, conditioning_size=8
)
VOCABULARY = Vocabulary(size=19, mask_token_id=3, eos_token_id=2, bos_token_id=1)
RECORDED = {"bidir_sigma0": MDLMConfig(), "bidir_sigma": DuoConfig()}
FORMS = ["safetensors", "shards", "bin", "bin shards"]


@pytest.fixture
def state():
    frequencies = 1.0 / 10000 ** (torch.arange(0, 4, 2).float() / 4)
    return random_state(MODEL, VOCABULARY.size) | {ROTARY_BUFFER: frequencies}


def write_folder(path, state, form="safetensors", prefix="backbone.", config=()):
    """A folder as transformers names its files; shards are two."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "sdllm", **dict(config)}))
    named = {prefix + name: tensor.clone() for name, tensor in state.items()}
    stem, ending, write = {
        "safetensors": ("model", "safetensors", save_file),
        "bin": ("pytorch_model", "bin", torch.save),
    }[{"shards": "safetensors", "bin shards": "bin"}.get(form, form)]
    if not form.endswith("shards"):
        write(named, path / f"{stem}.{ending}")
        return path
    place = {name: f"{stem}-0000{1 + index % 2}-of-00002.{ending}" for index, name in enumerate(named)}
    for file in set(place.values()):
        write({name: tensor for name, tensor in named.items() if place[name] == file}, path / file)
    (path / f"{stem}.{ending}.index.json").write_text(json.dumps({"weight_map": place}))
    return path


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("prefix", ["", "backbone.", "model.backbone."])
def test_every_form_gives_every_bit(state, tmp_path, form, prefix):
    folder = write_folder(tmp_path / "model", state, form, prefix, {"mask_token_id": 3})
    found = PublishedFolder(folder).weights(MODEL, VOCABULARY)
    del state[ROTARY_BUFFER]
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize(("network", "objective"), RECORDED.items())
@torch.no_grad()
def test_recorded_networks_give_their_logits(oracle, tmp_path, network, objective):
    arrays = {key[4:]: oracle[key] for key in oracle.files if key.startswith("net/")}
    shape, vocabulary = recorded_shape(arrays)
    weights = {key[2:]: torch.from_numpy(arrays[key]) for key in arrays if key.startswith("w/")}
    folder = PublishedFolder(write_folder(tmp_path / "model", weights, "bin shards"))
    fields = hugging_face_fields(shape, vocabulary, objective)
    model = MegatronDlmModel(MegatronDlmConfig(**fields, max_position_embeddings=64)).eval()
    model.load_state_dict(dict(folder.weights(shape, vocabulary)))
    sigma = torch.from_numpy(arrays["sigma"]).float() * objective.time_conditioning
    logits = model(torch.from_numpy(arrays["x"]), sigma=sigma).logits
    expected = torch.from_numpy(arrays[network])
    ids = [i for i in range(vocabulary.size) if i != vocabulary.mask_token_id]
    assert (logits - expected)[..., ids].abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("output_layer.linear.bias"), "lacks tensor output_layer.linear.bias"),
        (lambda state: state.update({"lm_head.weight": torch.ones(3)}), "unknown tensor .*lm_head.weight"),
        (
            lambda state: state.update({"output_layer.linear.bias": torch.ones(18)}),
            r"output_layer.linear.bias.* shape \(18,\), not \(19,\)",
        ),
        (lambda state: state.update({ROTARY_BUFFER: torch.ones(2)}), "not that of head dimension 4"),
        (lambda state: state.update({"x": torch.ones(2, dtype=torch.int64)}), "x"),
    ],
    ids=["lacks", "unknown", "shape", "rotary", "integers"],
)
def test_other_tensors_are_refused_by_name(state, tmp_path, form, change, words):
    change(state)
    folder = write_folder(tmp_path / "model", state, form)
    with pytest.raises(InputError, match=words):
        PublishedFolder(folder).weights(MODEL, VOCABULARY)


def test_another_mask_token_is_refused(state, tmp_path):
    folder = write_folder(tmp_path / "model", state, config={"mask_index": 18})
    with pytest.raises(InputError, match=r"config.json: mask_index 18 is not 3, the tokenizer's mask token"):
        PublishedFolder(folder).weights(MODEL, VOCABULARY)


def test_folders_without_weights_or_with_others_shapes_are_refused(state, tmp_path):
    folder = write_folder(tmp_path / "model", state)
    with pytest.raises(InputError, match=r"shape"):
        PublishedFolder(folder).weights(MODEL, replace(VOCABULARY, size=20))
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        InputError, match=r"has none of model.safetensors, .* and pytorch_model.bin.index.json"
    ):
        PublishedFolder(folder).weights(MODEL, VOCABULARY)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"has no config.json"):
        PublishedFolder(folder)


def test_a_pickle_that_names_programs_is_refused(state, tmp_path):
    class Program:
        def __reduce__(self):
            return print, ("run",)

    folder = write_folder(tmp_path / "model", state)
    (folder / "model.safetensors").unlink()
    torch.save(state | {"x": Program()}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"names (builtins|__builtin__).print; refused"):
        PublishedFolder(folder).weights(MODEL, VOCABULARY)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_two_names_of_one_tensor_are_refused(state, tmp_path, form):
    folder = write_folder(
        tmp_path / "model", state | {"model.output_layer.linear.bias": torch.ones(19)}, form, ""
    )
    words = r"tensors output_layer.linear.bias and model.output_layer.linear.bias are the same one"
    with pytest.raises(InputError, match=words):
        PublishedFolder(folder).weights(MODEL, VOCABULARY)


@pytest.mark.parametrize("files", [{"a": 1, "b": "x"}, {"a": [1]}, {"a": "../x.bin"}, "x"])
def test_a_damaged_index_is_one_line(state, tmp_path, files):
    folder = write_folder(tmp_path / "model", state, "bin shards")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    with pytest.raises(InputError, match=r"points at|has no weight_map"):
        PublishedFolder(folder).weights(MODEL, VOCABULARY)
