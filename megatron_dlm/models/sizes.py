"""The published sizes (arXiv:2602.15014): names as in the paper's configurations, not parameter counts."""

from __future__ import annotations

from megatron_dlm.interfaces import InputError
from megatron_dlm.models.config import FREQUENCY_CHANNELS, ModelConfig

# name: (hidden_size, num_layers, num_attention_heads)
_SHAPES = {
    "6M": (256, 6, 4),
    "tiny": (256, 8, 8),
    "base": (384, 6, 6),
    "19M": (384, 8, 6),
    "34M": (512, 8, 8),
    "48M": (576, 9, 9),
    "66M": (640, 10, 10),
    "85M": (640, 13, 10),
    "75M": (640, 16, 8),
    "113M": (768, 12, 12),
    "small": (768, 12, 12),
    "142M": (768, 15, 12),
    "170M": (768, 18, 12),
    "180M": (896, 14, 14),
    "206M": (896, 16, 14),
    "231M": (896, 18, 14),
    "268M": (1024, 16, 16),
    "302M": (1024, 18, 16),
    "336M": (1024, 20, 16),
    "medium": (1024, 24, 16),
    "472M": (1280, 18, 10),
    "551M": (1280, 21, 10),
    "571M": (1408, 18, 11),
    "629M": (1280, 24, 10),
    "666M": (1408, 21, 11),
    "717M": (1536, 19, 12),
    "761M": (1408, 24, 11),
    "831M": (1536, 22, 12),
    "944M": (1536, 25, 12),
    "1028M": (1792, 20, 14),
    "1233M": (1792, 24, 14),
    "1476M": (2048, 22, 16),
    "1678M": (2048, 25, 16),
    "2121M": (2176, 28, 17),
}
PAPER_1_7B = "2121M"
"""Name, in this table, of the model that the paper calls 1.7B."""


def paper_model(name: str) -> ModelConfig:
    """The published size called `name`.

    Args:
        name: for example "113M" or "2121M".

    Returns:
        Its shape; the MLP is four times as wide as the hidden state.

    Raises:
        InputError: no such size.
    """
    if name not in _SHAPES:
        raise InputError(f"model.size: {name!r} is not one of {', '.join(_SHAPES)}")
    hidden_size, num_layers, num_attention_heads = _SHAPES[name]
    return ModelConfig(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_attention_heads=num_attention_heads,
        ffn_hidden_size=4 * hidden_size,
    )


def layer_matrices(model: ModelConfig, tensor_size: int = 1) -> int:
    """Weights of a layer's four matrix products on one tensor parallel rank, padded heads included."""
    heads = model.padded_heads(tensor_size) // tensor_size * model.head_dim
    return 4 * model.hidden_size * heads + 2 * model.hidden_size * (model.ffn_hidden_size // tensor_size)


def layer_parameters(model: ModelConfig, tensor_size: int = 1) -> int:
    """Parameters of a layer on one tensor parallel rank; norms and modulations are whole on each."""
    d, f = model.hidden_size, model.ffn_hidden_size // tensor_size
    return layer_matrices(model, tensor_size) + f + 3 * d + 6 * d * (model.conditioning_size + 1)


def final_layer_parameters(model: ModelConfig) -> int:
    """Parameters of the final adaLN layer, in front of the head."""
    return model.hidden_size + 2 * model.hidden_size * (model.conditioning_size + 1)


def time_embedder_parameters(model: ModelConfig) -> int:
    """Parameters of the time embedder, of which each chunk of layers has a copy."""
    c = model.conditioning_size
    return FREQUENCY_CHANNELS * c + c + c * c + c


def parameter_count(model: ModelConfig, vocabulary_size: int) -> int:
    """All parameters, embedding and head included, without any padding.

    Args:
        model: shape with the MLP four times as wide as the hidden state, as published.
        vocabulary_size: ids, mask token included.

    Returns:
        n (12 d^2 + 7 d + 6 d (c + 1)) + d + 2 d (c + 1) + time embedder + 2 V d + V.
    """
    head = vocabulary_size * (model.hidden_size + 1)
    body = model.num_layers * layer_parameters(model) + final_layer_parameters(model)
    return body + time_embedder_parameters(model) + vocabulary_size * model.hidden_size + head
