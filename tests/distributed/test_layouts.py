"""Loss, gradients and corruption do not depend on the layout; megatron-core equals an independent model."""

from dataclasses import replace

import pytest
import torch

from megatron_dlm.models.visibility import visibility
from megatron_dlm.platform.parallel_config import ParallelConfig
from tests.helpers import weights
from tests.helpers.distributed import run_distributed
from tests.helpers.layouts import (
    FAMILIES,
    all_families,
    assert_equal_runs,
    configs_for,
    context_of,
    parallel_of,
    three_steps,
    toy_model,
)
from tests.helpers.selection import slow

# tensor, pipeline, data, micro-batch, options of the layout
QUICK = [
    (1, 1, 2, 4, ""),
    (1, 1, 1, 4, "context 2"),
]
SLOW = [
    (2, 2, 1, 2, ""),
    (1, 2, 2, 2, "overlap, gather"),
    (2, 1, 1, 8, "context 2, sequence"),
    (1, 2, 1, 2, ""),
    (1, 1, 2, 2, "plain optimizer"),
    (2, 1, 1, 4, "sequence, padded"),
    (2, 1, 1, 4, "sequence"),
    (2, 1, 1, 4, ""),
    (1, 1, 1, 2, "context 4"),
    (1, 2, 2, 2, "context 2"),
    (2, 2, 1, 4, "context 2, sequence"),
    (1, 1, 2, 4, "context 2, plain optimizer"),
    (1, 3, 1, 1, ""),
    (1, 2, 2, 2, ""),
    (1, 1, 2, 1, "overlap, plain optimizer"),
    (2, 1, 2, 2, "overlap, sequence"),
    (2, 1, 2, 2, "overlap, gather, sequence"),
    (1, 2, 2, 2, "overlap"),
    (1, 1, 4, 1, "overlap, gather"),
    (1, 1, 2, 1, "overlap, gather, recompute"),
    (4, 1, 1, 8, "sequence"),
    (2, 2, 1, 4, "sequence"),
    (1, 3, 2, 4, "plain optimizer"),
    (2, 1, 4, 1, "sequence"),
    (2, 2, 2, 2, "sequence"),
    (4, 2, 1, 2, ""),
    (2, 1, 1, 4, "sequence, recompute"),
    (2, 2, 1, 4, "context 2, sequence, recompute"),
    (1, 2, 2, 2, "recompute"),
    (1, 1, 1, 8, "padded"),
    (4, 1, 1, 4, "padded"),
    (1, 2, 2, 2, "overlap, gather, padded"),
]
LAYOUTS = [*QUICK, *map(slow, SLOW)]


@pytest.fixture(scope="module")
def one_process(corpus):
    configs = configs_for(corpus, ParallelConfig(), 8)
    return run_distributed(all_families, 1, configs)[0]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join(map(str, layout)).replace(" ", "-"))
def test_layout_equals_one_process(corpus, one_process, layout, record_property):
    tensor, pipeline, data, micro_batch_size, options = layout
    parallel = parallel_of(layout)
    recompute = "full" if "recompute" in options else "selective"
    configs = configs_for(corpus, parallel, micro_batch_size, recompute=recompute)
    for rank, runs in enumerate(
        run_distributed(
            all_families, tensor * pipeline * data * context_of(options), configs, parallel=parallel
        )
    ):
        for name, run in runs.items():
            differences = assert_equal_runs(run, one_process[name])
            if rank == 0:
                record_property("table: layout", (*layout, name, *(f"{d:.1e}" for d in differences)))


INTERLEAVED = [
    slow((1, 2, 1, 2, "interleaved")),
    slow((2, 2, 1, 2, "interleaved, sequence")),
    slow((1, 2, 2, 2, "overlap, interleaved")),
    slow((1, 2, 2, 2, "overlap, gather, interleaved")),
    slow((1, 2, 1, 1, "context 2, interleaved")),
]


@pytest.mark.parametrize("layout", INTERLEAVED, ids=lambda layout: "-".join(map(str, layout)))
def test_interleaved_stages_equal_one_process(corpus, layout, record_property):
    """5 layers in 4 chunks on 2 stages."""
    tensor, pipeline, data, micro_batch_size, options = layout
    model, parallel = toy_model(num_layers=5), parallel_of(layout)
    reference = run_distributed(all_families, 1, configs_for(corpus, ParallelConfig(), 8, model))[0]
    configs = configs_for(corpus, parallel, micro_batch_size, model)
    world_size = tensor * pipeline * data * context_of(options)
    runs = run_distributed(all_families, world_size, configs, parallel=parallel)[0]
    for name, run in runs.items():
        differences = assert_equal_runs(run, reference[name])
        record_property("table: layout", (*layout, name, *(f"{d:.1e}" for d in differences)))


