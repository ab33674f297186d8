"""Denoiser configuration: megatron-core's TransformerConfig plus the fields of this package's layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_dlm.models.config import LAYER_NORM_EPSILON, ModelConfig, Precision, Recompute, TransformerImpl
from megatron_dlm.models.precision.fp8 import Fp8Config
from megatron_dlm.models.visibility import MaskForms
from megatron_dlm.platform.parallel_config import ParallelConfig


@dataclass
class DenoiserConfig(TransformerConfig):
    """megatron-core's TransformerConfig plus the fields of this package's layers."""

    has_cond_embedder: bool = True
    """Read by megatron-core: gradients of the time embedder, which every pipeline stage has a copy of, are
    summed over the stages."""
    weights_dtype: torch.dtype = torch.float32
    """Storage dtype of the weights; layers compute with weights in `params_dtype`, the dtype in which fully
    sharded weights are gathered."""
    fused_kernels: bool = False
    """Use this package's Triton kernels."""
    recomputes_gelu: bool = False
    """Compute the MLP's GELU again in the backward pass instead of keeping it."""
    records_layers: bool = False
    """Record the layers' kernels as CUDA graphs and replay them."""
    mask_forms: MaskForms = field(default_factory=MaskForms)
    """Forms in which attention takes its masks."""
    emulated_fp8: Fp8Config | None = None
    """How local layers emulate FP8 products; None: they do not."""


def denoiser_config(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: Precision,
    recompute: Recompute,
    *,
    fused_kernels: bool = False,
    transformer_impl: TransformerImpl = "local",
    fp8: Fp8Config | None = None,
    flex_attention: bool = False,
) -> DenoiserConfig:
    """The configuration of a denoiser's layers.

    Args:
        model: shape.
        parallel: sizes of the axes; checked with `ModelConfig.check_parallel` before.
        precision: fp32, or bf16 parameters under fp32 main parameters and gradients, also for fp8.
        recompute: activations to compute again in the backward pass.
        fused_kernels: use this package's Triton kernels.
        transformer_impl: whose linears and attention; FP8 products of local ones are emulated.
        fp8: FP8 recipe where the precision is fp8; None: the default one.
        flex_attention: give masks to attention as tables of blocks, not dense.

    Returns:
        A configuration whose residual stream and pipeline tensors are fp32 at any precision.
    """
    fp8 = (fp8 or Fp8Config()) if precision == "fp8" else None
    params_dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    return DenoiserConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.padded_heads(parallel.tensor_model_parallel_size),
        kv_channels=model.head_dim,
        ffn_hidden_size=model.ffn_hidden_size,
        activation_func=_gelu_tanh,
        layernorm_epsilon=LAYER_NORM_EPSILON,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        fp32_residual_connection=True,
        bf16=precision != "fp32",
        params_dtype=params_dtype,
        weights_dtype=torch.float32 if parallel.fully_sharded else params_dtype,
        # Losses are summed and divided once by the tokens of the global batch.
        calculate_per_token_loss=True,
        # Weights are drawn by models/initialization.py.
        perform_initialization=False,
        deterministic_mode=parallel.deterministic,
        cuda_graph_scope=[],
        # These need GPU extensions.
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        transformer_impl=transformer_impl,
        fused_kernels=fused_kernels,
        records_layers=parallel.cuda_graphs,
        mask_forms=MaskForms(
            edges=transformer_impl == "transformer_engine" and parallel.context_parallel_size == 1,
            table=flex_attention,
        ),
        emulated_fp8=fp8 if transformer_impl == "local" else None,
        **_parallel_fields(model, parallel),
        **_recompute_fields(recompute),
        **_fp8_fields(fp8, transformer_impl),
    )


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _parallel_fields(model: ModelConfig, parallel: ParallelConfig) -> dict[str, Any]:
    chunks = parallel.virtual_pipeline_model_parallel_size
    return {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "sequence_parallel": parallel.sequence_parallel,
        "tp_comm_overlap": parallel.overlap_tensor_parallel,
        "context_parallel_size": parallel.context_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": chunks if chunks > 1 else None,
        "pipeline_model_parallel_layout": _pipeline_layout(model, parallel),
        "pipeline_dtype": torch.float32,
        # On two stages megatron-core's default order of sends trains wrongly, without an error.
        "overlap_p2p_comm": chunks > 1,
        "batch_p2p_comm": chunks == 1,
    }


def _pipeline_layout(model: ModelConfig, parallel: ParallelConfig) -> list[list[str]] | None:
    """megatron-core's layout: the parts each pipeline stage holds; None with one stage."""
    stages = parallel.pipeline_model_parallel_size * parallel.virtual_pipeline_model_parallel_size
    if stages == 1:
        return None
    layout = [["decoder"] * layers for layers in model.stage_layers(stages)]
    return [["embedding", *layout[0]], *layout[1:-1], [*layout[-1], "loss"]]


def _recompute_fields(recompute: Recompute) -> dict[str, Any]:
    """Fields for recomputation; what a layer leaves out by itself is in adaln_layer.py."""
    granularity = {"none": None, "norms": "selective", "selective": "selective", "full": "full"}[recompute]
    return {
        "recompute_granularity": granularity,
        # Whole layers one by one.
        "recompute_method": "uniform" if recompute == "full" else None,
        "recompute_num_layers": 1 if recompute == "full" else None,
        "recompute_modules": [],
        "recomputes_gelu": recompute == "selective",
    }


def _fp8_fields(fp8: Fp8Config | None, transformer_impl: TransformerImpl) -> dict[str, Any]:
    """megatron-core's FP8 fields; those that enable Transformer Engine's FP8 only with that backend."""
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
