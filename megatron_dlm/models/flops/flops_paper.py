"""Floating-point operations by the published count, which stands behind IsoFLOP budgets.

It (arXiv:2602.15014's code, calflops) leaves out the attention's two matrix products and puts every row
through the head. Budgets must follow it; utilisation must not (`work.py`).
"""

from __future__ import annotations

from megatron_dlm.interfaces import InputError
from megatron_dlm.models.config import FREQUENCY_CHANNELS, ModelConfig
from megatron_dlm.models.sizes import parameter_count

PUBLISHED_VOCABULARY = 32_001
"""Ids of the published counts: TinyLlama's 32,000 and the mask token."""
TRAINING_PASSES = 3
"""A backward pass costs two forward passes."""


def published_forward_flops(model: ModelConfig, vocabulary_size: int, seq_length: int) -> int:
    """FLOPs of one sequence's forward pass as the paper counts them.

    Args:
        model: shape with the MLP four times as wide as the hidden state, as published.
        vocabulary_size: ids, mask token included.
        seq_length: tokens of the sequence.

    Returns:
        2 MACs + n (L^2 h + 12 L d) + 4 L d + L d / h with
        MACs = L (12 n d^2 + V d) + 6 c n d + 2 c d + 256 c + c^2.

    Raises:
        InputError: an MLP of another width.
    """
    n, d, h, c = model.num_layers, model.hidden_size, model.num_attention_heads, model.conditioning_size
    length = seq_length
    if model.ffn_hidden_size != 4 * d:
        raise InputError(
            f"model.ffn_hidden_size: {model.ffn_hidden_size} is not 4 x {d}, as the published count has it"
        )
    macs = length * (12 * n * d * d + vocabulary_size * d) + 6 * c * n * d + 2 * c * d
    macs += FREQUENCY_CHANNELS * c + c * c
    elementwise = n * (length * length * h + 12 * length * d) + 4 * length * d + length * d // h
    return 2 * macs + elementwise


def published_non_embedding_parameters(model: ModelConfig, vocabulary_size: int) -> int:
    """The N of the paper's scaling laws: all parameters but one V x d matrix; the head's is still in it."""
    return parameter_count(model, vocabulary_size) - vocabulary_size * model.hidden_size


def printed_flops(flops: float) -> float:
    """FLOPs rounded as the paper's files print them; its step counts derive from these.

    Its smallest model has 5.3e10; smaller ones are rounded as finely.
    """
    unit, decimals = (1e12, 4) if flops >= 1e12 else (1e9, 3) if flops >= 1e9 else (1e6, 3)
    return round(flops / unit, decimals) * unit


def max_steps(budget_flops: float, forward_flops: float, global_batch_size: int) -> int:
    """Optimizer steps that a training budget pays for.

    Args:
        budget_flops: FLOPs of the whole run, for example 6e18.
        forward_flops: FLOPs of one sequence's forward pass, by the published count.
        global_batch_size: sequences per optimizer step.

    Returns:
        Steps, rounded down.

    Raises:
        InputError: a budget below one step.
    """
    steps = int(budget_flops / printed_flops(forward_flops) / global_batch_size / TRAINING_PASSES)
    if steps < 1:
        raise InputError(f"budget_flops: {budget_flops} does not pay for one step")
    return steps
