"""The sides that tools/bench/step.py compares: our step, the plain way, the floor, and bodies alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch

from megatron_dlm.diffusion.context import CorruptionContext
from megatron_dlm.execution.microbatches import BatchAddress, corrupted_parts
from megatron_dlm.families.registry import OBJECTIVES
from megatron_dlm.interfaces import ModelInputs, Targets, TokenBatch, Vocabulary, on_device
from megatron_dlm.kernels.choice import wants_triton
from megatron_dlm.models.config import ModelConfig
from megatron_dlm.models.precision.fp8 import Fp8Config
from megatron_dlm.models.sizes import paper_model
from megatron_dlm.platform.parallel import ParallelState
from megatron_dlm.platform.parallel_config import ParallelConfig
from megatron_dlm.platform.rng import NoiseSource
from megatron_dlm.scaling.grid_sizes import size_named
from megatron_dlm.training.optimizer import OptimizerConfig, set_learning_rate, step_if_finite

LEARNING_RATE = 1e-4
HEAD_ROWS_PER_CHUNK = 128


def model_named(size: str) -> ModelConfig:
    """A published size, or LAYERSxHIDDENxHEADS with the published sizes' conditioning."""
    return size_named(size).model(paper_model("6M"))


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
    """Recomputation of our side; the others keep every activation."""
    kernels: Any = "auto"
    transformer_impl: Any = "local"
    fp8: Fp8Config = Fp8Config()
    rows_per_chunk: int | None = HEAD_ROWS_PER_CHUNK
    prepared: bool = False
    """Corrupt batches once and use them again, as if workers had them ready."""
    layout: ParallelConfig = ParallelConfig()
    """What data parallel ranks share, of our side."""
    microbatches: int = 1
    """Microbatches of `batch_size` samples each in one step of our side."""

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

    def batches(self, step: int) -> list[TokenBatch]:
        """Clean tokens of each microbatch of a step."""
        return [self.batch(step * self.microbatches + index) for index in range(self.microbatches)]

    def address(self, step: int) -> BatchAddress:
        """Address of a step's global batch."""
        size = self.batch_size * self.microbatches
        return BatchAddress(step, step * size, size, training=True)

    def context(self, step: int) -> CorruptionContext:
        """Address of a step's draws."""
        return self.address(step).context(NoiseSource(1))


def build_denoiser(shape: Shape, parallel: ParallelState, recompute: Any = "none") -> Any:
    """A denoiser with random head and gates, so that every gradient is real; padding stays zero."""
    from megatron_dlm.models.denoiser import Denoiser
    from megatron_dlm.models.denoiser_config import denoiser_config
    from megatron_dlm.models.weight_mapping import weight_places

    model = model_named(shape.size)
    config = denoiser_config(
        model,
        shape.layout,
        shape.precision,
        recompute,
        fused_kernels=wants_triton(shape.kernels, parallel.device),
        transformer_impl=shape.transformer_impl,
        fp8=shape.fp8,
        flex_attention=parallel.device.type == "cuda" and wants_triton(shape.kernels, parallel.device),
    )
    denoiser = Denoiser(model, config, shape.vocabulary, OBJECTIVES[shape.family].attention, parallel)
    # On the device: a CPU takes a minute for the largest sizes.
    device = parallel.device
    generator = torch.Generator(device=device).manual_seed(0)
    for place in weight_places(denoiser, parallel):
        values = 0.02 * torch.randn(place.shape, generator=generator, device=device)
        place.parameter.data.copy_(place.cut(values))
    return denoiser


