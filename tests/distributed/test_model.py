"""The denoiser against numbers recorded from the paper's code, and the head against full logits."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_dlm.diffusion.cross_entropy import cross_entropy_and_dlogits
from megatron_dlm.families.duo.objective import DuoConfig
from megatron_dlm.families.mdlm.objective import MDLMConfig
from megatron_dlm.interfaces import AttentionPattern, HeadRows, ModelInputs, RowTargets, Targets, Vocabulary
from megatron_dlm.models.config import ModelConfig
from megatron_dlm.models.denoiser_config import denoiser_config
from megatron_dlm.platform.parallel_config import ParallelConfig
from megatron_dlm.platform.vocab_parallel import VocabShard
from tests.helpers import weights
from tests.helpers.distributed import run_distributed
from tools.oracle.networks import recorded_shape

NETWORKS = {
    "ar": (AttentionPattern.CAUSAL, False),
    "bidir_sigma0": (AttentionPattern.BIDIRECTIONAL, False),
    "bidir_sigma": (AttentionPattern.BIDIRECTIONAL, True),
}


@torch.no_grad()
def recorded_networks(state, arrays, parallel_config):
    """Largest difference of each recorded network's logits, relative to its largest logit."""
    from megatron_dlm.models.denoiser import Denoiser
    from megatron_dlm.models.weight_mapping import weight_places

    model, vocabulary = recorded_shape(arrays)
    found = {}
    for name, (pattern, conditioned) in NETWORKS.items():
        config = denoiser_config(model, parallel_config, "fp32", "none")
        denoiser = Denoiser(model, config, vocabulary, pattern, state)
        for place in weight_places(denoiser, state):
            full = torch.from_numpy(arrays[f"w/{place.name}"])
            assert tuple(full.shape) == place.shape
            place.parameter.copy_(place.cut(full))
        tokens = torch.from_numpy(arrays["x"])
        sigma = torch.from_numpy(arrays["sigma"]) * conditioned
        positions = torch.arange(tokens.shape[1])[None]
        logits = denoiser.logits(ModelInputs(token_ids_BL=tokens, position_ids_BL=positions, sigma_B=sigma))
        vocab = denoiser.head.vocab
        expected = torch.from_numpy(arrays[name])
        mine = expected[..., vocab.start : min(vocab.stop, vocabulary.size)]
        difference = (logits[..., : mine.shape[-1]] - mine).abs().max()
        found[name] = float(difference / expected.abs().max())
    return found


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_recorded_networks_are_reproduced(oracle, tensor):
    arrays = {key[4:]: oracle[key] for key in oracle.files if key.startswith("net/")}
    parallel = ParallelConfig(tensor_model_parallel_size=tensor)
    for found in run_distributed(recorded_networks, tensor, arrays, parallel, parallel=parallel):
        assert all(difference < 1e-5 for difference in found.values()), found


def test_time_sinusoid_is_the_recorded_one(oracle):
    from megatron_dlm.models.time_embedding import sinusoid

    ours = sinusoid(torch.from_numpy(oracle["temb/sigma"]).float())
    np.testing.assert_allclose(ours.numpy(), oracle["temb/emb"], atol=2e-6)


SIZE, MASK, HIDDEN = 13, 4, 8


def head_case(tensor_rank, tensor_group, tensor_size, dtype=torch.float32, fused=False):
    """A head over this rank's columns, hidden states [5, 3, 8] and targets with 7 of 15 rows in the loss."""
    from megatron_dlm.models.head import Head

    vocabulary = Vocabulary(size=SIZE, mask_token_id=MASK, eos_token_id=0, bos_token_id=1)
    vocab = VocabShard.of_rank(vocabulary, tensor_rank, tensor_group, tensor_size, fused=fused)
    head = Head(HIDDEN, vocab, tensor_group, dtype, torch.device("cpu"))
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(SIZE, HIDDEN, generator=generator)
    bias = torch.randn(SIZE, generator=generator)
    for parameter, full in ((head.weight, weight), (head.bias, bias)):
        columns = full[vocab.start : vocab.stop]
        # Garbage in the padded columns must not matter.
        parameter.data.fill_(7.0)
        parameter.data[: len(columns)] = columns
    hidden = torch.randn(5, 3, HIDDEN, generator=generator)
    clean = torch.randint(5, SIZE, (3, 5), generator=generator)
    weights = torch.rand(3, 5, generator=generator) * (torch.rand(3, 5, generator=generator) < 0.5)
    targets = Targets(
        clean_BL=clean,
        noisy_BL=torch.randint(5, SIZE, (3, 5), generator=generator),
        alpha_BL=torch.rand(3, 5, generator=generator, dtype=torch.float64),
        weight_BL=weights.double(),
        bound_weight_BL=2 * weights.double(),
        token_count=15,
    )
    return head, hidden, targets, weight, bias


