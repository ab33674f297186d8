"""The layers of the adaLN transformer of arXiv:2602.15014. B sequences, L tokens, V ids."""

import math

import torch
import torch.nn.functional as F
from torch import nn

FREQUENCY_CHANNELS = 256


class Fp32Linear(nn.Linear):
    """A linear layer that computes in float32, whatever the dtype of its weights."""

    def forward(self, x):
        """float32 [..., out] from float32 [..., in]."""
        return F.linear(x, self.weight.float(), self.bias.float())


class VocabularyEmbedding(nn.Module):
    """Token embedding."""

    def __init__(self, config):
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))

    @property
    def weight(self):
        """The embeddings [V, hidden], by the name that transformers and peft ask for."""
        return self.embedding

    def forward(self, input_ids):
        """[B, L, hidden] from [B, L]."""
        return F.embedding(input_ids, self.embedding)


class TimeEmbedding(nn.Module):
    """Maps the noise level sigma to the conditioning vector of adaLN."""

    def __init__(self, config):
        super().__init__()
        width = config.conditioning_size
        self.mlp = nn.Sequential(Fp32Linear(FREQUENCY_CHANNELS, width), nn.SiLU(), Fp32Linear(width, width))

    def forward(self, sigma):
        """[B, conditioning_size] float32 from [B]."""
        half = FREQUENCY_CHANNELS // 2
        steps = torch.arange(half, dtype=torch.float32, device=sigma.device) / half
        angles = sigma.float()[:, None] * torch.exp(-math.log(10000.0) * steps)[None]
        return F.silu(self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1)))


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
    return linear(conditioning)[:, None].chunk(parts, dim=-1)


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
        self.adaLN_modulation = Fp32Linear(config.conditioning_size, 6 * width)

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


class HeadLinear(nn.Linear):
    """The product in the weights' dtype, the sum with the bias in float32."""

    def forward(self, h):
        """float32 logits [..., V] of [..., hidden]."""
        return F.linear(h, self.weight).float() + self.bias.float()


class OutputLayer(nn.Module):
    """Modulated norm and head."""

    def __init__(self, config):
        super().__init__()
        self.norm_final = Norm(config)
        self.linear = HeadLinear(config.hidden_size, config.vocab_size)
        self.adaLN_modulation = Fp32Linear(config.conditioning_size, 2 * config.hidden_size)

    def forward(self, x, conditioning):
        """[B, L, hidden], ready for `head`."""
        shift, scale = modulation(self.adaLN_modulation, conditioning, 2)
        return (self.norm_final(x) * (1 + scale) + shift).to(self.linear.weight.dtype)

    def head(self, h):
        """float32 logits [..., V] of [..., hidden]."""
        return self.linear(h)
