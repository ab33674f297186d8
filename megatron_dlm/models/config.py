"""The denoiser's shape, and megatron-core's configuration of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from megatron_dlm.interfaces import InputError
from megatron_dlm.models.precision.fp8 import Fp8Config
from megatron_dlm.platform.parallel_config import ParallelConfig

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig

Precision = Literal["fp32", "bf16", "fp8"]
"""Of parameters and matrix products; fp8 has bf16 parameters and FP8 products in the layers."""
TransformerImpl = Literal["local", "transformer_engine"]
"""Whose linears and attention: megatron-core's and PyTorch's, or Transformer Engine's."""
Recompute = Literal["none", "norms", "selective", "full"]
"""Activations made again in the backward pass: none; modulated norms; these and GELU, which cost no matrix
product; whole layers."""
LAYER_NORM_EPSILON = 1e-5
ROTARY_BASE = 10000.0


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of the paper's DiT; see `sizes.py` for the published ones."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    ffn_hidden_size: int
    """Width of the MLP; 4 x hidden_size in the paper."""
    conditioning_size: int = 128
    """Width of the time embedding that feeds adaLN."""

    def __post_init__(self) -> None:
        for name in (
            "num_layers",
            "hidden_size",
            "num_attention_heads",
            "ffn_hidden_size",
            "conditioning_size",
        ):
            if getattr(self, name) < 1:
                raise InputError(f"model.{name}: {getattr(self, name)} is below 1")
        if self.hidden_size % self.num_attention_heads:
            raise InputError(
                f"model.num_attention_heads: {self.num_attention_heads} does not divide "
                f"model.hidden_size {self.hidden_size}"
            )
        if self.head_dim % 2:
            raise InputError(f"model.hidden_size: head dimension {self.head_dim} is odd; rotary needs pairs")

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def padded_heads(self, tensor_size: int) -> int:
        """Heads after padding to a multiple of the tensor parallel size; padded ones stay zero."""
        return -(-self.num_attention_heads // tensor_size) * tensor_size

    def check_parallel(self, parallel: ParallelConfig) -> None:
        """Refuse layouts this shape cannot take.

        Args:
            parallel: sizes of the axes.

        Raises:
            InputError: tensor parallelism does not divide the MLP, or there are more stages than layers.
        """
        tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
        if self.ffn_hidden_size % tensor:
            raise InputError(
                f"parallel.tensor_model_parallel_size: {tensor} does not divide "
                f"model.ffn_hidden_size {self.ffn_hidden_size}"
            )
        chunks = parallel.virtual_pipeline_model_parallel_size
        if self.num_layers < stages:
            raise InputError(
                f"parallel.pipeline_model_parallel_size: {stages} exceeds model.num_layers {self.num_layers}"
            )
        if self.num_layers < stages * chunks:
            raise InputError(
                f"parallel.virtual_pipeline_model_parallel_size: {chunks} chunks on {stages} stages exceed "
                f"model.num_layers {self.num_layers}"
            )

    def stage_layers(self, stages: int) -> list[int]:
        """Layers of each pipeline stage, nearly equal; the last stages, towards the head, have fewer."""
        each, extra = divmod(self.num_layers, stages)
        return [each + (stage < extra) for stage in range(stages)]


def _pipeline_layout(model: ModelConfig, parallel: ParallelConfig) -> list[list[str]] | None:
    """megatron-core's table of what each stage holds; None for one stage."""
    stages = parallel.pipeline_model_parallel_size * parallel.virtual_pipeline_model_parallel_size
    if stages == 1:
        return None
    layout = [["decoder"] * layers for layers in model.stage_layers(stages)]
    return [["embedding", *layout[0]], *layout[1:-1], [*layout[-1], "loss"]]


def transformer_config(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: Precision,
    recompute: Recompute,
    *,
    fused_kernels: bool = False,
    transformer_impl: TransformerImpl = "local",
    fp8: Fp8Config | None = None,
    flex_attention: bool = False,
) -> TransformerConfig:
    """megatron-core's configuration for `model`.

    Args:
        model: shape.
        parallel: sizes of the axes; checked with `ModelConfig.check_parallel` before.
        precision: fp32, or bf16 parameters under fp32 main parameters and gradients, also for fp8.
        recompute: activations to make again instead of keeping.
        fused_kernels: take this package's Triton kernels.
        transformer_impl: whose linears and attention; FP8 products of local ones are emulated.
        fp8: how to multiply where the precision is fp8.
        flex_attention: give masks to attention as tables of blocks, not dense.

    Returns:
        A configuration whose residual stream and pipeline tensors are fp32 at any precision.
    """
    import torch
    import torch.nn.functional as F
    from megatron.core.transformer import TransformerConfig

    from megatron_dlm.models.visibility import MaskForms

    def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x, approximate="tanh")

    chunks = parallel.virtual_pipeline_model_parallel_size
    low = precision != "fp32"
    fp8 = (fp8 or Fp8Config()) if precision == "fp8" else None
    config = TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.padded_heads(parallel.tensor_model_parallel_size),
        kv_channels=model.head_dim,
        ffn_hidden_size=model.ffn_hidden_size,
        activation_func=gelu_tanh,
        layernorm_epsilon=LAYER_NORM_EPSILON,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        fp32_residual_connection=True,
        bf16=low,
        params_dtype=torch.bfloat16 if low else torch.float32,
        pipeline_dtype=torch.float32,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        # On two stages megatron-core's default order of sends trains wrongly, without an error.
        overlap_p2p_comm=chunks > 1,
        batch_p2p_comm=chunks == 1,
        pipeline_model_parallel_layout=_pipeline_layout(model, parallel),
        sequence_parallel=parallel.sequence_parallel,
        tp_comm_overlap=parallel.overlap_tensor_parallel,
        # Losses are summed and divided once by the tokens of the global batch.
        calculate_per_token_loss=True,
        # Weights are drawn by models/initialization.py.
        perform_initialization=False,
        recompute_granularity={"none": None, "norms": "selective"}.get(recompute, recompute),
        # Whole layers one by one; what a layer leaves out by itself is in adaln_layer.py.
        recompute_method="uniform" if recompute == "full" else None,
        recompute_num_layers=1 if recompute == "full" else None,
        recompute_modules=[],
        deterministic_mode=parallel.deterministic,
        cuda_graph_scope=[],
        # These need GPU extensions.
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        transformer_impl=transformer_impl,
        **_fp8_fields(fp8, transformer_impl),
    )
    # Gradients of the time embedder, replicated on every stage, are summed over the pipeline.
    config.has_cond_embedder = True
    # What weights are kept in; modules see them in params_dtype, to which fully sharded ones are gathered.
    config.weights_dtype = torch.float32 if parallel.fully_sharded else config.params_dtype
    config.fused_kernels = fused_kernels
    config.remakes_gelu = recompute == "selective"
    config.records_layers = parallel.cuda_graphs
    config.mask_forms = MaskForms(
        edges=transformer_impl == "transformer_engine" and parallel.context_parallel_size == 1,
        table=flex_attention,
    )
    config.emulated_fp8 = fp8 if transformer_impl == "local" else None
    return config


def _fp8_fields(fp8: Fp8Config | None, transformer_impl: TransformerImpl) -> dict[str, Any]:
    """megatron-core's fields; those that make it enter Transformer Engine's contexts only with that."""
    if fp8 is None:
        return {}
    fields: dict[str, Any] = {
        "first_last_layers_bf16": fp8.has_bf16_layers,
        "num_layers_at_start_in_bf16": fp8.layers_at_start_in_bf16,
        "num_layers_at_end_in_bf16": fp8.layers_at_end_in_bf16,
    }
    if transformer_impl == "transformer_engine":
        fields |= {
            "fp8": fp8.format,
            "fp8_recipe": fp8.recipe,
            "fp8_param": fp8.weights,
            "fp8_margin": fp8.margin,
            "fp8_amax_history_len": fp8.amax_history_len,
            "fp8_amax_compute_algo": fp8.amax_compute_algo,
        }
    return fields