class OurStep:
    """The package's own step, and what it holds."""

    def __init__(self, shape: Shape, parallel: ParallelState) -> None:
        from megatron_dlm.execution.pipeline_runner import PipelineRunner
        from megatron_dlm.training.optimizer import build_optimizer, finish_gradients, wrap_data_parallel

        self.denoiser = build_denoiser(shape, parallel, shape.recompute)
        self.chunks = wrap_data_parallel(self.denoiser, shape.layout)
        self.optimizer = build_optimizer(OptimizerConfig(), shape.layout, shape.precision, self.chunks)
        self.denoiser.config.finalize_model_grads_func = finish_gradients
        self.denoiser.config.grad_scale_func = self.optimizer.scale_loss
        self._shape, self._device = shape, parallel.device
        self._objective = OBJECTIVES[shape.family]().build(shape.vocabulary)
        self._runner = PipelineRunner(self.chunks, self._objective, parallel, shape.rows_per_chunk)
        self._microbatches_of = cache(self._make) if shape.prepared else self._make
        set_learning_rate(self.optimizer, LEARNING_RATE)

    def _make(self, index: int) -> Any:
        batches, context = self._shape.batches(index), self._shape.context(index)
        microbatches = self._runner.ready(corrupted_parts(self._objective, batches, context))
        if self._shape.prepared:
            # As pinned memory brings them.
            return [on_device(microbatch, self._device) for microbatch in microbatches]
        return microbatches

    def __call__(self, index: int) -> Any:
        """Make a step; returns the batch's sums."""
        self.chunks[0].zero_grad_buffer()
        self.optimizer.zero_grad()
        sums = self._runner.run(self._microbatches_of(index), self._shape.address(index))
        step_if_finite(self.optimizer, self._device)
        return sums


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
    from tools.bench.naive import naive_loss

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


def compiled_step(shape: Shape, parallel: ParallelState) -> Callable[[int], None]:
    """A plain PyTorch DiT with full logits and autograd losses in torch's mixed precision.

    Parameters are float32 and AdamW is torch's fused one, as in the paper's repository; compiled on CUDA.
    """
    from tools.bench.naive import naive_loss_of_logits

    plain = plain_model(shape).to(parallel.device)
    optimizer = torch.optim.AdamW(
        plain.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    objective = OBJECTIVES[shape.family]().build(shape.vocabulary)
    mask, is_low = shape.vocabulary.mask_token_id, shape.precision != "fp32"

    def loss_of(inputs: ModelInputs, targets: Targets) -> torch.Tensor:
        with torch.autocast(parallel.device.type, torch.bfloat16, enabled=is_low):
            logits = plain(
                inputs.token_ids_BL,
                sigma=inputs.sigma_B,
                position_ids=inputs.position_ids_BL,
                visible_mask=None if inputs.attention_mask is None else inputs.attention_mask.dense(),
            ).logits
        loss: torch.Tensor = naive_loss_of_logits(shape.family, logits, targets, mask, targets.token_count)
        return loss

    if parallel.device.type == "cuda":
        loss_of = torch.compile(loss_of)

    def batch_of(index: int) -> tuple[ModelInputs, Targets]:
        inputs, targets = objective.corrupt(shape.batch(index), shape.context(index))
        moved = {
            name: value.to(parallel.device) for name, value in vars(targets).items() if name.endswith("_BL")
        }
        return inputs.to(parallel.device), replace(targets, **moved)

    if shape.prepared:
        batch_of = cache(batch_of)

    def step(index: int) -> None:
        optimizer.zero_grad()
        loss_of(*batch_of(index)).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()

    return step


def plain_model(shape: Shape) -> Any:
    """The exported model's code with random weights."""
    from megatron_dlm.evaluation.loaded_model import exported_model

    objective = OBJECTIVES[shape.family]()
    plain = exported_model(paper_model(shape.size), shape.vocabulary, objective, shape.seq_length)
    generator = torch.Generator().manual_seed(0)
    for parameter in plain.parameters():
        parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return plain


BUILDERS: dict[str, Callable[[Shape, ParallelState], Callable[[int], Any]]] = {
    "ours": OurStep,
    "naive": naive_step,
    "floor": floor_step,
}


def body_steps(shape: Shape, parallel: ParallelState) -> dict[str, Callable[[], None]]:
    """Forward and backward of the body alone: ours, and a plain PyTorch DiT without the CPU redirection."""
    denoiser = build_denoiser(shape, parallel)
    plain = plain_model(shape).to(denoiser.config.params_dtype)
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