def full_logits_loss(hidden, targets, weight, bias):
    hidden, weight, bias = (x.double().requires_grad_() for x in (hidden, weight, bias))
    logits = hidden @ weight.t() + bias
    logits = logits.index_fill(-1, torch.tensor([MASK]), float("-inf"))
    nats = torch.nn.functional.cross_entropy(
        logits.transpose(0, 1).flatten(0, 1), targets.clean_BL.flatten(), reduction="none"
    )
    loss = (nats * targets.weight_BL.flatten()).sum()
    return loss, torch.autograd.grad(loss, (hidden, weight, bias))


def chunked_head(state, rows_per_chunk, fused):
    place = state.tensor_rank, state.tensor_group, state.tensor_size
    head, hidden, targets, weight, bias = head_case(*place, fused=fused)
    objective = MDLMConfig().build(head.vocab.vocabulary)
    hidden.requires_grad_()
    losses = head(hidden, HeadRows.of(targets), objective.loss_and_dlogits, rows_per_chunk)
    loss, bound = losses.loss, losses.bound
    (3.0 * loss).backward()
    expected, (dhidden, dweight, dbias) = full_logits_loss(hidden.detach(), targets, weight, bias)
    columns = slice(head.vocab.start, min(head.vocab.stop, SIZE))
    count = columns.stop - columns.start
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(bound, 2 * expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(hidden.grad.double(), 3 * dhidden, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(head.weight.grad[:count].double(), 3 * dweight[columns], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(head.bias.grad[:count].double(), 3 * dbias[columns], rtol=1e-5, atol=1e-6)
    assert (head.weight.grad[count:] == 0).all() and (head.bias.grad[count:] == 0).all()
    return True


HEADS = [(1, 1, False), (1, 3, False), (1, 100, False), (2, 4, False), (4, 2, False), (2, 4, True)]
"""Tensor parallel size, rows of a chunk, Triton's kernels."""


@pytest.mark.parametrize(("tensor", "rows_per_chunk", "fused"), HEADS)
def test_chunked_head_equals_full_logits(tensor, rows_per_chunk, fused):
    fused and pytest.importorskip("triton")
    parallel = ParallelConfig(tensor_model_parallel_size=tensor)
    assert all(run_distributed(chunked_head, tensor, rows_per_chunk, fused, parallel=parallel))


def low_precision_head(state, fused):
    """Errors in bf16, relative to the largest value: loss, gradients of hidden states, weight and bias."""
    head, hidden, targets, weight, bias = head_case(0, state.tensor_group, 1, torch.bfloat16, fused)
    hidden.requires_grad_()
    objective = MDLMConfig().build(head.vocab.vocabulary)
    losses = head(hidden, HeadRows.of(targets), objective.loss_and_dlogits, 4)
    losses.loss.backward()
    expected, gradients = full_logits_loss(
        hidden.detach().bfloat16(), targets, weight.bfloat16(), bias.bfloat16()
    )
    pairs = [(losses.loss, expected)]
    pairs += zip((hidden.grad, head.weight.grad, head.bias.grad), gradients, strict=True)
    return [float((ours.double() - theirs).abs().max() / theirs.abs().max()) for ours, theirs in pairs]


@pytest.mark.parametrize("fused", [False, True])
def test_bf16_logits_cost_no_more_than_their_rounding(fused):
    """bf16 has 8 bits: 0.4% of a value."""
    fused and pytest.importorskip("triton")
    (errors,) = run_distributed(low_precision_head, 1, fused)
    assert errors[0] < 5e-3 and max(errors) < 2e-2, errors


def chunked_duo_head(state, rows_per_chunk, fused):
    """Against Duo's loss over full logits in float64 under autograd."""
    from megatron_dlm.diffusion.uniform_divergence import uniform_divergence

    place = state.tensor_rank, state.tensor_group, state.tensor_size
    head, hidden, targets, weight, bias = head_case(*place, fused=fused)
    objective = DuoConfig().build(head.vocab.vocabulary)
    hidden.requires_grad_()
    losses = head(hidden, HeadRows.of(targets), objective.loss_and_dlogits, rows_per_chunk)
    losses.loss.backward()
    full = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    whole = VocabShard.of_rank(head.vocab.vocabulary, 0, None, 1)
    logits = (full[0] @ full[1].t() + full[2]).transpose(0, 1).flatten(0, 1)
    flat = {f"{n.removesuffix('_BL')}_R": v.flatten() for n, v in vars(targets).items() if n.endswith("_BL")}
    expected = (uniform_divergence(logits.clone(), RowTargets(**flat), whole, SIZE) * flat["weight_R"]).sum()
    dhidden, dweight, dbias = torch.autograd.grad(expected, full)
    columns = slice(head.vocab.start, min(head.vocab.stop, SIZE))
    count = columns.stop - columns.start
    torch.testing.assert_close(losses.loss.double(), expected, rtol=1e-6, atol=0)
    for ours, theirs in (
        (hidden.grad, dhidden),
        (head.weight.grad[:count], dweight[columns]),
        (head.bias.grad[:count], dbias[columns]),
    ):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))
    assert (head.weight.grad[count:] == 0).all() and (head.bias.grad[count:] == 0).all()
    return True


@pytest.mark.parametrize(("tensor", "rows_per_chunk", "fused"), HEADS[1:])
def test_chunked_duo_head_equals_full_logits(tensor, rows_per_chunk, fused):
    fused and pytest.importorskip("triton")
    parallel = ParallelConfig(tensor_model_parallel_size=tensor)
    assert all(run_distributed(chunked_duo_head, tensor, rows_per_chunk, fused, parallel=parallel))


def autograd_divergence(state, fused):
    """Duo's differentiable loss against its closed form, where one rank of four holds only padding."""
    from megatron_dlm.diffusion.uniform_divergence import uniform_divergence, uniform_divergence_and_dlogits

    size, mask = 9, 4
    vocabulary = Vocabulary(size=size, mask_token_id=mask, eos_token_id=0, bos_token_id=1)
    place = state.tensor_rank, state.tensor_group, state.tensor_size
    vocab = VocabShard.of_rank(vocabulary, *place, fused=fused)
    generator = torch.Generator().manual_seed(4)
    clean = torch.tensor([0, 1, 8, 5])
    ones = torch.ones(4, dtype=torch.float64)
    targets = RowTargets(
        clean_R=clean,
        noisy_R=torch.tensor([0, 7, 2, 4]),
        alpha_R=0.6 * ones,
        weight_R=ones,
        bound_weight_R=ones,
    )
    full = torch.randn(4, 4 * -(-size // 4), dtype=torch.float64, generator=generator)
    leaf = full[:, vocab.start : vocab.stop].clone().requires_grad_()
    losses = uniform_divergence(leaf.clone(), targets, vocab, size)
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    found, closed = uniform_divergence_and_dlogits(leaf.detach().clone(), targets, vocab, size)
    torch.testing.assert_close(losses.detach(), found, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, closed, rtol=1e-9, atol=1e-12)
    entropy, slope = cross_entropy_and_dlogits(leaf.detach().clone(), clean, vocab)
    assert torch.isfinite(entropy).all() and torch.isfinite(slope).all()
    return vocab.start >= size


@pytest.mark.parametrize("fused", [False, True])
def test_losses_are_right_where_a_rank_holds_only_padding(fused):
    fused and pytest.importorskip("triton")
    parallel = ParallelConfig(tensor_model_parallel_size=4)
    assert run_distributed(autograd_divergence, 4, fused, parallel=parallel) == [False, False, False, True]


def no_rows(state):
    head, hidden, targets, *_ = head_case(0, state.tensor_group, 1)
    nothing = torch.zeros_like(targets.weight_BL)
    empty = replace(targets, weight_BL=nothing, bound_weight_BL=nothing)
    hidden.requires_grad_()
    objective = MDLMConfig().build(head.vocab.vocabulary)
    losses = head(hidden, HeadRows.of(empty), objective.loss_and_dlogits, 4)
    loss, bound = losses.loss, losses.bound
    loss.backward()
    return loss.item(), bound.item(), hidden.grad.abs().max().item(), head.weight.grad.abs().max().item()


def test_a_microbatch_without_masked_tokens_costs_nothing():
    assert run_distributed(no_rows, 1) == [(0.0, 0.0, 0.0, 0.0)]


def small_denoiser(state, precision):
    """A denoiser of two layers with initial weights, and inputs for it."""
    from megatron_dlm.models.denoiser import Denoiser
    from megatron_dlm.models.initialization import initialize

    model = ModelConfig(num_layers=2, hidden_size=16, num_attention_heads=2, ffn_hidden_size=32)
    vocabulary = Vocabulary(size=SIZE, mask_token_id=MASK, eos_token_id=0, bos_token_id=1)
    config = denoiser_config(model, ParallelConfig(), precision, "none")
    denoiser = Denoiser(model, config, vocabulary, AttentionPattern.BIDIRECTIONAL, state)
    initialize(denoiser, state, seed=1)
    inputs = ModelInputs(
        token_ids_BL=torch.arange(8).view(2, 4) % SIZE,
        position_ids_BL=torch.arange(4)[None],
        sigma_B=torch.zeros(2),
    )
    return denoiser, inputs


def two_backwards(state):
    """What a second backward over the head's and over the layers' retained graph says or gives."""
    head, hidden, targets, *_ = head_case(0, state.tensor_group, 1)
    hidden.requires_grad_()
    objective = MDLMConfig().build(head.vocab.vocabulary)
    loss = head(hidden, HeadRows.of(targets), objective.loss_and_dlogits, 3).loss
    (2.0 * loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="gradients are used up"):
        loss.backward()
    denoiser, inputs = small_denoiser(state, "fp32")
    output = denoiser(inputs).square().sum()
    parameters = [p for p in denoiser.parameters() if p.requires_grad]
    first, second = (
        torch.autograd.grad(output, parameters, retain_graph=True, allow_unused=True) for _ in range(2)
    )
    used = [(a, b) for a, b in zip(first, second, strict=True) if a is not None]
    return len(used), all(torch.equal(a, b) for a, b in used), max(a.abs().max().item() for a, _ in used)


def test_a_second_backward_gives_the_same_or_is_refused():
    ((count, is_equal, largest),) = run_distributed(two_backwards, 1)
    assert count > 20 and is_equal and largest > 0


def rows_seen(state):
    """Rows for which logits were made, and the largest chunk."""
    head, hidden, targets, *_ = head_case(0, state.tensor_group, 1)
    objective = MDLMConfig().build(head.vocab.vocabulary)
    chunks = []

    def spy(logits, row_targets: RowTargets, vocab):
        chunks.append((int((row_targets.weight_R > 0).sum()), logits.shape[0]))
        return objective.loss_and_dlogits(logits, row_targets, vocab)

    head(hidden, HeadRows.of(targets), spy, 3)
    return chunks, int((targets.weight_BL > 0).sum())


def test_only_rows_with_a_loss_reach_the_head():
    ((chunks, expected),) = run_distributed(rows_seen, 1)
    assert sum(rows for rows, _ in chunks) == expected < 15
    assert all(rows <= 3 and padded % 16 == 0 for rows, padded in chunks)


def bf16_residual(state):
    """dtypes of a bf16 model's parameters, hidden states and pipeline tensors."""
    denoiser, inputs = small_denoiser(state, "bf16")
    hidden = denoiser(inputs)
    return (
        {str(p.dtype) for p in denoiser.parameters()},
        str(hidden.dtype),
        str(denoiser.config.pipeline_dtype),
    )


def test_bf16_keeps_a_float32_residual_stream():
    assert run_distributed(bf16_residual, 1) == [({"torch.bfloat16"}, "torch.float32", "torch.float32")]


def through_the_denoiser(state, path, parallel_config):
    """The tensors of a reference checkpoint after a stay in this layout's parameters."""
    from megatron_dlm.conversion.reference import (
        read_reference_checkpoint,
    )
    from megatron_dlm.models.denoiser import Denoiser
    from megatron_dlm.models.weight_mapping import local_tensors

    vocabulary = Vocabulary(size=SIZE, mask_token_id=MASK, eos_token_id=0, bos_token_id=1)
    config = denoiser_config(REFERENCE_MODEL, parallel_config, "fp32", "none")
    denoiser = Denoiser(REFERENCE_MODEL, config, vocabulary, AttentionPattern.CAUSAL, state)
    full = read_reference_checkpoint(path, REFERENCE_MODEL, vocabulary)
    return weights.gather(denoiser, state, local_tensors(full, denoiser, state))


REFERENCE_MODEL = ModelConfig(
    num_layers=2, hidden_size=20, num_attention_heads=5, ffn_hidden_size=80, conditioning_size=8
)


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (4, 1), (2, 2)])
def test_reference_checkpoints_survive_any_layout_bit_by_bit(tmp_path, tensor, pipeline):
    from megatron_dlm.conversion.reference import write_reference_checkpoint

    full = weights.random_state(REFERENCE_MODEL, SIZE)
    path = tmp_path / "reference.ckpt"
    write_reference_checkpoint(full, path, REFERENCE_MODEL, step=3)
    parallel = ParallelConfig(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
    for found in run_distributed(through_the_denoiser, tensor * pipeline, path, parallel, parallel=parallel):
        assert found.keys() == full.keys()
        assert all(torch.equal(found[name], value) for name, value in full.items())
