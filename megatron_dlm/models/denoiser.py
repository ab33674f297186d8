"""The part of the denoiser on one process: adaLN layers, embedding (first stage), head (last stage).

Shape legend: B microbatch sequences, L tokens, D hidden size; hidden states are [L, B, D].
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    gather_from_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor, nn

from megatron_dlm.interfaces import AttentionPattern, ModelInputs, Vocabulary
from megatron_dlm.models.adaln_layer import AdaLNTransformerLayer, FinalLayer, ModulatedNorm
from megatron_dlm.models.attention import rotary_table
from megatron_dlm.models.config import ModelConfig
from megatron_dlm.models.cuda_graphs import forget_layers, record_layers
from megatron_dlm.models.denoiser_config import DenoiserConfig
from megatron_dlm.models.embedding import TokenEmbedding
from megatron_dlm.models.head import Head
from megatron_dlm.models.layer_spec import layer_spec
from megatron_dlm.models.time_embedding import TimeEmbedder
from megatron_dlm.models.visibility import visibility
from megatron_dlm.platform.megatron import hand_context_to_all_layers
from megatron_dlm.platform.parallel import ParallelState
from megatron_dlm.platform.vocab_parallel import VocabShard, padded_vocabulary_size


class Denoiser(MegatronModule):
    """Consecutive layers on one process: a pipeline stage, or one of its chunks if it is interleaved."""

    # megatron-core's schedules and its search for tied embeddings ask for these.
    model_type = ModelType.encoder_or_decoder
    share_embeddings_and_output_weights = False

    def __init__(
        self,
        model: ModelConfig,
        config: DenoiserConfig,
        vocabulary: Vocabulary,
        attention: AttentionPattern,
        parallel: ParallelState,
        chunk: int = 0,
    ) -> None:
        super().__init__(config=config)
        self.model = model
        self.vocabulary = vocabulary
        self.attention = attention
        num_chunks = config.virtual_pipeline_model_parallel_size or 1
        self.pre_process = parallel.is_first_stage and chunk == 0
        self.post_process = parallel.is_last_stage and chunk == num_chunks - 1
        self._place = chunk * parallel.pipeline_size + parallel.pipeline_rank
        self._tensor_group = parallel.tensor_group
        self._is_to_share_buffers = config.tp_comm_overlap
        self._recorded_constants: list[Tensor] | None = None
        if self.pre_process:
            self.embedding = TokenEmbedding(
                padded_vocabulary_size(vocabulary.size, parallel.tensor_size, parallel.vocabulary_multiple),
                model.hidden_size,
                config,
                parallel.tensor_group,
            )
        self.time_embedder = TimeEmbedder(model.conditioning_size, first_stage=self.pre_process)
        if config.recompute_granularity == "full":
            hand_context_to_all_layers()
        self.block = TransformerBlock(
            config=config,
            spec=layer_spec(model, config, attention),
            pre_process=self.pre_process,
            post_process=self.post_process,
            # The adaLN final layer is ours.
            post_layer_norm=False,
            vp_stage=chunk if num_chunks > 1 else None,
        )
        if self.post_process:
            vocab = VocabShard.of_rank(
                vocabulary,
                parallel.tensor_rank,
                parallel.tensor_group,
                parallel.tensor_size,
                multiple=parallel.vocabulary_multiple,
                fused=config.fused_kernels,
            )
            self.final_layer = FinalLayer(config, model.conditioning_size)
            self.head = Head(
                model.hidden_size, vocab, parallel.tensor_group, config.params_dtype, parallel.device
            )
        _mark_tensor_parallel(self)
        if config.sequence_parallel:
            _mark_sequence_parallel(self)
        self.to(device=parallel.device, dtype=config.weights_dtype)

    @property
    def chunks(self) -> list[Denoiser]:
        """A list with this model alone; a `ChunkedDenoiser` has several chunks."""
        return [self]

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        """Take the previous stage's output; megatron-core's schedules call this."""
        self.block.set_input_tensor(input_tensor[0])

    def forward(self, inputs: ModelInputs) -> Tensor:
        """Hidden states of this stage.

        Args:
            inputs: on this device; every stage gets them, only the first reads the token ids.

        Returns:
            float32 [L, B, D]; on the last stage after the final layer, ready for `head`.
        """
        if self._is_to_share_buffers:
            self._share_buffers(inputs.token_ids_BL.numel())
        c = self.time_embedder(inputs.sigma_B)
        attention_mask = self._mask_for_attention(inputs)
        hidden_states = None
        if self.pre_process:
            hidden_states = self.embedding(inputs.token_ids_BL, inputs.mixture).float().contiguous()
        # A view: the layers' gradients are summed before the final layer's, recomputed or not.
        context, rotary = c.view_as(c), rotary_table(inputs.position_ids_BL, self.model.head_dim)
        if self.config.records_layers and self.training:
            assert hidden_states is not None
            rotary, attention_mask = self._in_recorded_memory(hidden_states, context, rotary, attention_mask)
        hidden_states = self.block(
            hidden_states=hidden_states,
            attention_mask=attention_mask,
            context=context,
            rotary_pos_emb=rotary,
        )
        if not self.post_process:
            return hidden_states
        hidden_states = self.final_layer(hidden_states, c)
        if self.config.sequence_parallel:
            # The head's gradient is whole on every rank, so each takes its part of it back.
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=self._tensor_group
            )
        return hidden_states

    def _share_buffers(self, rows: int) -> None:
        from megatron_dlm.models.precision.transformer_engine import share_buffers

        tensor_size, has_fp8 = self.config.tensor_model_parallel_size, self.config.fp8 is not None
        share_buffers(rows, self.config.hidden_size, tensor_size, fp8=has_fp8)
        self._is_to_share_buffers = False

    def _in_recorded_memory(
        self, hidden_states: Tensor, context: Tensor, rotary: Tensor, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Rotary table and mask where the layers' recordings read them; the first call records."""
        given = [rotary] if attention_mask is None else [rotary, attention_mask]
        if self._recorded_constants is None:
            self._recorded_constants = [tensor.clone() for tensor in given]
            with self._told_of_recording():
                record_layers(list(self.block.layers), [hidden_states, context], self._recorded_constants)
        for memory, tensor in zip(self._recorded_constants, given, strict=True):
            memory.copy_(tensor)
        found = self._recorded_constants
        return found[0], found[1] if len(found) > 1 else None

    def _told_of_recording(self) -> AbstractContextManager[None]:
        if self.config.transformer_impl != "transformer_engine":
            return nullcontext()
        from megatron_dlm.models.precision.transformer_engine import told_of_recording

        return told_of_recording()

    def forget_recordings(self) -> None:
        """Give up what has been recorded, before process groups end."""
        if self._recorded_constants is not None:
            forget_layers(list(self.block.layers))
            self._recorded_constants = None

    def _mask_for_attention(self, inputs: ModelInputs) -> Tensor | None:
        """Mask for the layers' attention as one tensor; None: the family's attention pattern applies."""
        mask = visibility(inputs, self.attention)
        if mask is None:
            return None
        # Inputs that no `MicrobatchMaker` has prepared are few: a dense mask will do.
        prepared = mask.table if mask.edges is None else mask.edges
        return mask.dense() if prepared is None else prepared

    def logits(self, inputs: ModelInputs) -> Tensor:
        """float32 [B, L, Vp] of this rank's columns; for evaluation of small batches on one stage."""
        hidden_states = self.forward(inputs)
        length, batch_size, _ = hidden_states.shape
        return self.head.logits(hidden_states.flatten(0, 1)).view(length, batch_size, -1).transpose(0, 1)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """Sharded state dict of megatron-core, with the time embedder of later stages marked as a replica."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for name, tensor in state.items():
            if name.startswith(f"{prefix}time_embedder."):
                tensor.replica_id = (self._place, *tensor.replica_id[1:])
        return state


class ChunkedDenoiser(nn.Module):
    """The chunks of an interleaved pipeline that this process holds, as one model to save and load."""

    def __init__(self, chunks: list[Denoiser]) -> None:
        super().__init__()
        self._chunks = nn.ModuleList(chunks)
        self.model, self.vocabulary = chunks[0].model, chunks[0].vocabulary
        self.attention, self.config = chunks[0].attention, chunks[0].config

    @property
    def chunks(self) -> list[Denoiser]:
        """The chunks in order, from the embedding to the head."""
        return list(self._chunks)  # type: ignore[arg-type]

    def sharded_state_dict(self, metadata: dict[str, Any] | None = None) -> ShardedStateDict:
        """All chunks' tensors by the names that `named_parameters` gives them."""
        return {
            f"_chunks.{index}.{name}": tensor
            for index, chunk in enumerate(self.chunks)
            for name, tensor in chunk.sharded_state_dict(metadata=metadata).items()
        }


def _mark_tensor_parallel(model: nn.Module) -> None:
    """Mark weights that are sharded over tensor parallel ranks, so that the gradient norm counts every shard.

    megatron-core 0.16 marks only weights it initializes itself; of unmarked weights only rank 0's shard
    counts.
    """
    cut_dim = {VocabParallelEmbedding: 0, ColumnParallelLinear: 0, RowParallelLinear: 1}
    for module in model.modules():
        for kind, dim in cut_dim.items():
            if isinstance(module, kind) and not hasattr(module.weight, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(module.weight, is_parallel=True, dim=dim, stride=1)


def _mark_sequence_parallel(model: nn.Module) -> None:
    """Mark parameters used on sequence shards, so that gradients are summed over tensor parallel ranks.

    These are norms, modulations and the time embedder; megatron-core marks the biases of its own linears.
    """
    for module in model.modules():
        if isinstance(module, ModulatedNorm | TimeEmbedder):
            parameters = list(module.parameters())
        elif isinstance(module, AdaLNTransformerLayer | FinalLayer):
            parameters = list(module.modulation.parameters())
        else:
            continue
        for parameter in parameters:
            parameter.sequence_parallel = True  # type: ignore[attr-defined]
