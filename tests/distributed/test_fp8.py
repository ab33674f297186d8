"""FP8's recipes emulated on a CPU: what a linear's three products read, and runs on every layout."""

from dataclasses import replace

import pytest
import torch

from megatron_dlm.families.ar.objective import ARConfig
from megatron_dlm.families.mdlm.objective import MDLMConfig
from megatron_dlm.interfaces import InputError
from megatron_dlm.models.precision.fp8 import Fp8Config
from megatron_dlm.platform.parallel_config import ParallelConfig
from megatron_dlm.run.validation import check_run
from tests.helpers.distributed import run_distributed
from tests.helpers.layouts import three_steps
from tests.helpers.selection import slow
from tools import tiny

RECIPES = ["tensorwise", "delayed", "blockwise", "mxfp8"]
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def config_for(corpus, objective, recipe, parallel, micro_batch_size=4, **fields):
    config = tiny.run_config(
        corpus,
        corpus.directory / "unused",
        objective,
        training__precision="fp8",
        training__micro_batch_size=micro_batch_size,
        optimizer__epsilon=1e-2,
    )
    model = replace(config.model, hidden_size=64, ffn_hidden_size=128)
    return replace(config, model=model, parallel=parallel, fp8=Fp8Config(recipe=recipe, **fields))


def quantised(x, dtype, rows, columns, powers):
    """In float64, block by block."""
    out = torch.empty_like(x, dtype=torch.float64)
    for i in range(0, x.shape[0], rows):
        for j in range(0, x.shape[1], columns):
            block = x[i : i + rows, j : j + columns].double()
            scale = torch.finfo(dtype).max / block.abs().max()
            scale = 2.0 ** torch.floor(torch.log2(scale)) if powers else scale
            out[i : i + rows, j : j + columns] = (block * scale).float().to(dtype).double() / scale
    return out


def products(state, recipe):
    """A linear's value and gradients, and those of operands rounded by hand."""
    from megatron_dlm.models.precision.fp8_emulation import Quantiser, _Product

    config = Fp8Config(recipe=recipe)
    generator = torch.Generator().manual_seed(0)
    # Columns and rows of very different sizes, which blocks tell apart.
    x = torch.randn(3, 50, 160, generator=generator) * torch.logspace(-3, 2, 160)
    weight = torch.randn(192, 160, generator=generator) * torch.logspace(-2, 1, 192)[:, None]
    grad = torch.randn(3, 50, 192, generator=generator) * torch.logspace(-4, 1, 192)
    leaf_x, leaf_weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    operands = tuple(Quantiser(config, operand, None) for operand in range(3))
    out = _Product.apply(leaf_x, leaf_weight, operands, None)
    out.backward(grad)
    x_MK, grad_MN = x.flatten(0, 1), grad.flatten(0, 1)
    blocks = {
        "tensorwise": ((10**6, 10**6), (10**6, 10**6), False),
        "blockwise": ((1, 128), (128, 128), True),
        "mxfp8": ((1, 32), (1, 32), True),
    }
    of_rows, of_weight, powers = blocks[recipe]
    q = quantised
    expected = [
        q(x_MK, E4M3, *of_rows, powers) @ q(weight, E4M3, *of_weight, powers).t(),
        q(grad_MN, E5M2, *of_rows, powers) @ q(weight.t(), E4M3, *of_weight, powers).t(),
        q(grad_MN.t(), E5M2, *of_rows, powers) @ q(x_MK.t(), E4M3, *of_rows, powers).t(),
    ]
    found = [out.flatten(0, 1), leaf_x.grad.flatten(0, 1), leaf_weight.grad]
    exact = [x_MK @ weight.t(), grad_MN @ weight, grad_MN.t() @ x_MK]
    return [
        (float((f - e).abs().max() / e.abs().max()), float((f - t).norm() / t.norm()))
        for f, e, t in zip(found, expected, exact, strict=True)
    ]


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "mxfp8"])
def test_products_are_those_of_rounded_operands(recipe):
    (errors,) = run_distributed(products, 1, recipe)
    for against_rounded, against_exact in errors:
        # The first is float32's summation, the second FP8's three (two for gradients) bits.
        assert against_rounded < 1e-5
        assert 5e-3 < against_exact < 0.15


def test_delayed_scaling_looks_at_earlier_steps(corpus):
    config = config_for(corpus, MDLMConfig(), "delayed", ParallelConfig(), amax_history_len=2, margin=1)
    (history,) = run_distributed(delayed_history, 1, config)
    first, second, third, amax, scale, evaluated = history
    assert (first == 0).all()
    assert (second[0] > 0).all() and (second[1] == 0).all()
    assert torch.equal(third[1], second[0]) and (third[0] > 0).all()
    assert torch.equal(third, evaluated)
    assert scale == pytest.approx(448 / amax / 2)


