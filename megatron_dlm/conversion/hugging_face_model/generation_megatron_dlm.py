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
    """Prompts as lists of token ids, without the padding on their left."""
    if input_ids is None:
        if attention_mask is not None:
            raise ValueError("attention_mask: given without input_ids")
        return [[]] * batch_size
    if not torch.is_tensor(input_ids):
        if attention_mask is not None:
            raise ValueError("attention_mask: not for lists of prompts, which need no padding")
        return [list(prompt) for prompt in input_ids]
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids: {tuple(input_ids.shape)} instead of [B, P]")
    if attention_mask is None:
        return input_ids.tolist()
    if attention_mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask: {tuple(attention_mask.shape)} is not input_ids' shape")
    prompts = []
    for row, (ids, kept) in enumerate(zip(input_ids.tolist(), attention_mask.bool().tolist(), strict=True)):
        count = sum(kept)
        if not count:
            raise ValueError(f"attention_mask: row {row} is all padding")
        if not all(kept[len(kept) - count :]):
            raise ValueError(
                f"attention_mask: row {row} has padding that is not on the left; set the tokenizer's "
                "padding_side to 'left'"
            )
        prompts.append(ids[len(ids) - count :])
    return prompts


def generate(model, prompts, max_length, max_new_tokens, copies, given, seed, on_step, settings):
    """Sampled tokens; the arguments are those of `MegatronDlmModel.generate`, `copies` of each prompt."""
    family = sampler_for(model.config)
    known = [field.name for field in fields(SamplingConfig)]
    for name in settings:
        if name not in known:
            raise ValueError(f"generate: has no argument {name}; its settings are {', '.join(known)}")
    if copies < 1:
        raise ValueError(f"num_return_sequences: {copies} is below 1")
    config = SamplingConfig(**settings)
    seed = int(torch.randint(2**62, ())) if seed is None else seed
    network = ModelNetwork(model)
    if given is not None:
        start = Start(torch.tensor(prompts), given)
        _check_length(start.ids_BL.shape[1], model)
        rows = torch.arange(len(prompts)).repeat_interleave(copies)
        start = Start(start.ids_BL[rows], given[rows.to(given.device)])
        return sample(network, family, config, start, seed=seed, on_step=on_step)
    prompts = [list(prompt or family.empty_prompt) for prompt in prompts for _ in range(copies)]
    width = max(map(len, prompts), default=0)
    if max_new_tokens is not None:
        if max_length is not None:
            raise ValueError("max_length, max_new_tokens: give one of them")
        max_length = width + max_new_tokens
    length = model.config.max_position_embeddings if max_length is None else max_length
    if length < 1:
        raise ValueError(f"max_length: {length} is below 1")
    _check_length(length, model)
    # Texts of one length are sampled together: the network has no padding then, and a text does not depend on
    # the others.
    sizes = sorted(set(map(len, prompts)))
    if on_step is not None and len(sizes) > 1:
        raise ValueError("on_step: for prompts of one length")
    ids = torch.full((len(prompts), length), padding_of(model.config), device=model.device)
    for size in sizes:
        rows = [row for row, prompt in enumerate(prompts) if len(prompt) == size]
        start = start_from([prompts[row] for row in rows], length - width + size, family)
        texts = sample(network, family, config, start, seed=seed, samples=rows, on_step=on_step)
        ids[rows, width - size :] = texts
    return ids


def padding_of(config):
    """Id that fills what a batch leaves empty: the padding token's, or <eos>."""
    padding = getattr(config, "pad_token_id", None)
    return config.eos_token_id if padding is None else padding


def _check_length(length, model):
    longest = model.config.max_position_embeddings
    if length > longest:
        raise ValueError(f"max_length: {length} is above {longest}, the tokens that the model was trained on")
