"""The adaLN transformer of arXiv:2602.15014, with the training loss, bound and samplers of its family.

Depends on torch and transformers alone. B sequences, L tokens, V ids.
"""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

# transformers copies only what is imported in this form.
from .cache_megatron_dlm import KeyValueCache
from .configuration_megatron_dlm import MegatronDlmConfig
from .family_megatron_dlm import likelihood_for
from .generation_megatron_dlm import generate, prompts_of
from .network_megatron_dlm import Block, OutputLayer, TimeEmbedding, VocabularyEmbedding
from .padding_megatron_dlm import check_ids, check_length, positions_of, visible_of
from .resaving_megatron_dlm import copy_export_files


class MegatronDlmModel(PreTrainedModel):
    """Logits, training loss, bound and samplers of one family of language models."""

    config_class = MegatronDlmConfig
    base_model_prefix = "megatron_dlm"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    """Trainer gives `forward` the number of tokens in all microbatches of a step."""
    # A list: transformers adds to it.
    _no_split_modules = ["Block"]  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.vocab_embed = VocabularyEmbedding(config)
        self.sigma_map = TimeEmbedding(config)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.num_hidden_layers)])
        self.output_layer = OutputLayer(config)
        self.gradient_checkpointing = False
        if not self.can_generate():
            # peft asks every model of its type CAUSAL_LM for both. The first is no method, since
            # transformers 4 warns of models that have one and are no GenerationMixin.
            self.prepare_inputs_for_generation = _as_they_are
            self.generation_config = None
        self.post_init()

    def _init_weights(self, module):
        """A checkpoint holds every tensor, so nothing is drawn here."""

    def get_input_embeddings(self):
        """The token embedding, whose `weight` is [V, hidden]."""
        return self.vocab_embed

    def set_input_embeddings(self, value):
        """Replace the token embedding by a module with a `weight` [V, hidden]."""
        if value.weight.shape[1] != self.config.hidden_size:
            raise ValueError(f"embeddings: {tuple(value.weight.shape)} is not [V, {self.config.hidden_size}]")
        self.vocab_embed.embedding = nn.Parameter(value.weight.data)

    def get_output_embeddings(self):
        """The head, whose `weight` is [V, hidden]; it has a bias, too."""
        return self.output_layer.linear

    def set_output_embeddings(self, new_embeddings):
        """Replace the head by a linear module of the same input size."""
        self.output_layer.linear = new_embeddings

    def resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None, mean_resizing=True):
        """Change the size of the vocabulary; embedding and head of new ids are the mean of the others.

        Uniform noise then draws the new ids too, so a model of such a family has another likelihood.

        Args:
            new_num_tokens: number of ids, the mask token's among them; None: only round up.
            pad_to_multiple_of: round the number up to a multiple of this.
            mean_resizing: must be True.

        Returns:
            The token embedding.
        """
        if not mean_resizing:
            raise ValueError("mean_resizing: False is not supported; new ids get the mean of the others")
        size = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        size += -size % (pad_to_multiple_of or 1)
        special = [self.config.mask_token_id, self.config.eos_token_id, self.config.bos_token_id]
        if size <= max(token for token in special if token is not None):
            raise ValueError(f"new_num_tokens: {size} would remove a special token of {special}")
        with torch.no_grad():
            self.vocab_embed.embedding = _resized(self.vocab_embed.embedding, size)
            head = self.output_layer.linear
            head.weight, head.bias = _resized(head.weight, size), _resized(head.bias, size)
        head.out_features = self.config.vocab_size = self.vocab_size = size
        return self.vocab_embed

    def save_pretrained(self, save_directory, **kwargs):
        """Save as transformers does, with the files beside the weights that megatron_dlm reads."""
        super().save_pretrained(save_directory, **kwargs)
        copy_export_files(self.config._name_or_path, save_directory)

    def _upload_modified_files(self, working_dir, *args, **kwargs):
        # Within `save_pretrained(push_to_hub=True)`, before the files are beside the weights.
        copy_export_files(self.config._name_or_path, working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        labels=None,
        sigma=None,
        visible_mask=None,
        inputs_embeds=None,
        num_items_in_batch=None,
        return_dict=None,
        output_attentions=None,
        output_hidden_states=None,
    ):
        """Logits of every position, and with labels the training loss.

        With labels, `input_ids` are clean: time and noise are drawn from torch's random state, tokens with a
        label are noised, and the loss is the family's bound from that one draw, in nats per label: unbiased,
        so its mean over many batches is the bound, but noisy. The logits are then those of the noisy tokens,
        in an order that is up to the family.

        Args:
            input_ids: int64 [B, L].
            attention_mask: [B, L], 0 at padding, on either side; None: no padding.
            position_ids: int64 [B, L] or [1, L]; None: 0, 1, 2 ... without padding. Tokens may be in any
                order.
            labels: int64 [B, L], `input_ids` where a token is noised and scored, -100 where it is given.
            sigma: [B] noise level -ln(alpha) for families that condition on it; zeros when absent.
            visible_mask: bool [L, L], True where a row attends to a column; the family's own pattern when
                absent.
            inputs_embeds: [B, L, hidden] instead of `input_ids`, without labels.
            num_items_in_batch: number that the loss is divided by; None: the labels that are not -100.
            return_dict: False returns a tuple.
            output_attentions: must not be True.
            output_hidden_states: must not be True.

        Returns:
            MaskedLMOutput with float32 logits [B, L, V], where the mask token's are -inf, and the loss.
        """
        refuse_outputs(output_attentions, output_hidden_states)
        loss = None
        if labels is None:
            check_ids(input_ids, self.config)
            logits = self.head(
                self.hidden(input_ids, sigma, position_ids, visible_mask, None, attention_mask, inputs_embeds)
            )
        else:
            if not (position_ids is sigma is visible_mask is inputs_embeds is None):
                raise ValueError(
                    "labels: not with position_ids, sigma, visible_mask or inputs_embeds; with labels the "
                    "model draws the noise"
                )
            loss, logits = likelihood_for(self.config).training_loss(
                self, input_ids, labels, attention_mask, num_items_in_batch
            )
        return output_of(MaskedLMOutput(loss=loss, logits=logits), return_dict)

    def hidden(
        self,
        input_ids,
        sigma=None,
        position_ids=None,
        visible_mask=None,
        cache=None,
        attention_mask=None,
        inputs_embeds=None,
    ):
        """Final hidden states [B, L, hidden], the input of the head.

        Args:
            input_ids: int64 [B, L].
            sigma: as in `forward`.
            position_ids: as in `forward`.
            visible_mask: bool [..., L, L], or with a cache [B or 1, 1, L, cached + L].
            cache: `KeyValueCache` of the preceding tokens, or an object with the same `layer`; keys and
                values of `input_ids` are appended.
            attention_mask: as in `forward`; with a cache, `visible_mask` tells of padding.
            inputs_embeds: as in `forward`.

        Returns:
            Hidden states in the head's dtype.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: give one of them")
        x = self.vocab_embed(input_ids) if inputs_embeds is None else inputs_embeds
        if attention_mask is not None:
            visible_mask = visible_of(attention_mask, x, visible_mask, self.config.causal)
        if position_ids is None:
            check_length(x.shape[1], self.config)
            position_ids = positions_of(attention_mask, x)
        if sigma is None:
            sigma = torch.zeros(x.shape[0], device=x.device)
        conditioning = self.sigma_map(sigma)
        cos, sin = self._rotary(position_ids)
        x = x.float()
        for index, block in enumerate(self.blocks):
            inputs = x, conditioning, cos, sin, visible_mask
            if cache is not None:
                x = block(*inputs, cache.layer(index))
            elif self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(block.__call__, *inputs)
            else:
                x = block(*inputs)
        return self.output_layer(x, conditioning)

    def head(self, hidden):
        """float32 logits [..., V] from hidden states; the mask token's logit is -inf."""
        logits = self.output_layer.head(hidden)
        logits[..., self.config.mask_token_id] = float("-inf")
        return logits

    def start_cache(self, batch_size):
        """An empty `KeyValueCache`, for causal families."""
        return KeyValueCache(self, batch_size)

    def _rotary(self, position_ids):
        dim = self.config.hidden_size // self.config.num_attention_heads
        channels = torch.arange(0, dim, 2, dtype=torch.float32, device=position_ids.device)
        frequencies = 1.0 / self.config.rope_theta ** (channels / dim)
        angles = position_ids[:, None, :, None].float() * frequencies
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()

    @torch.no_grad()
    def bound(self, input_ids, target_ids, weights, sigma=None, position_ids=None, visible_mask=None):
        """Negative log-likelihood bound in nats per token at given noise.

        Args:
            input_ids: int64 [B, L] what the network reads (noisy tokens).
            target_ids: int64 [B, L] tokens to predict.
            weights: [B, L] weight of each position in the bound, 0 where nothing is predicted.
            sigma: [B] noise level, for families that condition on it.
            position_ids: as in `forward`.
            visible_mask: as in `forward`; with it, half of the positions are a clean copy.

        Returns:
            float: sum of weight * token cost over the number of tokens.
        """
        logits = self(input_ids, sigma=sigma, position_ids=position_ids, visible_mask=visible_mask).logits
        nats = likelihood_for(self.config).token_nats(logits, input_ids, target_ids, sigma)
        tokens = input_ids.numel() // (1 if visible_mask is None else 2)
        return float((nats * weights).sum() / tokens)

    @torch.no_grad()
    def nll(self, input_ids, num_samples=16, seed=0, t_grid=None, attention_mask=None):
        """Negative log-likelihood of sequences, or for diffusion its Monte-Carlo bound.

        A sequence's value depends on its tokens and the seed, not on what is scored beside it.

        Args:
            input_ids: int64 [B, L] clean tokens.
            num_samples: draws of time and noise for each sequence, stratified over time; causal language
                models need none.
            seed: random seed of the draws.
            t_grid: diffusion times in (0, 1] to use instead of random ones, with one draw of noise at each;
                the result is the mean of the integrand over these times.
            attention_mask: [B, L], 0 at padding, which is not scored, on either side; None: no padding.

        Returns:
            float64 [B] nats; causal language models score all tokens but the first.
        """
        return likelihood_for(self.config).nll(self, input_ids, num_samples, seed, t_grid, attention_mask)

    def generate(
        self,
        input_ids=None,
        attention_mask=None,
        max_length=None,
        max_new_tokens=None,
        num_return_sequences=1,
        do_sample=True,
        seed=None,
        given=None,
        batch_size=1,
        on_step=None,
        **settings,
    ):
        """Sample token ids with the family's samplers.

        Args:
            input_ids: int64 [B, P] prompts that are kept, or a list of B lists of unequal length; a
                causal language model begins with <bos> where there are none. With `given`, int64
                [B, max_length].
            attention_mask: [B, P], 0 at padding, which is on the left of a prompt.
            max_length: tokens per sequence, the longest prompt included; the training length when absent.
            max_new_tokens: new tokens of each sequence; an alternative to max_length.
            num_return_sequences: sequences for each prompt.
            do_sample: False takes the most likely tokens, as temperature 0.
            seed: random seed; a sequence depends on the seed and its index in the batch only. None: drawn
                from torch's random state.
            given: bool [B, max_length], True where `input_ids` holds a token to keep (infilling).
            batch_size: sequences to sample when there is no prompt.
            on_step: called after each step with the step and int64 [B, max_length], the tokens so far; for
                prompts of one length.
            **settings: fields of `SamplingConfig`: sampler, num_steps, block_length, segment_length,
                num_groups, threshold, kappa, remasking, remasking_strength, remasking_loop, temperature,
                top_p, guidance_scale, greedy_tail, stop_at_eos.

        Returns:
            int64 [B * num_return_sequences, max_length] token ids: padding and prompt as in `input_ids`, and
            new tokens from column P on, in every row.
        """
        prompts = prompts_of(input_ids, attention_mask, batch_size)
        if not do_sample:
            if settings.setdefault("temperature", 0.0) != 0:
                raise ValueError(f"temperature: {settings['temperature']}, and do_sample is False")
        return generate(
            self, prompts, max_length, max_new_tokens, num_return_sequences, given, seed, on_step, settings
        )


def _as_they_are(input_ids, **kwargs):
    return {"input_ids": input_ids, **kwargs}


def _resized(parameter, size):
    """A parameter whose first dimension has another size; new rows are the mean of the old ones."""
    mean = parameter.float().mean(0, keepdim=True).to(parameter.dtype)
    new = mean.expand(max(0, size - len(parameter)), *parameter.shape[1:])
    return nn.Parameter(torch.cat([parameter[:size], new]).contiguous())


def refuse_outputs(output_attentions, output_hidden_states):
    """Raise ValueError where one of them is asked for."""
    for name, wanted in (
        ("output_attentions", output_attentions),
        ("output_hidden_states", output_hidden_states),
    ):
        if wanted:
            raise ValueError(f"{name}: this model keeps none")


def output_of(output, return_dict):
    """The output, or a tuple of what it holds where `return_dict` is False."""
    return output.to_tuple() if return_dict is False else output
