"""The adaLN transformer of arXiv:2602.15014 for inference, with the bound and the sampler of its family.

Depends on torch and transformers alone. B sequences, L tokens, V ids.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from .configuration_megatron_dlm import MegatronDlmConfig

FREQUENCY_CHANNELS = 256
NOISE_EPSILON = 1e-3
LAST_TIME = 1e-5


class VocabularyEmbedding(nn.Module):
    """Token embedding."""

    def __init__(self, config):
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))

    def forward(self, input_ids):
        """[B, L, hidden] from [B, L]."""
        return F.embedding(input_ids, self.embedding)


class TimeEmbedding(nn.Module):
    """Noise level sigma to the conditioning vector."""

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
    """`parts` tensors [B, 1, hidden] for shift, scale and gate."""
    values = F.linear(conditioning, linear.weight.float(), linear.bias.float())
    return values[:, None].chunk(parts, dim=-1)


class Block(nn.Module):
    """Attention and MLP behind modulated norms and gates; the residual stream is float32."""

    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.causal = config.family == "ar"
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

    def forward(self, x, conditioning, cos, sin):
        """float32 [B, L, hidden]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation(self.adaLN_modulation, conditioning, 6)
        dtype = self.attn_qkv.weight.dtype
        h = (self.norm1(x) * (1 + scale1) + shift1).to(dtype)
        q, k, v = self.attn_qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + gate1 * self.attn_out(attended.transpose(1, 2).flatten(2)).float()
        h = (self.norm2(x) * (1 + scale2) + shift2).to(dtype)
        return x + gate2 * self.mlp(h).float()


