"""The sides that tools/bench/step.py compares: our step, the plain way, the floor, and bodies alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from megatron_dlm.interfaces import ModelInputs, TokenBatch, Vocabulary
from megatron_dlm.models.sizes import paper_model
from megatron_dlm.objectives.base import CorruptionContext
from megatron_dlm.objectives.registry import OBJECTIVES
from megatron_dlm.platform.parallel import ParallelConfig, ParallelState
from megatron_dlm.platform.rng import NoiseSource
from megatron_dlm.training.microbatches import BatchAddress, corrupted_parts
from megatron_dlm.training.optimizer import OptimizerConfig, set_learning_rate, step_if_finite

LEARNING_RATE = 1e-4
HEAD_ROWS_PER_CHUNK = 128


@dataclass(frozen=True)
class Shape:
    """What one step computes on."""

    size: str
    family: str
    batch_size: int
    seq_length: int
    vocabulary_size: int
    precision: Any
    recompute: Any
    """Of our side; the others keep every activation."""

    @property
    def vocabulary(self) -> Vocabulary:
        """The mask token is the last id, as in the paper's IsoFLOP runs."""
        last = self.vocabulary_size - 1
        return Vocabulary(size=self.vocabulary_size, mask_token_id=last, eos_token_id=2, bos_token_id=1)

    def batch(self, step: int) -> TokenBatch:
        """Random clean tokens."""
        generator = torch.Generator().manual_seed(step)
        shape = (self.batch_size, self.seq_length + 1)
        tokens = torch.randint(3, self.vocabulary_size - 1, shape, generator=generator)
        return TokenBatch(
            token_ids=tokens, sample_indices=np.arange(self.batch_size) + step * self.batch_size
        )

    def address(self, step: int) -> BatchAddress:
        """Of a step's batch."""
        return BatchAddress(step, step * self.batch_size, self.batch_size, training=True)

    def context(self, step: int) -> CorruptionContext:
        """Address of a step's draws."""
        return self.address(step).context(NoiseSource(1))


def build_denoiser(shape: Shape, parallel: ParallelState, recompute: Any = "none") -> Any:
    """A denoiser with random head and gates, so that every gradient is real."""
    from megatron_dlm.models.config import transformer_config
    from megatron_dlm.models.denoiser import Denoiser

    model = paper_model(shape.size)
    config = transformer_config(model, ParallelConfig(), shape.precision, recompute)
    denoiser = Denoiser(model, config, shape.vocabulary, OBJECTIVES[shape.family].attention, parallel)
    generator = torch.Generator().manual_seed(0)
    for parameter in denoiser.parameters():
        parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return denoiser


def our_step(shape: Shape, parallel: ParallelState) -> Callable[[int], None]:
    """The package's own step."""
    from megatron.core.distributed import finalize_model_grads

    from megatron_dlm.training.optimizer import build_optimizer, wrap_data_parallel
    from megatron_dlm.training.step import PipelineRunner

    denoiser = build_denoiser(shape, parallel, shape.recompute)
    chunks = wrap_data_parallel(denoiser, ParallelConfig())
    optimizer = build_optimizer(OptimizerConfig(), ParallelConfig(), shape.precision, chunks)
    denoiser.config.finalize_model_grads_func = finalize_model_grads
    denoiser.config.grad_scale_func = optimizer.scale_loss
    objective = OBJECTIVES[shape.family]().build(shape.vocabulary)
    runner = PipelineRunner(chunks, objective, parallel, HEAD_ROWS_PER_CHUNK)
    set_learning_rate(optimizer, LEARNING_RATE)

    def step(index: int) -> None:
        chunks[0].zero_grad_buffer()
        optimizer.zero_grad()
        microbatches = corrupted_parts(objective, [shape.batch(index)], shape.context(index))
        runner.run(microbatches, shape.address(index))
        step_if_finite(optimizer)

    return step


