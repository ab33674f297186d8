"""Connects the exported model to its samplers and implements `generate`."""

from dataclasses import fields

import torch

from megatron_dlm.sampling.generate import sample
from megatron_dlm.sampling.settings import SamplingConfig
from megatron_dlm.sampling.start import Start, start_from

from .family_megatron_dlm import sampler_for


class ModelNetwork:
    """An exported model wrapped as the network that samplers call."""

    def __init__(self, model):
        self.model = model
        self.device = model.device
        self.head = model.head
        self.start_cache = model.start_cache

    def hidden(self, ids, rows, sigma=None, visible=None):
        """Hidden states [R, hidden] at the positions where `rows` is True."""
        return self.model.hidden(ids, sigma=sigma, visible_mask=visible)[rows]


def prompts_of(input_ids, attention_mask, batch_size):
    """Prompts as lists of token ids, without padding."""
    if input_ids is None:
        return [[]] * batch_size
    if not torch.is_tensor(input_ids):
        return input_ids
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids: {tuple(input_ids.shape)} instead of [B, P]")
    if attention_mask is None:
        return input_ids.tolist()
    if attention_mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask: {tuple(attention_mask.shape)} is not input_ids' shape")
    return [row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)]


def generate(model, prompts, max_length, max_new_tokens, given, seed, on_step, settings):
    """Sampled tokens, int64 [B, max_length]; the arguments are those of `MegatronDlmModel.generate`."""
    family = sampler_for(model.config)
    known = [field.name for field in fields(SamplingConfig)]
    for name in settings:
        if name not in known:
            raise ValueError(f"generate: has no argument {name}; its settings are {', '.join(known)}")
    config = SamplingConfig(**settings)
    if given is not None:
        start = Start(torch.tensor(prompts), given)
    else:
        if max_new_tokens is not None:
            if max_length is not None:
                raise ValueError("max_length, max_new_tokens: give one of them")
            max_length = max(map(len, prompts)) + max_new_tokens
        length = model.config.max_position_embeddings if max_length is None else max_length
        if length < 1:
            raise ValueError(f"max_length: {length} is below 1")
        start = start_from(prompts, length, family)
    return sample(ModelNetwork(model), family, config, start, seed=seed, on_step=on_step)
