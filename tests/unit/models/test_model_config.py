import pytest

from megatron_dlm.interfaces import InputError, Vocabulary
from megatron_dlm.models.config import ModelConfig
from megatron_dlm.models.sizes import PAPER_1_7B, paper_model, parameter_count
from megatron_dlm.models.weight_mapping import public_shapes
from megatron_dlm.platform.parallel_config import ParallelConfig
from megatron_dlm.run.lr_schedule import LrScheduleConfig


def model(**changes):
    fields = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 256}
    return ModelConfig(**(fields | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 5}, "model.num_attention_heads: 5 does not divide model.hidden_size 64"),
        ({"num_layers": 0}, "model.num_layers: 0 is below 1"),
        ({"hidden_size": 60, "num_attention_heads": 20}, "head dimension 3 is odd"),
    ],
)
def test_impossible_shapes_are_named(changes, message):
    with pytest.raises(InputError, match=message):
        model(**changes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tensor_model_parallel_size": 3}, "parallel.tensor_model_parallel_size: 3 does not divide"),
        (
            {"pipeline_model_parallel_size": 9},
            "parallel.pipeline_model_parallel_size: 9 exceeds model.num_layers",
        ),
    ],
)
def test_impossible_layouts_are_named(fields, message):
    with pytest.raises(InputError, match=message):
        model().check_parallel(ParallelConfig(**fields))


@pytest.mark.parametrize(
    ("layers", "stages", "expected"),
    [
        (25, 2, [13, 12]),
        (25, 3, [9, 8, 8]),
        (25, 4, [7, 6, 6, 6]),
        (28, 3, [10, 9, 9]),
        (28, 4, [7, 7, 7, 7]),
    ],
)
def test_stages_hold_nearly_equal_layers(layers, stages, expected):
    assert model(num_layers=layers).stage_layers(stages) == expected


def test_heads_are_padded_to_the_tensor_parallel_size():
    large = paper_model(PAPER_1_7B)
    assert [large.padded_heads(size) for size in (1, 2, 4, 8, 17)] == [17, 18, 20, 24, 17]


def test_the_largest_model_has_the_published_size():
    assert parameter_count(paper_model(PAPER_1_7B), 32001) == 1_778_450_049
    assert parameter_count(paper_model(PAPER_1_7B), 0) == 1_639_149_696


def test_all_sizes_have_their_published_parameter_counts(sizes_table):
    for row in sizes_table:
        found = paper_model(row["name"])
        assert parameter_count(found, 32001) == int(row["total_params_exact"]), row["name"]
        assert parameter_count(found, 0) == int(row["body_params_exact"]), row["name"]
        shapes = public_shapes(found, 32001).values()
        total = sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in shapes)
        assert total == int(row["total_params_exact"])


def test_unknown_size():
    with pytest.raises(InputError, match=r"model\.size: '7B' is not one of 6M"):
        paper_model("7B")


def test_special_ids_lie_in_the_vocabulary():
    with pytest.raises(InputError, match=r"vocabulary.mask_token_id: 10 is outside \[0, 10\)"):
        Vocabulary(size=10, mask_token_id=10, eos_token_id=0, bos_token_id=1)


@pytest.mark.parametrize("name", ["iso", "p1", "p2"])
def test_learning_rates_are_the_recorded_ones(oracle, name):
    total, warmup, low, high = oracle[f"lr/{name}/cfg"]
    schedule = LrScheduleConfig(lr=high, min_lr=low, warmup_steps=int(warmup), decay_steps=int(total))
    for step, expected in zip(oracle[f"lr/{name}/step"], oracle[f"lr/{name}/lr"], strict=True):
        assert schedule.at(int(step)) == pytest.approx(expected, rel=1e-9)


def test_learning_rate_shape():
    schedule = LrScheduleConfig(lr=1.0, min_lr=0.1, warmup_steps=4, decay_steps=104)
    assert [schedule.at(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert schedule.at(54) == pytest.approx(0.55)
    assert schedule.at(104) == schedule.at(10_000) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("style", "middle"),
    [
        ("linear", 0.55),
        ("cosine", 0.55),
        ("minus_sqrt", 0.1 + 0.9 * (1 - 0.5**0.5)),
        ("exponential", 0.1 + 0.9 * (2 * 0.5**0.5 - 1)),
    ],
)
def test_a_wsd_schedule_is_constant_until_its_decay(style, middle):
    schedule = LrScheduleConfig(
        lr=1.0,
        min_lr=0.1,
        warmup_steps=4,
        decay_steps=104,
        shape="wsd",
        wsd_decay_steps=20,
        wsd_decay_style=style,
    )
    assert [schedule.at(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert schedule.at(50) == schedule.at(84) == 1.0 > schedule.at(85)
    assert schedule.at(94) == pytest.approx(middle)
    assert schedule.at(104) == schedule.at(10_000) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lr": 1e-4, "min_lr": 1e-3}, "schedule.min_lr: 0.001 is outside"),
        ({"warmup_steps": 10, "decay_steps": 10}, "schedule.warmup_steps: 10 is outside"),
        ({"shape": "wsd"}, "schedule.wsd_decay_steps: 0 is outside"),
        ({"shape": "wsd", "wsd_decay_steps": 9_901}, "schedule.wsd_decay_steps: 9901 is outside"),
        ({"wsd_decay_steps": 5}, "schedule.wsd_decay_steps: 5, and schedule.shape is cosine"),
    ],
)
def test_impossible_schedules_are_named(fields, message):
    with pytest.raises(InputError, match=message):
        LrScheduleConfig(**fields)
