"""The model as its samplers see it."""

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


def generate(model, input_ids, max_length, given, seed, batch_size, on_step, settings):
    """int64 [B, max_length]; the arguments are those of `MegatronDlmModel.generate`."""
    process = process_of(model.config)
    if given is not None:
        start = Start(input_ids, given)
    else:
        prompts = [[]] * batch_size if input_ids is None else input_ids
        prompts = prompts.tolist() if torch.is_tensor(prompts) else prompts
        start = start_from(prompts, max_length or model.config.max_position_embeddings, process)
    config = SamplingConfig(**settings)
    return sample(ModelNetwork(model), process, config, start, seed=seed, on_step=on_step)
