"""The model as its samplers see it."""

from dataclasses import fields

import torch

from megatron_dlm.sampling.generate import sample
from megatron_dlm.sampling.network import Process
from megatron_dlm.sampling.settings import SamplingConfig
from megatron_dlm.sampling.start import Start, start_from

from .noise_megatron_dlm import alpha_and_slope


class ModelNetwork:
    """An exported model behind the samplers' protocol."""

    def __init__(self, model):
        self.model = model
        self.device = model.device
        self.head = model.head
        self.start_cache = model.start_cache

    def hidden(self, ids, rows, sigma=None, visible=None):
        """[R, hidden] where `rows`."""
        return self.model.hidden(ids, sigma=sigma, visible_mask=visible)[rows]


def process_of(config):
    """The noise the model was trained to undo."""

    def alpha(t):
        return float(alpha_and_slope(config, torch.tensor(t, dtype=torch.float64))[0])

    names = ("family", "vocab_size", "mask_token_id", "bos_token_id", "eos_token_id")
    names += ("mask_in_noise", "time_conditioning", "block_size")
    return Process(alpha=alpha, **{name: getattr(config, name) for name in names})


def prompts_of(input_ids, attention_mask, batch_size):
    """Lists of token ids, without padding."""
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
    """int64 [B, max_length]; the arguments are those of `MegatronDlmModel.generate`."""
    process = process_of(model.config)
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
        start = start_from(prompts, length, process)
    return sample(ModelNetwork(model), process, config, start, seed=seed, on_step=on_step)
