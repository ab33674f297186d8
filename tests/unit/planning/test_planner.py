"""The planner against measured GPU rows, against the model itself, and in what it tells."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_dlm.interfaces import InputError
from megatron_dlm.models.sizes import paper_model, parameter_count
from megatron_dlm.planning.explanation import alternatives
from megatron_dlm.planning.gpus import GPUS, gpu_named, usable_gib
from megatron_dlm.planning.layouts import AXES, changes_between, legal_layouts, why_not
from megatron_dlm.planning.plan import GIB, Cluster, Planner, nearest
from megatron_dlm.planning.scaling_simulation import MOST_GPUS, simulate_scaling
from megatron_dlm.planning.stage import Stage
from megatron_dlm.run.config import load_recipe
from megatron_dlm.run.forward_passes import sampled_passes
from megatron_dlm.run.validation import check_run
from tools.bench.gpu_predictions import ROWS

EXAMPLES = Path(__file__).parents[3] / "examples"
H100 = gpu_named("h100")


def recipe(family="mdlm", name="1.7b", **changes):
    config = load_recipe(EXAMPLES / family / f"{name}.py")
    for path, value in changes.items():
        section, field = path.split("__")
        config = replace(config, **{section: replace(getattr(config, section), **{field: value})})
    return config


def planner(config, nodes=16, gpu=H100, per_node=8):
    return Planner(config, Cluster(gpu, nodes, per_node), 32_001)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.family}-{row.precision}-{row.microbatches}")
def test_measured_gpu_rows_are_predicted(row):
    predicted = row.predict()
    assert predicted.memory.total / GIB == pytest.approx(row.gib, rel=0.1)
    if row.role != "shown":
        assert 1e3 * predicted.time.total == pytest.approx(row.milliseconds, rel=0.15)


def test_half_of_the_rows_at_least_are_no_calibration():
    roles = [row.role for row in ROWS]
    assert roles.count("calibration") == 1 and roles.count("prediction") >= 4


@pytest.mark.parametrize(
    ("tensor", "pipeline", "chunks"), [(1, 1, 1), (2, 1, 1), (1, 4, 1), (2, 2, 2), (4, 3, 1)]
)
def test_stages_hold_the_model_and_its_replicated_parts(tensor, pipeline, chunks):
    """All ranks' parameters less what is on several of them are the published count."""
    model = replace(paper_model("113M"), num_attention_heads=12)
    config = recipe("ar", "tiny", training__global_batch_size=96)
    parallel = replace(
        config.parallel,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=chunks,
        pad_vocabulary_to=1,
    )
    config = replace(config, model=model, parallel=parallel)
    forward = sampled_passes(config, 32_000).largest
    stages = [
        Stage(config, tensor * pipeline, forward, 32_000, "cpu", stage).parameters()
        for stage in range(pipeline)
    ]
    d, c = model.hidden_size, model.conditioning_size
    time_embedder = 256 * c + c + c * c + c
    layer_copies = 3 * d + 6 * d * (c + 1)
    copies = model.num_layers * layer_copies + d + 2 * d * (c + 1) + time_embedder * pipeline * chunks
    found = tensor * sum(stages) - (tensor - 1) * copies - time_embedder * (pipeline * chunks - 1)
    assert found == parameter_count(model, 32_000)


def test_all_layouts_can_run_and_fit_and_are_ranked():
    config = recipe()
    found = planner(config).ranked(["bf16"])
    assert len(found) > 300
    times = [float(f"{each.time.total:.3g}") for each in found]
    assert times == sorted(times)
    sizes = {each.config.parallel.tensor_model_parallel_size for each in found}
    assert sizes == {1, 2, 4, 8}
    for each in found:
        check_run(each.config, 128)
        assert each.memory.total <= usable_gib(H100) * GIB and each.fits
        assert each.config.training.global_batch_size == config.training.global_batch_size
        assert 0 < each.mfu < 0.76


def test_layouts_are_different():
    found = list(legal_layouts(recipe("esolm", "113m"), 16, 8, ["bf16", "fp8"]))
    seen = {tuple(choice(config) for choice in AXES.values()) for config in found}
    assert len(seen) == len(found) > 100


