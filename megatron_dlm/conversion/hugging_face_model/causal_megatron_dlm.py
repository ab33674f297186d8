"""An autoregressive model with transformers' own generation and loss."""

import torch
import torch.nn.functional as F
from transformers import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from .modeling_megatron_dlm import MegatronDlmModel, output_of, refuse_outputs
from .padding_megatron_dlm import causal_mask, check_ids, check_length, positions_of, visible_of


class MegatronDlmForCausalLM(MegatronDlmModel, GenerationMixin):
    """Causal language model: `generate` is transformers', `labels` give the shifted cross-entropy.

    The same weights as `MegatronDlmModel`, whose `generate` runs megatron_dlm's samplers.
    """

    # transformers below 4.56 asks for it.
    _supports_cache_class = True
    # Not the first base's, which is first since PreTrainedModel itself is a GenerationMixin in 4.51.
    generate = GenerationMixin.generate

    def __init__(self, config):
        if not config.causal:
            raise ValueError(
                f"{config.family} is no causal language model; use AutoModelForMaskedLM or AutoModel"
            )
        super().__init__(config)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        cache_position=None,
        logits_to_keep=0,
        num_items_in_batch=None,
        return_dict=None,
        output_attentions=None,
        output_hidden_states=None,
        cache=None,
    ):
        """Logits of the next tokens, and with labels the loss.

        Args:
            input_ids: int64 [B, L].
            attention_mask: [B, M + L], 0 at padding, on either side, M being the cached tokens; None: no
                padding.
            position_ids: int64 [B or 1, L]; None: 0, 1, 2 ... without padding.
            past_key_values: transformers' cache of the M tokens before.
            inputs_embeds: [B, L, hidden] instead of `input_ids`.
            labels: int64 [B, L], as `input_ids`; -100 is not predicted. The shift is made here.
            use_cache: whether to return a cache.
            cache_position: not used; the cache knows its length.
            logits_to_keep: logits of so many last positions, or of these positions; 0: of all.
            num_items_in_batch: number that the loss is divided by; None: the labels predicted.
            return_dict: False returns a tuple.
            output_attentions: must not be True.
            output_hidden_states: must not be True.
            cache: transformers' later name for `past_key_values`.

        Returns:
            CausalLMOutputWithPast with float32 logits [B, L, V], where the mask token's are -inf, and the
            loss in nats per label.
        """
        refuse_outputs(output_attentions, output_hidden_states)
        check_ids(input_ids, self.config)
        past_key_values = past_key_values if cache is None else cache
        if use_cache and past_key_values is None:
            from transformers import DynamicCache

            past_key_values = DynamicCache()
        x = input_ids if inputs_embeds is None else inputs_embeds
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        length = x.shape[1]
        check_length(past + length, self.config)
        if position_ids is None and attention_mask is not None:
            position_ids = positions_of(attention_mask, x)[:, past:]
        elif position_ids is None:
            position_ids = torch.arange(past, past + length, device=x.device)[None]
        cache, visible_mask = None, None
        if past_key_values is not None:
            cache = _Layers(past_key_values)
            # One token sees all that are cached.
            visible_mask = None if length == 1 else causal_mask(x, past)
        if attention_mask is not None:
            visible_mask = visible_of(attention_mask, x, visible_mask, causal=True, past=past)
        hidden = self.hidden(
            input_ids,
            position_ids=position_ids,
            visible_mask=visible_mask,
            cache=cache,
            inputs_embeds=inputs_embeds,
        )
        rows = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.head(hidden[:, rows])
        loss = None if labels is None else _shifted_loss(logits, labels, num_items_in_batch)
        return output_of(
            CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values), return_dict
        )


class _Layers:
    """transformers' cache as the cache that the blocks call."""

    def __init__(self, cache):
        self._cache = cache

    def layer(self, index):
        """Keys and values of one layer."""
        return _Layer(self._cache, index)


class _Layer:
    def __init__(self, cache, index):
        self._cache, self._index = cache, index

    def with_past(self, k, v):
        """Cached and new keys and values, [B, heads, M + N, head_dim] each."""
        return self._cache.update(k, v, self._index)


def _shifted_loss(logits, labels, num_items_in_batch):
    if logits.shape[:2] != labels.shape:
        raise ValueError(f"labels: {tuple(labels.shape)} instead of {tuple(logits.shape[:2])}")
    wanted = labels[:, 1:].to(logits.device)
    total = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), wanted.flatten(), ignore_index=-100, reduction="sum"
    )
    return total / ((wanted != -100).sum() if num_items_in_batch is None else num_items_in_batch)