def plain_step(
    shape: Shape, parallel: ParallelState, loss_of: Callable[..., torch.Tensor]
) -> Callable[[int], None]:
    """A step of the same denoiser under plain autograd and torch's AdamW."""
    denoiser = build_denoiser(shape, parallel)
    optimizer = torch.optim.AdamW(denoiser.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    objective = OBJECTIVES[shape.family]().build(shape.vocabulary)

    def step(index: int) -> None:
        optimizer.zero_grad()
        inputs, targets = objective.corrupt(shape.batch(index), shape.context(index))
        loss_of(denoiser, inputs, targets).backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()

    return step


def naive_step(shape: Shape, parallel: ParallelState) -> Callable[[int], None]:
    """Full logits, autograd losses."""
    from tests.helpers.naive import naive_loss

    def loss_of(denoiser: Any, inputs: ModelInputs, targets: Any) -> torch.Tensor:
        head = denoiser.head
        hidden = denoiser(inputs).to(head.weight.dtype)
        mask, tokens = shape.vocabulary.mask_token_id, targets.token_count
        return naive_loss(shape.family, hidden, head.weight, head.bias, targets, mask, tokens)

    return plain_step(shape, parallel, loss_of)


class _MatrixProducts(torch.autograd.Function):
    """The head's three matrix products, chunk by chunk, on constant logit gradients."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        dhidden, dweight = torch.empty_like(hidden), torch.zeros_like(weight)
        for start in range(0, len(hidden), HEAD_ROWS_PER_CHUNK):
            rows = hidden[start : start + HEAD_ROWS_PER_CHUNK]
            logits = torch.mm(rows, weight.t())
            dhidden[start : start + HEAD_ROWS_PER_CHUNK] = torch.mm(logits, weight)
            dweight.addmm_(logits.t(), rows)
        ctx.save_for_backward(dhidden, dweight)
        return hidden.sum()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return ctx.saved_tensors


def floor_step(shape: Shape, parallel: ParallelState) -> Callable[[int], None]:
    """Body and the head's matrix products, no loss."""

    def loss_of(denoiser: Any, inputs: ModelInputs, targets: Any) -> torch.Tensor:
        rows = targets.weight_BL.t().reshape(-1).nonzero()[:, 0]
        hidden = denoiser(inputs).flatten(0, 1)[rows].to(denoiser.head.weight.dtype)
        loss: torch.Tensor = _MatrixProducts.apply(hidden, denoiser.head.weight)
        return loss

    return plain_step(shape, parallel, loss_of)


BUILDERS = {"ours": our_step, "naive": naive_step, "floor": floor_step}


def body_steps(shape: Shape, parallel: ParallelState) -> dict[str, Callable[[], None]]:
    """Forward and backward of the body alone: ours, and a plain PyTorch DiT without the CPU redirection."""
    from megatron_dlm.conversion.hugging_face_model.configuration_megatron_dlm import MegatronDlmConfig
    from megatron_dlm.conversion.hugging_face_model.modeling_megatron_dlm import MegatronDlmModel
    from megatron_dlm.conversion.to_hugging_face import hugging_face_fields

    denoiser = build_denoiser(shape, parallel)
    fields = hugging_face_fields(denoiser.model, shape.vocabulary, OBJECTIVES[shape.family]())
    plain = MegatronDlmModel(MegatronDlmConfig(**fields)).to(denoiser.config.params_dtype)
    for parameter in plain.parameters():
        parameter.data.normal_(std=0.02)
    tokens = shape.batch(0).token_ids[:, :-1]
    positions = torch.arange(shape.seq_length)[None]
    inputs = ModelInputs(
        token_ids_BL=tokens, position_ids_BL=positions, sigma_B=torch.zeros(shape.batch_size)
    )

    def plain_body() -> None:
        conditioning = plain.sigma_map(inputs.sigma_B)
        cos, sin = plain._rotary(positions)
        x = plain.vocab_embed(tokens).float()
        for block in plain.blocks:
            x = block(x, conditioning, cos, sin, None)
        x.sum().backward()

    def without_redirection() -> None:
        with torch.overrides._pop_mode_temporarily():
            plain_body()

    return {
        "ours": lambda: denoiser(inputs).sum().backward(),
        "plain": without_redirection,
        "plain, redirected": plain_body,
    }