def test_the_chosen_layout_is_compared_on_every_axis():
    found = planner(recipe()).ranked(["bf16"])
    others = alternatives(found[0], found)
    assert {other.axis for other in others} == set(AXES) - {"context parallel", "precision"}
    for other in others:
        assert other.slowdown >= 0.99
        assert AXES[other.axis](other.estimate.config) == other.choice != AXES[other.axis](found[0].config)
        assert other.by_seconds >= 0.0


def test_why_an_axis_is_not_used():
    assert "ssl_multiple" in why_not(recipe(), 128, "context").replace("-", "_")
    assert why_not(recipe(), 128, "tensor") is None


def test_the_nearest_layout_that_fits_changes_least():
    config = recipe(
        training__micro_batch_size=64, training__recompute="none", training__global_batch_size=8192
    )
    config = replace(config, evaluation=replace(config.evaluation, batch_size=8192))
    plans = planner(config)
    assert not plans.estimate(config).fits
    near = nearest(config, plans.ranked(["bf16"]))
    assert near.fits
    options = changes_between(config, near.config)
    assert options.keys() == {
        "--training.micro-batch-size",
        "--parallel.overlap-grad-reduce",
        "--parallel.overlap-param-gather",
    }


def test_no_layout_fits_a_gpu_that_is_too_small():
    tiny_gpu = replace(H100, memory_gib=2.0)
    assert planner(recipe(), nodes=1, gpu=tiny_gpu).ranked(["bf16"]) == []


@pytest.mark.parametrize("gpu", list(GPUS))
def test_every_gpu_can_be_planned_for(gpu):
    plans = planner(recipe("duo", "113m"), nodes=1, gpu=gpu_named(gpu))
    assert plans.ranked(["bf16"])[0].tokens_per_second_per_gpu > 1000
    fp8 = replace(plans.config, training=replace(plans.config.training, precision="fp8"))
    if GPUS[gpu].fp8_tflops:
        assert plans.ranked(["fp8"])
    else:
        assert plans.ranked(["fp8"]) == []
        with pytest.raises(InputError, match=f"training.precision: fp8, and {gpu} has no FP8"):
            plans.estimate(fp8)


def test_faster_parts_make_a_faster_step():
    """Each speed of the data sheet matters where it should."""
    config = recipe(parallel__tensor_model_parallel_size=2, parallel__pipeline_model_parallel_size=2)
    base = planner(config).estimate(config).time
    faster = {
        "bf16_tflops": ("products", "attention", "head"),
        "memory_tb_s": ("memory_bound", "optimizer", "head"),
        "link_gb_s": ("tensor_communication",),
        "network_gb_s": ("pipeline", "data_communication"),
    }
    for name, parts in faster.items():
        gpu = replace(H100, **{name: 2 * getattr(H100, name)})
        time = planner(config, gpu=gpu).estimate(config).time
        for part in parts:
            assert getattr(time, part) < 0.999 * getattr(base, part), (name, part)


def test_scaling_never_beats_its_ideal_by_more_than_what_is_sharded():
    found = planner(recipe()).ranked(["bf16"])[0]
    strong, weak = simulate_scaling(found, 32_001)
    assert strong[-1].gpus >= 1024 and weak[-1].gpus == MOST_GPUS
    for series in (strong, weak):
        speeds = [point.tokens_per_second for point in series]
        assert speeds == sorted(speeds)
        for point in series:
            assert point.tokens_per_second / point.gpus < 1.03 * speeds[0] / series[0].gpus
    assert {point.estimate.config.training.global_batch_size for point in strong} == {1024}
    shares = {point.estimate.config.training.global_batch_size / point.gpus for point in weak}
    assert shares == {8.0}


def test_bad_clusters_are_refused():
    with pytest.raises(InputError, match="--gpu: 'h1000' is not one of a100-40gb, a100"):
        gpu_named("h1000")
    with pytest.raises(InputError, match="--nodes: 0 is below 1"):
        Cluster(H100, 0, 8)
