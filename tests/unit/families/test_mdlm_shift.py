"""MDLM that predicts a masked token at the position before it, as AR does."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_dlm.conversion.hugging_face_model.generation_megatron_dlm import ModelNetwork
from megatron_dlm.diffusion.context import CorruptionContext
from megatron_dlm.families.mdlm.objective import MDLMConfig
from megatron_dlm.families.mdlm.sampler import Sampler
from megatron_dlm.interfaces import InputError, TokenBatch
from megatron_dlm.platform.rng import NoiseSource
from megatron_dlm.sampling.generate import sample
from megatron_dlm.sampling.settings import SamplingConfig
from megatron_dlm.sampling.start import start_from
from tests.helpers.exported import LENGTH, VOCABULARY, build

SHIFTED = MDLMConfig(shift=True)


def corrupted(config, loss_mask=None):
    tokens = torch.arange(6 * 9).reshape(6, 9) % 4
    batch = TokenBatch(token_ids=tokens, sample_indices=np.arange(6), loss_mask=loss_mask)
    context = CorruptionContext(
        noise=NoiseSource(3), batch_start=0, global_batch_size=6, training=True, step=0
    )
    return tokens, *config.build(VOCABULARY).corrupt(batch, context)


@pytest.mark.parametrize("has_prompts", [False, True])
def test_the_noise_is_mdlm_s_and_each_token_has_its_loss_one_position_earlier(has_prompts):
    loss_mask = torch.ones(6, 9, dtype=torch.bool)
    loss_mask[:, :3] = False
    kept = loss_mask.clone() if has_prompts else None
    tokens, inputs, targets = corrupted(SHIFTED, kept)
    _, plain_inputs, plain_targets = corrupted(MDLMConfig(), kept)
    assert torch.equal(inputs.token_ids_BL[:, 1:], plain_inputs.token_ids_BL[:, 1:])
    assert torch.equal(inputs.token_ids_BL[:, 0], tokens[:, 0])
    assert torch.equal(targets.clean_BL, tokens[:, 1:])
    for name in ("weight_BL", "bound_weight_BL"):
        assert torch.equal(getattr(targets, name)[:, :-1], getattr(plain_targets, name)[:, 1:])
    # The look-ahead token too.
    assert set(targets.weight_BL[:, -1].tolist()) <= {0.0, 1.0} and targets.weight_BL[:, -1].sum() > 0
    assert targets.token_count == 6 * (6 if has_prompts else 8)
    assert kept is None or torch.equal(kept, loss_mask)


class Moved:
    """A network each of whose positions predicts the token behind it."""

    def __init__(self, network):
        self._network = network

    def __getattr__(self, name):
        return getattr(self._network, name)

    def hidden(self, ids_BL, wanted_BL, *arguments):
        return self._network.hidden(ids_BL, wanted_BL.roll(1, dims=1), *arguments)


SETTINGS = {
    "ancestral": {"num_steps": 5},
    "psi": {"num_steps": 5, "kappa": 0.4},
    "remasking": {"num_steps": 5, "remasking": "cap", "remasking_strength": 0.3},
    "confidence": {"num_steps": 4},
    "block": {"num_steps": 11},
    "block-autoregressive": {"segment_length": 11, "num_groups": 1},
    "left-to-right": {},
}


@pytest.mark.parametrize("name", Sampler.samplers)
@pytest.mark.parametrize("time_conditioning", [False, True])
def test_samples_are_those_of_a_network_that_predicts_in_place(name, time_conditioning):
    config = MDLMConfig(time_conditioning=time_conditioning)
    model = build(config)
    network = ModelNetwork(model)
    family = Sampler.from_config(model.config)
    shifted = replace(family, shift=True)
    settings = SamplingConfig(sampler=name, **SETTINGS[name]).resolved(family)
    start = start_from([[1], [2], [3]], LENGTH, family)
    expected = sample(network, family, settings, start, seed=2, samples=range(3))
    found = sample(Moved(network), shifted, settings, start, seed=2, samples=range(3))
    assert torch.equal(found, expected)
    assert not torch.equal(sample(network, shifted, settings, start, seed=2, samples=range(3)), expected)


def test_a_text_begins_with_a_given_token():
    family = replace(Sampler.from_config(build(MDLMConfig()).config), shift=True)
    assert family.empty_prompt == (VOCABULARY.bos_token_id,)
    with pytest.raises(ValueError, match="needs a first token"):
        family.check_given(torch.tensor([[True, False], [False, True]]))
    settings = SamplingConfig(sampler="ancestral", num_steps=2, guidance_scale=2.0).resolved(family)
    with pytest.raises(ValueError, match=r"guidance_scale: 2, and a model with objective\.shift"):
        family.reading(settings)
    with pytest.raises(
        InputError, match=r"objective\.ssl_ratio: 0\.1, and objective\.shift reads whole samples"
    ):
        MDLMConfig(shift=True, ssl_ratio=0.1)
