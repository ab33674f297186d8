import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from megatron_dlm.checkpointing.layout import CheckpointConfig
from megatron_dlm.families.mdlm.objective import MDLMConfig
from megatron_dlm.interfaces import AttentionPattern, InputError
from megatron_dlm.platform.codec import decode, encode
from megatron_dlm.run.config import RunConfig
from megatron_dlm.run.presets import phase2_run, tiny_run


@dataclass(frozen=True)
class Mixed:
    numbers: tuple[int, ...]
    pattern: AttentionPattern
    path: Path | None


@pytest.mark.parametrize(
    "config", [tiny_run(MDLMConfig(loss="elbo"), num_steps=320), phase2_run(MDLMConfig())]
)
def test_run_config_round_trips_through_json(config):
    assert decode(RunConfig, json.loads(json.dumps(encode(config)))) == config


def test_tuples_enums_and_none_round_trip():
    for value in (
        Mixed((1, 2), AttentionPattern.CAUSAL, None),
        Mixed((), AttentionPattern.BIDIRECTIONAL, Path("a")),
    ):
        assert decode(Mixed, json.loads(json.dumps(encode(value)))) == value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("model", "num_layers"), "four", "config.model.num_layers: expected int, found 'four'"),
        (("model", "num_layers"), True, "config.model.num_layers: expected int, found True"),
        (("model", "depth"), 3, "config.model.depth: unknown field of ModelConfig"),
        (
            ("training", "precision"),
            "fp4",
            "config.training.precision: expected one of ('fp32', 'bf16', 'fp8')",
        ),
        (("objective", "class"), "Path", "config.objective: 'Path' is not a ObjectiveConfig"),
        (("schedule", "lr"), -1.0, "schedule.min_lr: 0.0001 is outside [0, schedule.lr -1.0]"),
    ],
)
def test_a_wrong_record_is_refused_by_name(path, value, message):
    record = encode(tiny_run(MDLMConfig(), num_steps=320))
    record[path[0]][path[1]] = value
    with pytest.raises(InputError) as error:
        decode(RunConfig, record)
    assert message in str(error.value)


def test_a_missing_field_without_default_is_refused_by_name():
    record = encode(replace(tiny_run(MDLMConfig(), num_steps=320), directory=Path("x")))
    del record["model"]["num_layers"]
    with pytest.raises(InputError, match=r"config\.model\.num_layers: missing"):
        decode(RunConfig, record)


def test_a_record_from_before_a_field_takes_the_default():
    config = tiny_run(MDLMConfig(), num_steps=320)
    record = encode(config)
    del record["parallel"]["context_parallel_size"], record["checkpoint"]
    assert decode(RunConfig, record) == replace(config, checkpoint=CheckpointConfig())