@pytest.mark.slow
def test_seventeen_heads_equal_one_process(corpus, record_property):
    """Padded to 18 heads on 2 tensor parallel ranks and to 20 on 4, in uneven stages."""
    model = toy_model(hidden_size=17 * 8, num_attention_heads=17)
    reference = run_distributed(all_families, 1, configs_for(corpus, ParallelConfig(), 8, model))[0]
    for layout in [(2, 1, 1, 4, "17 heads"), (4, 1, 1, 4, "17 heads, sequence"), (2, 2, 2, 2, "17 heads")]:
        tensor, pipeline, data, micro_batch_size, _ = layout
        parallel = parallel_of(layout)
        configs = configs_for(corpus, parallel, micro_batch_size, model)
        runs = run_distributed(all_families, tensor * pipeline * data, configs, parallel=parallel)[0]
        for name, run in runs.items():
            differences = assert_equal_runs(run, reference[name])
            record_property("table: layout", (*layout, name, *(f"{d:.1e}" for d in differences)))


@pytest.mark.parametrize("recompute", [slow("none"), "norms", "full"])
def test_recomputed_activations_change_no_bit(corpus, one_process, recompute):
    """The reference runs have the default, selective."""
    configs = {
        name: replace(config, training=replace(config.training, recompute=recompute))
        for name, config in configs_for(corpus, ParallelConfig(), 8).items()
    }
    (runs,) = run_distributed(all_families, 1, configs)
    for name, run in runs.items():
        assert assert_equal_runs(run, one_process[name]) == (0.0, 0.0), name


@pytest.mark.slow
@pytest.mark.timeout(1900)
@pytest.mark.parametrize("name", ["duo", "esolm-two-parts"])
def test_triton_kernels_compute_what_pytorch_does(corpus, one_process, name, record_property):
    """Through Triton's interpreter, on two tensor parallel ranks; without Triton, one process."""
    pytest.importorskip("triton")
    layout = (2, 1, 1, 4, "sequence, triton")
    parallel = parallel_of(layout)
    config = configs_for(corpus, parallel, 4)[name]
    config = replace(config, training=replace(config.training, kernels="triton"))
    # The interpreter takes 5 minutes alone, 10 beside other work.
    run = run_distributed(three_steps, 2, config, parallel=parallel, timeout=1800)[0]
    differences = assert_equal_runs(run, one_process[name])
    record_property("table: layout", (*layout, name, *(f"{d:.1e}" for d in differences)))


# Embeddings of soft tokens are no part of an exported model.
PLAIN_FAMILIES = [name for name in FAMILIES if name != "duo-curriculum"]


@pytest.mark.parametrize("name", PLAIN_FAMILIES)
def test_gradients_are_those_of_an_independent_model(corpus, one_process, name):
    """Full logits and autograd through the exported model's code, first step."""
    from megatron_dlm.conversion.hugging_face_model.configuration_megatron_dlm import MegatronDlmConfig
    from megatron_dlm.conversion.hugging_face_model.family_megatron_dlm import likelihood_for
    from megatron_dlm.conversion.hugging_face_model.modeling_megatron_dlm import MegatronDlmModel
    from megatron_dlm.conversion.to_hugging_face import hugging_face_fields
    from megatron_dlm.run.datasets import open_data

    config = configs_for(corpus, ParallelConfig(), 8)[name]
    data = open_data(config.data)
    fields = hugging_face_fields(config.model, data.vocabulary, config.objective)
    plain = MegatronDlmModel(MegatronDlmConfig(**fields))
    plain.load_state_dict(weights.random_state(config.model, data.vocabulary.size))
    loss, tokens = 0.0, 0
    for inputs, targets in first_batch(config, data):
        mask = visibility(inputs, config.objective.attention)
        logits = plain(
            inputs.token_ids_BL,
            sigma=inputs.sigma_B,
            position_ids=inputs.position_ids_BL,
            visible_mask=None if mask is None else mask.dense(),
        ).logits
        nats = likelihood_for(plain.config).token_nats(
            logits, inputs.token_ids_BL, targets.clean_BL, inputs.sigma_B
        )
        seen = targets.weight_BL > 0
        loss = loss + (nats[seen] * targets.weight_BL[seen]).sum()
        tokens += targets.token_count
    loss = loss / tokens
    loss.backward()
    run = one_process[name]
    assert loss.item() == pytest.approx(run["losses"][0][0], rel=1e-5)
    for parameter_name, parameter in plain.named_parameters():
        gradient = run["gradients"][0][parameter_name]
        difference = (parameter.grad - gradient).abs().max() / gradient.abs().max()
        assert difference < 2e-5, (name, parameter_name, float(difference))