def delayed_history(state, config):
    from megatron_dlm.run.datasets import open_data
    from megatron_dlm.training.session import Session

    session = Session(config, open_data(config.data), state)
    linear = session.denoiser.block.layers[0].mlp.linear_fc1
    assert linear.amax_history.dtype == torch.float32 and linear.weight.dtype == torch.bfloat16
    # Zero gates would let no gradient into the layers.
    for name, parameter in session.denoiser.named_parameters():
        if "modulation" in name or "head" in name:
            parameter.data.normal_(std=0.1)
    found = [linear.amax_history.clone()]
    for step in range(2):
        session.run_batch(step, step * 8)
        found.append(linear.amax_history.clone())
    amax = float(linear.amax_history[:, 1].max())
    scale = float(linear._quantisers(linear.fp8)[1].scale)
    session.validation.run(config.evaluation)
    return [*found, amax, scale, linear.amax_history.clone()]


@pytest.fixture(scope="module")
def one_process(corpus):
    return {
        recipe: run_distributed(
            three_steps, 1, config_for(corpus, MDLMConfig(), recipe, ParallelConfig(), 8)
        )[0]
        for recipe in RECIPES
    }


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
        slow(ParallelConfig(pipeline_model_parallel_size=2)),
        slow(ParallelConfig(context_parallel_size=2)),
    ],
    ids=["tensor", "pipeline", "context"],
)
def test_layouts_differ_by_rounding_only(corpus, one_process, parallel, recipe):
    """Within bf16: parts of a tensor have other maxima than the whole, and sums another order."""
    config = config_for(corpus, MDLMConfig(), recipe, parallel)
    run = run_distributed(three_steps, 2, config, parallel=parallel)[0]
    assert run["fingerprints"] == one_process[recipe]["fingerprints"]
    for ours, theirs in zip(run["losses"], one_process[recipe]["losses"], strict=True):
        assert ours == pytest.approx(theirs, rel=5e-3)
    assert run["norms"] == pytest.approx(one_process[recipe]["norms"], rel=5e-2)


def test_first_and_last_layers_can_stay_in_bf16(corpus):
    config = config_for(
        corpus,
        MDLMConfig(),
        "tensorwise",
        ParallelConfig(),
        layers_at_start_in_bf16=1,
        layers_at_end_in_bf16=0,
    )
    assert run_distributed(layers_in_fp8, 1, config) == [[False, True]]


def layers_in_fp8(state, config):
    from megatron_dlm.run.datasets import open_data
    from megatron_dlm.run.model import build_denoiser

    denoiser = build_denoiser(config, open_data(config.data).vocabulary, state)
    layers = denoiser.block.layers
    linears = [
        [
            layer.self_attention.linear_qkv,
            layer.self_attention.linear_proj,
            layer.mlp.linear_fc1,
            layer.mlp.linear_fc2,
        ]
        for layer in layers
    ]
    assert all(len({linear.fp8 is None for linear in of_layer}) == 1 for of_layer in linears)
    return [of_layer[0].fp8 is not None for of_layer in linears]


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_recomputation_changes_no_bit(corpus, one_process, recompute):
    """Delayed scaling notes a maximum twice then."""
    config = config_for(corpus, MDLMConfig(), "delayed", ParallelConfig(), 8)
    config = replace(config, training=replace(config.training, recompute=recompute))
    (run,) = run_distributed(three_steps, 1, config)
    assert run["losses"] == one_process["delayed"]["losses"]
    assert run["norms"] == one_process["delayed"]["norms"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": {"ffn_hidden_size": 72}}, "model.ffn_hidden_size of a tensor parallel rank = 72"),
        ({"data": {"seq_length": 30}, "training": {"micro_batch_size": 1}}, "on a rank"),
        (
            {"fp8": {"layers_at_end_in_bf16": 3}},
            "fp8.layers_at_end_in_bf16: 3 exceeds the 2 layers of a stage",
        ),
    ],
)
def test_shapes_that_fp8_cannot_take_are_refused(corpus, changes, message):
    config = config_for(corpus, ARConfig(), "tensorwise", ParallelConfig())
    for section, fields in changes.items():
        config = replace(config, **{section: replace(getattr(config, section), **fields)})
    with pytest.raises(InputError, match=message):
        check_run(config, 1)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"margin": -1}, "fp8.margin: -1 is below 0"),
        ({"amax_history_len": 0}, "fp8.amax_history_len: 0 is below 1"),
        ({"recipe": "delayed", "layers_at_start_in_bf16": 1}, "delayed takes no layers_at_start_in_bf16"),
    ],
)
def test_impossible_recipes_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        Fp8Config(**fields)
