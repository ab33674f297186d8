"""Configuration of an exported diffusion (or autoregressive) language model."""

from transformers import PretrainedConfig


class MegatronDlmConfig(PretrainedConfig):
    """Shape, vocabulary and family of the model; settings of the family are further fields."""

    model_type = "megatron_dlm"

    def __init__(
        self,
        family=None,
        causal=False,
        vocab_size=32,
        mask_token_id=2,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=256,
        conditioning_size=128,
        max_position_embeddings=256,
        layer_norm_epsilon=1e-5,
        rope_theta=10000.0,
        **kwargs,
    ):
        self.family = family
        self.causal = causal
        self.vocab_size = vocab_size
        self.mask_token_id = mask_token_id
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.conditioning_size = conditioning_size
        self.max_position_embeddings = max_position_embeddings
        self.layer_norm_epsilon = layer_norm_epsilon
        self.rope_theta = rope_theta
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)