def first_batch(config, data):
    """The corrupted parts of the first global batch."""
    import numpy as np

    from megatron_dlm.data.loading.blending import PlanSegment, SampleReader
    from megatron_dlm.diffusion.context import CorruptionContext
    from megatron_dlm.families.documents import corrupt
    from megatron_dlm.families.schedules import training_objective
    from megatron_dlm.platform.rng import NoiseSource

    size = config.training.global_batch_size
    noise = NoiseSource(config.training.seed)
    positions = np.arange(size)
    reader = SampleReader([PlanSegment(0, data.train.blend)], data.train.rows, noise)
    batch = reader.read(positions)
    context = CorruptionContext(noise=noise, step=0, batch_start=0, global_batch_size=size, training=True)
    objective = training_objective(config.objective, data.vocabulary)
    return [corrupt(objective, part, context) for part in objective.split(batch, context)]


@pytest.mark.parametrize("name", ["mdlm", "duo"])
def test_seventeen_heads_train_on_two_ranks_as_on_one(corpus, name):
    """The paper's largest model has 17 heads, which only 1 and 17 divide."""
    model = toy_model(hidden_size=68, num_attention_heads=17)
    runs = []
    for tensor in (1, 2):
        parallel = ParallelConfig(tensor_model_parallel_size=tensor)
        config = replace(configs_for(corpus, parallel, 4)[name], model=model)
        runs.append(run_distributed(three_steps, tensor, config, parallel=parallel)[0])
    assert_equal_runs(runs[1], runs[0])


def padded_part(state, config, steps):
    """Largest weight, moment and gradient in the padded heads of this rank after some steps."""
    from megatron_dlm.run.datasets import open_data
    from megatron_dlm.training.optimizer import set_learning_rate
    from megatron_dlm.training.session import Session

    session = Session(config, open_data(config.data), state)
    weights.set_weights(
        session.denoiser, state, weights.random_state(config.model, session.data.vocabulary.size)
    )
    session.optimizer.reload_model_params()
    found = 0.0
    head_dim = config.model.head_dim
    attention = session.denoiser.block.layers[0].self_attention
    for step in range(steps):
        session.run_batch(step, step * 8)
        set_learning_rate(session.optimizer, 1e-2)
        session.optimizer.step()
        if state.tensor_rank == 0:
            continue
        # Rank 1 of 2 holds heads 9 to 16 and the padded eighteenth.
        qkv, out = attention.linear_qkv.weight, attention.linear_proj.weight
        for part in (qkv, qkv.main_grad):
            found = max(found, float(part[-3 * head_dim :].abs().max()))
            assert part[: -3 * head_dim].abs().max() > 0
        for part in (out, out.main_grad):
            found = max(found, float(part[:, -head_dim:].abs().max()))
            assert part[:, :-head_dim].abs().max() > 0
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mdlm", "duo"])
def test_padded_heads_stay_exactly_zero_for_fifty_steps(corpus, name):
    parallel = ParallelConfig(tensor_model_parallel_size=2)
    model = toy_model(hidden_size=68, num_attention_heads=17)
    config = replace(configs_for(corpus, parallel, 4)[name], model=model)
    assert run_distributed(padded_part, 2, config, 50, parallel=parallel) == [0.0, 0.0]


def initial_loss(state, config):
    from megatron_dlm.run.datasets import open_data
    from megatron_dlm.training.session import Session

    session = Session(config, open_data(config.data), state)
    sums = session.run_batch(0, 0)
    full = weights.gather(session.denoiser, state, {p: p.detach() for p in session.denoiser.parameters()})
    return sums.bound / sums.tokens, session.data.vocabulary.size, full


def test_initial_weights_do_not_depend_on_the_layout(corpus):
    (first,) = run_distributed(initial_loss, 1, configs_for(corpus, ParallelConfig(), 8)["ar"])
    loss, size, state = first
    assert loss == pytest.approx(torch.tensor(size - 1.0).log().item(), rel=1e-6)
    parallel = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    for _, _, other in run_distributed(
        initial_loss, 4, configs_for(corpus, parallel, 8)["ar"], parallel=parallel
    ):
        assert all(torch.equal(other[name], tensor) for name, tensor in state.items())
    bound = 40**-0.5
    assert state["blocks.0.attn_qkv.weight"].abs().max() <= bound
    assert state["blocks.0.attn_qkv.weight"].std() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert (state["blocks.1.adaLN_modulation.weight"] == 0).all()
    assert (state["output_layer.linear.weight"] == 0).all()