def rotate(x, cos, sin):
    """Rotary embedding, halves not interleaved; x is [B, heads, L, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-second, first], dim=-1) * sin.to(x.dtype)


class OutputLayer(nn.Module):
    """Modulated norm and head."""

    def __init__(self, config):
        super().__init__()
        self.norm_final = Norm(config)
        self.linear = nn.Linear(config.hidden_size, config.vocab_size)
        self.adaLN_modulation = nn.Linear(config.conditioning_size, 2 * config.hidden_size)

    def forward(self, x, conditioning):
        """float32 logits [B, L, V]."""
        shift, scale = modulation(self.adaLN_modulation, conditioning, 2)
        h = (self.norm_final(x) * (1 + scale) + shift).to(self.linear.weight.dtype)
        return F.linear(h, self.linear.weight).float() + self.linear.bias.float()


class MegatronDlmModel(PreTrainedModel):
    """Logits, bound and sampler of one family (ar or mdlm)."""

    config_class = MegatronDlmConfig
    base_model_prefix = "megatron_dlm"
    _no_split_modules = ("Block",)

    def __init__(self, config):
        super().__init__(config)
        self.vocab_embed = VocabularyEmbedding(config)
        self.sigma_map = TimeEmbedding(config)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.num_hidden_layers)])
        self.output_layer = OutputLayer(config)
        self.post_init()

    def _init_weights(self, module):
        """A checkpoint holds every tensor, so nothing is drawn here."""

    def forward(self, input_ids, sigma=None, labels=None, return_dict=True, **kwargs):
        """Logits of every position.

        Args:
            input_ids: int64 [B, L].
            sigma: [B] noise level for families that condition on it; zeros when absent.
            labels: refused: use `bound` or `nll`.
            return_dict: False returns a tuple.
            **kwargs: ignored arguments of other models, such as attention_mask.

        Returns:
            MaskedLMOutput with float32 logits [B, L, V]; the mask token's logit is -inf.
        """
        if labels is not None:
            raise ValueError("labels: this model's loss is `bound` or `nll`, not a plain cross-entropy")
        if sigma is None:
            sigma = torch.zeros(input_ids.shape[0], device=input_ids.device)
        conditioning = self.sigma_map(sigma)
        cos, sin = self._rotary(input_ids.shape[1], input_ids.device)
        x = self.vocab_embed(input_ids).float()
        for block in self.blocks:
            x = block(x, conditioning, cos, sin)
        logits = self.output_layer(x, conditioning)
        logits[..., self.config.mask_token_id] = float("-inf")
        return MaskedLMOutput(logits=logits) if return_dict else (logits,)

    def _rotary(self, length, device):
        dim = self.config.hidden_size // self.config.num_attention_heads
        channels = torch.arange(0, dim, 2, dtype=torch.float32, device=device)
        frequencies = 1.0 / self.config.rope_theta ** (channels / dim)
        angles = torch.arange(length, dtype=torch.float32, device=device)[:, None] * frequencies
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()

    @torch.no_grad()
    def bound(self, input_ids, target_ids, weights, sigma=None):
        """Negative log-likelihood bound in nats per token at given noise.

        Args:
            input_ids: int64 [B, L] what the network reads (noisy tokens).
            target_ids: int64 [B, L] tokens to predict.
            weights: float32 [B, L] weight of each position in the bound, 0 where nothing is predicted.
            sigma: [B] noise level, for families that condition on it.

        Returns:
            float: sum of weight * cross-entropy over the number of tokens.
        """
        logits = self(input_ids, sigma=sigma).logits
        nats = F.cross_entropy(logits.transpose(1, 2), target_ids, reduction="none")
        return float((nats.double() * weights).sum() / input_ids.numel())

    @torch.no_grad()
    def nll(self, input_ids, num_samples=16, seed=0):
        """NLL (ar) or Monte-Carlo NELBO (mdlm) of sequences.

        Args:
            input_ids: int64 [B, L] clean tokens.
            num_samples: draws of time and mask for each sequence, stratified over time; ar needs none.
            seed: of the draws.

        Returns:
            float64 [B] nats; ar scores tokens 1 to L - 1.
        """
        if self.config.family == "ar":
            logits = self(input_ids[:, :-1]).logits
            return F.cross_entropy(logits.transpose(1, 2), input_ids[:, 1:], reduction="none").double().sum(1)
        generator = torch.Generator().manual_seed(seed)
        total = torch.zeros(input_ids.shape[0], dtype=torch.float64, device=input_ids.device)
        for index in range(num_samples):
            jitter = torch.rand(input_ids.shape[0], 1, generator=generator, dtype=torch.float64)
            strata = (jitter + index) / num_samples
            t = self.config.time_epsilon + (1 - self.config.time_epsilon) * strata
            masking = (1 - NOISE_EPSILON) * t
            masked = torch.rand(input_ids.shape, generator=generator, dtype=torch.float64) < masking
            masked = masked.to(input_ids.device)
            logits = self(torch.where(masked, self.config.mask_token_id, input_ids)).logits
            nats = F.cross_entropy(logits.transpose(1, 2), input_ids, reduction="none").double()
            total += (nats * masked / t.to(nats.device)).sum(1)
        return total / num_samples

    @torch.no_grad()
    def generate(self, input_ids=None, max_length=None, num_steps=64, temperature=1.0, seed=0, batch_size=1):
        """Sample token ids.

        Args:
            input_ids: int64 [B, P] prompt that is kept; ar needs at least its first token (<bos>).
            max_length: tokens in all; the training length when absent.
            num_steps: denoising steps (mdlm); ar takes one a token.
            temperature: divides the logits.
            seed: of the draws.
            batch_size: sequences to make when there is no prompt.

        Returns:
            int64 [B, max_length].
        """
        max_length = max_length or self.config.max_position_embeddings
        if input_ids is None:
            start = [[self.config.bos_token_id]] if self.config.family == "ar" else [[]]
            input_ids = torch.tensor(start * batch_size, dtype=torch.int64, device=self.device)
        if input_ids.shape[1] > max_length:
            raise ValueError(f"input_ids: {input_ids.shape[1]} tokens exceed max_length {max_length}")
        generator = torch.Generator().manual_seed(seed)
        if self.config.family == "ar":
            return self._generate_ar(input_ids, max_length, temperature, generator)
        return self._generate_mdlm(input_ids, max_length, num_steps, temperature, generator)

    def _generate_ar(self, ids, max_length, temperature, generator):
        while ids.shape[1] < max_length:
            logits = self(ids).logits[:, -1].double() / temperature
            ids = torch.cat([ids, draw(logits.softmax(-1), generator)[:, None]], dim=1)
        return ids

    def _generate_mdlm(self, prompt, max_length, num_steps, temperature, generator):
        """Ancestral sampling on a linear time grid; a last step fills what is still masked."""
        mask = self.config.mask_token_id
        ids = F.pad(prompt, (0, max_length - prompt.shape[1]), value=mask)
        times = [*torch.linspace(1.0, LAST_TIME, num_steps + 1, dtype=torch.float64).tolist(), 0.0]
        for t, s in itertools.pairwise(times):
            masked = ids == mask
            # Of the tokens masked at t, those masked at s < t as well.
            stay = s / t
            keep = torch.rand(ids.shape, generator=generator, dtype=torch.float64).to(ids.device) < stay
            reveal = masked & ~keep
            if reveal.any():
                logits = self(ids).logits[reveal].double() / temperature
                ids[reveal] = draw(logits.softmax(-1), generator)
        return ids


def draw(probabilities, generator):
    """One id per row of float64 [N, V], by the inverse of the cumulative distribution."""
    cumulative = probabilities.cumsum(-1)
    uniform = torch.rand(len(probabilities), 1, generator=generator, dtype=torch.float64)
    target = uniform.to(cumulative.device) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=probabilities.shape[-1] - 1)
