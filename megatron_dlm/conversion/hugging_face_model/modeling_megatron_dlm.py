"""The adaLN transformer of arXiv:2602.15014 for inference, with the bound and the sampler of its family.

Depends on torch and transformers alone. B sequences, L tokens, V ids.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

# transformers copies only what is imported in this form.
from .cache_megatron_dlm import KeyValueCache
from .configuration_megatron_dlm import MegatronDlmConfig
from .family_megatron_dlm import likelihood_for
from .generation_megatron_dlm import generate, prompts_of

FREQUENCY_CHANNELS = 256


class VocabularyEmbedding(nn.Module):
    """Token embedding."""

    def __init__(self, config):
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))

    def forward(self, input_ids):
        """[B, L, hidden] from [B, L]."""
        return F.embedding(input_ids, self.embedding)


class TimeEmbedding(nn.Module):
    """Maps the noise level sigma to the conditioning vector of adaLN."""

    def __init__(self, config):
        super().__init__()
        width = config.conditioning_size
        self.mlp = nn.Sequential(nn.Linear(FREQUENCY_CHANNELS, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, sigma):
        """[B, conditioning_size] float32 from [B]."""
        half = FREQUENCY_CHANNELS // 2
        steps = torch.arange(half, dtype=torch.float32, device=sigma.device) / half
        angles = sigma.float()[:, None] * torch.exp(-math.log(10000.0) * steps)[None]
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        first, last = self.mlp[0], self.mlp[2]
        hidden = F.silu(F.linear(waves, first.weight.float(), first.bias.float()))
        return F.silu(F.linear(hidden, last.weight.float(), last.bias.float()))


class Norm(nn.Module):
    """Bias-free LayerNorm in float32."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.epsilon = config.layer_norm_epsilon

    def forward(self, x):
        """float32, of x's shape."""
        return F.layer_norm(x.float(), (x.shape[-1],), self.weight.float(), None, self.epsilon)


def modulation(linear, conditioning, parts):
    """Modulation by adaLN: `parts` tensors [B, 1, hidden] of shifts, scales and gates."""
    values = F.linear(conditioning, linear.weight.float(), linear.bias.float())
    return values[:, None].chunk(parts, dim=-1)


class Block(nn.Module):
    """Attention and MLP behind modulated norms and gates; the residual stream is float32."""

    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.heads = config.num_attention_heads
        self.causal = config.causal
        self.norm1 = Norm(config)
        self.attn_qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.norm2 = Norm(config)
        self.mlp = nn.Sequential(
            nn.Linear(width, config.intermediate_size),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.intermediate_size, width),
        )
        self.adaLN_modulation = nn.Linear(config.conditioning_size, 6 * width)

    def forward(self, x, conditioning, cos, sin, visible_mask, layer_cache=None):
        """float32 [B, L, hidden]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation(self.adaLN_modulation, conditioning, 6)
        dtype = self.attn_qkv.weight.dtype
        h = (self.norm1(x) * (1 + scale1) + shift1).to(dtype)
        q, k, v = self.attn_qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        causal = self.causal and visible_mask is None and layer_cache is None
        if layer_cache is not None:
            k, v = layer_cache.with_past(k, v)
        attend = eager_attention if self.config._attn_implementation == "eager" else sdpa_attention
        attended = attend(q, k, v, visible_mask, causal)
        x = x + gate1 * self.attn_out(attended.transpose(1, 2).flatten(2)).float()
        h = (self.norm2(x) * (1 + scale2) + shift2).to(dtype)
        return x + gate2 * self.mlp(h).float()


def rotate(x, cos, sin):
    """Rotary embedding, halves not interleaved; x is [B, heads, L, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-second, first], dim=-1) * sin.to(x.dtype)


