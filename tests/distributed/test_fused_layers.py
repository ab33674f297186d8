"""Layers on Triton's kernels, in its interpreter: what PyTorch computes, and what is kept for gradients."""

import weakref
from dataclasses import replace

import pytest
import torch

from megatron_dlm.families.mdlm.objective import MDLMConfig
from megatron_dlm.platform.parallel_config import ParallelConfig
from tests.helpers import weights
from tests.helpers.distributed import run_distributed
from tools import tiny

pytest.importorskip("triton")


def one_pass(state, config):
    """Loss and gradients of a small batch, and how much of cheap activations outlives the forward pass."""
    from megatron_dlm.kernels import biased_gelu
    from megatron_dlm.models import adaln_layer
    from megatron_dlm.run.datasets import open_data
    from megatron_dlm.training.session import Session

    session = Session(config, open_data(config.data), state)
    size = session.data.vocabulary.size
    weights.set_weights(session.denoiser, state, weights.random_state(config.model, size))
    session.optimizer.reload_model_params()
    original, alive, kept = adaln_layer.FusedModulatedNorm.forward, [], []
    activation, activated, kept_activated = biased_gelu.biased_gelu, [], []

    def watched_activation(*arguments):
        value = activation(*arguments)
        activated.append(weakref.ref(value.untyped_storage()))
        return value

    def watched(self, *arguments):
        stream, normed = original(self, *arguments)
        alive.append(weakref.ref(normed.untyped_storage()))
        return stream, normed

    def count(module, inputs, output):
        kept.append(sum(reference() is not None for reference in alive[:-1]))
        kept_activated.append(sum(reference() is not None for reference in activated))

    biased_gelu.biased_gelu = watched_activation
    adaln_layer.FusedModulatedNorm.forward = watched
    session.denoiser.final_layer.register_forward_hook(count)
    sums = session.run_batch(0, 0)
    return sums.loss, weights.reduced_gradients(session), kept, len(alive), kept_activated


def run(corpus, kernels, recompute, parallel):
    config = tiny.run_config(
        corpus,
        corpus.directory / "unused",
        MDLMConfig(),
        data__seq_length=8,
        training__global_batch_size=2,
        training__micro_batch_size=2,
        training__kernels=kernels,
        training__recompute=recompute,
        evaluation__batch_size=2,
        model__num_attention_heads=2,
    )
    config = replace(config, parallel=parallel)
    size = parallel.tensor_model_parallel_size
    return run_distributed(one_pass, size, config, parallel=parallel)[0]


@pytest.mark.parametrize(
    "parallel",
    [
        pytest.param(ParallelConfig(), id="one process", marks=pytest.mark.slow),
        pytest.param(
            ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
            id="tensor and sequence parallel",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_fused_layers_compute_what_pytorch_does(corpus, parallel):
    plain = run(corpus, "torch", "none", parallel)
    fused = run(corpus, "triton", "none", parallel)
    again = run(corpus, "triton", "selective", parallel)
    norms = run(corpus, "triton", "norms", parallel)
    assert fused[0] == pytest.approx(plain[0], rel=1e-6)
    for name, gradient in plain[1].items():
        assert (fused[1][name] - gradient).abs().max() < 2e-6 * gradient.abs().max(), name
    # Values that are made again have the same bits.
    for other in (again, norms):
        assert other[0] == fused[0] and all(torch.equal(other[1][n], g) for n, g in fused[1].items())
    # Two norms of each of two layers, and the final one; none of the layers' outlives the forward pass.
    assert fused[3] == again[3] == 5
    assert fused[2] == [4] and again[2] == norms[2] == [0]
    # And one activation of each layer.
    assert fused[4] == norms[4] == [2] and again[4] == [0]
