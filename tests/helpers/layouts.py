"""Training steps at any layout, compared with those of one process."""

from dataclasses import replace

import pytest

from megatron_dlm.families.ar.objective import ARConfig
from megatron_dlm.families.block_diffusion.objective import BlockDiffusionConfig
from megatron_dlm.families.duo.curriculum import CurriculumConfig
from megatron_dlm.families.duo.objective import DuoConfig
from megatron_dlm.families.esolm.objective import EsoLMConfig
from megatron_dlm.families.mdlm.objective import MDLMConfig
from megatron_dlm.models.config import ModelConfig
from megatron_dlm.platform.parallel_config import ParallelConfig
from tests.helpers import weights
from tools import tiny

STEPS = 3


FAMILIES = {
    "mdlm": MDLMConfig(),
    "mdlm-elbo": MDLMConfig(loss="elbo", noise_schedule="cosine", time_conditioning=True),
    "ar": ARConfig(),
    "duo": DuoConfig(),
    "duo-curriculum": DuoConfig(curriculum=CurriculumConfig(steps=2), mask_in_noise=False),
    "esolm": EsoLMConfig(ssl_ratio=0.5, ssl_multiple=8),
    "esolm-two-parts": EsoLMConfig(alpha_0=0.5, batch_split=0.5, loss="elbo"),
    "mdlm-shifted": MDLMConfig(shift=True),
    "mdlm-lookahead": MDLMConfig(schedules=("lookahead 0:0.1 4",)),
    # Data parallel ranks then run different numbers of microbatches.
    "esolm-uneven-parts": EsoLMConfig(alpha_0=0.5, batch_split=0.375),
    "block-diffusion": BlockDiffusionConfig(block_size=8),
    # Blocks whose documents do not see each other.
    "mdlm-documents": MDLMConfig(),
    "ar-documents": ARConfig(),
    "esolm-documents": EsoLMConfig(alpha_0=0.5, batch_split=0.5, loss="elbo"),
}


def context_of(options):
    return int(options.removeprefix("context ")[0]) if options.startswith("context ") else 1


def parallel_of(layout):
    tensor, pipeline, _, _, options = layout
    return ParallelConfig(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        context_parallel_size=context_of(options),
        sequence_parallel="sequence" in options,
        virtual_pipeline_model_parallel_size=2 if "interleaved" in options else 1,
        use_distributed_optimizer="plain" not in options,
        # 301 ids in 384 columns on one rank, in 512 on two and on four, the last of which has padding alone.
        pad_vocabulary_to=128 if "padded" in options else 0,
        overlap_grad_reduce="overlap" in options,
        overlap_param_gather="gather" in options,
        # Several buckets in so small a model.
        bucket_size=2000 if "overlap" in options else 0,
    )


def toy_model(**changes):
    # 5 heads: tensor parallelism 2 pads them to 6. 3 layers: 2 stages have 2 and 1.
    shape = ModelConfig(
        num_layers=3, hidden_size=40, num_attention_heads=5, ffn_hidden_size=64, conditioning_size=16
    )
    return replace(shape, **changes)


def three_steps(state, config):
    """Losses, fingerprints and gradients of three steps from random weights, and the bound after them."""
    from megatron_dlm.run.datasets import open_data
    from megatron_dlm.training.optimizer import set_learning_rate
    from megatron_dlm.training.session import Session

    data = open_data(config.data)
    session = Session(config, data, state)
    # In the modules' precision, so that main weights, of shards or of an optimizer, all begin alike.
    values = weights.random_state(config.model, data.vocabulary.size)
    dtype = session.denoiser.config.params_dtype
    weights.set_weights(session.denoiser, state, {n: v.to(dtype).float() for n, v in values.items()})
    session.optimizer.reload_model_params()
    losses, bands, fingerprints, gradients, norms = [], [], [], [], []
    for step in range(STEPS):
        sums = session.run_batch(step, step * config.training.global_batch_size)
        # Each sample is in one band of the diffusion time, if its family has one.
        assert not sums.band_nats or abs(sum(sums.band_nats) / sums.bound - 1) < 1e-9
        bands.append([nats / sums.tokens for nats in sums.band_nats])
        losses.append((sums.loss / sums.tokens, sums.bound / sums.tokens))
        fingerprints.append(sums.fingerprint)
        gradients.append(weights.reduced_gradients(session))
        set_learning_rate(session.optimizer, 1e-3)
        norms.append(float(session.optimizer.step()[1]))
    validation = session.validation.run(config.evaluation).nats_per_token
    return {
        "losses": losses,
        "bands": bands,
        "fingerprints": fingerprints,
        "gradients": gradients,
        "norms": norms,
        "validation": validation,
    }


def all_families(state, configs):
    return {name: three_steps(state, config) for name, config in configs.items()}


def configs_for(corpus, parallel, micro_batch_size, model=None, recompute="selective"):
    configs = {
        name: tiny.run_config(
            corpus,
            corpus.directory / "unused",
            objective,
            training__micro_batch_size=micro_batch_size,
            training__recompute=recompute,
            data__document_mask=name.endswith("-documents"),
            # Adam divides by the gradient's size: with a small epsilon it blows up its last bits.
            optimizer__epsilon=1e-2,
        )
        for name, objective in FAMILIES.items()
    }
    return {name: replace(c, model=model or toy_model(), parallel=parallel) for name, c in configs.items()}


def assert_equal_runs(run, reference, loss=1e-5, gradient=1e-5, norm=1e-5):
    """Equal corruption, and relative differences of losses and gradients within bounds; the largest ones."""
    assert run["fingerprints"] == reference["fingerprints"]
    largest_loss, largest_gradient = 0.0, 0.0
    for ours, theirs in zip(run["losses"], reference["losses"], strict=True):
        assert ours == pytest.approx(theirs, rel=loss)
        largest_loss = max(largest_loss, abs(ours[0] / theirs[0] - 1))
    for ours, theirs in zip(run["bands"], reference["bands"], strict=True):
        # Parts of the bound, of which a small one may differ by more of itself.
        assert ours == pytest.approx(theirs, rel=loss, abs=loss * sum(theirs))
    assert run["validation"] == pytest.approx(reference["validation"], rel=loss)
    assert run["norms"] == pytest.approx(reference["norms"], rel=norm)
    for step, (ours, theirs) in enumerate(zip(run["gradients"], reference["gradients"], strict=True)):
        assert ours.keys() == theirs.keys()
        for name, expected in theirs.items():
            difference = float((ours[name] - expected).abs().max() / expected.abs().max())
            assert difference < gradient, (step, name, difference)
            largest_gradient = max(largest_gradient, difference)
    return largest_loss, largest_gradient