def sdpa_attention(q, k, v, visible_mask, causal):
    """[B, heads, L, head_dim] by torch's fused kernels."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible_mask, is_causal=causal)


def eager_attention(q, k, v, visible_mask, causal):
    """Attention written out in plain PyTorch operations."""
    scores = (q @ k.transpose(-1, -2)).float() / q.shape[-1] ** 0.5
    if causal:
        visible_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if visible_mask is not None:
        scores = scores.masked_fill(~visible_mask, float("-inf"))
    return scores.softmax(-1).to(v.dtype) @ v


class OutputLayer(nn.Module):
    """Modulated norm and head."""

    def __init__(self, config):
        super().__init__()
        self.norm_final = Norm(config)
        self.linear = nn.Linear(config.hidden_size, config.vocab_size)
        self.adaLN_modulation = nn.Linear(config.conditioning_size, 2 * config.hidden_size)

    def forward(self, x, conditioning):
        """[B, L, hidden], ready for `head`."""
        shift, scale = modulation(self.adaLN_modulation, conditioning, 2)
        return (self.norm_final(x) * (1 + scale) + shift).to(self.linear.weight.dtype)

    def head(self, h):
        """float32 logits [..., V] of [..., hidden]."""
        return F.linear(h, self.linear.weight).float() + self.linear.bias.float()


class MegatronDlmModel(PreTrainedModel):
    """Logits, bound and samplers of one family of language models."""

    config_class = MegatronDlmConfig
    base_model_prefix = "megatron_dlm"
    _no_split_modules = ("Block",)
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.vocab_embed = VocabularyEmbedding(config)
        self.sigma_map = TimeEmbedding(config)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.num_hidden_layers)])
        self.output_layer = OutputLayer(config)
        self.post_init()

    def _init_weights(self, module):
        """A checkpoint holds every tensor, so nothing is drawn here."""

    def forward(
        self,
        input_ids,
        sigma=None,
        position_ids=None,
        visible_mask=None,
        labels=None,
        attention_mask=None,
        return_dict=True,
        **kwargs,
    ):
        """Logits of every position.

        Args:
            input_ids: int64 [B, L].
            sigma: [B] noise level -ln(alpha) for families that condition on it; zeros when absent.
            position_ids: int64 [B, L] or [1, L]; 0 to L - 1 when absent. Tokens may be in any order.
            visible_mask: bool [L, L], True where a row attends to a column; the family's own pattern when
                absent.
            labels: not supported, raises ValueError; use `bound` or `nll`.
            attention_mask: must be all ones, as tokenizers give it for unpadded text; zeros raise ValueError.
            return_dict: False returns a tuple.
            **kwargs: ignored; arguments that other models accept, such as use_cache.

        Returns:
            MaskedLMOutput with float32 logits [B, L, V]; the mask token's logit is -inf.
        """
        if labels is not None:
            raise ValueError("labels: this model's loss is `bound` or `nll`, not a plain cross-entropy")
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ValueError(
                "attention_mask: holds zeros, and padding cannot be left out; give equal lengths"
            )
        logits = self.head(self.hidden(input_ids, sigma, position_ids, visible_mask))
        return MaskedLMOutput(logits=logits) if return_dict else (logits,)

    def hidden(self, input_ids, sigma=None, position_ids=None, visible_mask=None, cache=None):
        """Final hidden states [B, L, hidden], the input of the head.

        Args:
            input_ids: int64 [B, L].
            sigma: as in `forward`.
            position_ids: as in `forward`.
            visible_mask: bool [..., L, L], or with a cache [B or 1, 1, L, cached + L].
            cache: `KeyValueCache` of the preceding tokens; keys and values of `input_ids` are appended.

        Returns:
            Hidden states in the head's dtype.
        """
        if sigma is None:
            sigma = torch.zeros(input_ids.shape[0], device=input_ids.device)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        conditioning = self.sigma_map(sigma)
        cos, sin = self._rotary(position_ids)
        x = self.vocab_embed(input_ids).float()
        for index, block in enumerate(self.blocks):
            x = block(x, conditioning, cos, sin, visible_mask, cache.layer(index) if cache else None)
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
    def nll(self, input_ids, num_samples=16, seed=0, t_grid=None):
        """Negative log-likelihood of sequences, or for diffusion its Monte-Carlo bound.

        Args:
            input_ids: int64 [B, L] clean tokens.
            num_samples: draws of time and noise for each sequence, stratified over time; causal language
                models need none.
            seed: random seed of the draws.
            t_grid: diffusion times in (0, 1] to use instead of random ones, with one draw of noise at each;
                the result is the mean of the integrand over these times.

        Returns:
            float64 [B] nats; causal language models score tokens 1 to L - 1.
        """
        return likelihood_for(self.config).nll(self, input_ids, num_samples, seed, t_grid)

    def generate(
        self,
        input_ids=None,
        max_length=None,
        given=None,
        seed=0,
        batch_size=1,
        on_step=None,
        attention_mask=None,
        max_new_tokens=None,
        **settings,
    ):
        """Sample token ids.

        Args:
            input_ids: int64 [B, P] prompts that are kept, or a list of B lists of unequal length; a
                causal language model begins with <bos> where there are none. With `given`, int64
                [B, max_length].
            max_length: tokens per sequence, prompt included; the training length when absent.
            max_new_tokens: tokens after the longest prompt; an alternative to max_length.
            given: bool [B, max_length], True where `input_ids` holds a token to keep (infilling).
            seed: random seed; a sequence depends on the seed and its index in the batch only.
            batch_size: sequences to sample when there is no prompt.
            on_step: called after each step with the step and int64 [B, max_length], the tokens so far.
            attention_mask: [B, P], 0 where `input_ids` holds padding, on either side; padding is dropped.
            **settings: fields of `SamplingConfig`: sampler, num_steps, block_length, segment_length,
                num_groups, temperature, top_p, greedy_tail, stop_at_eos.

        Returns:
            int64 [B, max_length] token ids, prompts included.
        """
        prompts = prompts_of(input_ids, attention_mask, batch_size)
        return generate(self, prompts, max_length, max_new_tokens, given, seed, on_step, settings)
