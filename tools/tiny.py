"""Toy data and configurations that tests and tools share."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dlm.data.preprocessing.index import IndexConfig, build_shards
from megatron_dlm.data.tokenizers.tokenizer import train_tokenizer

if TYPE_CHECKING:
    from megatron_dlm.families.base import ObjectiveConfig
    from megatron_dlm.run.config import RunConfig

VOCABULARY_SIZE = 301
"""Token ids of a toy corpus, including the mask token."""
WORDS = "the model reads noisy tokens and predicts clean ones while def class return import self".split()


@dataclass(frozen=True)
class Corpus:
    """Where the files of a toy corpus are; shards without their suffixes."""

    directory: Path
    tokenizer: Path
    text: Path
    train: Path
    validation: Path

    @classmethod
    def at(cls, directory: Path) -> Corpus:
        """The corpus that `make_corpus` has made in a directory."""
        names = {name: directory / name for name in ("tokenizer", "train", "validation")}
        return cls(directory, text=directory / "train.jsonl", **names)


def sentences(count: int, seed: int) -> list[str]:
    """Random texts of 5 to 60 known words."""
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(5, 60))) for _ in range(count)]


def write_jsonl(path: Path, texts: Iterable[str]) -> Path:
    """Write texts as JSON lines; returns the path."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def make_corpus(directory: Path) -> Corpus:
    """Train a tokenizer of 301 ids and index 400 and 100 documents, in an existing directory."""
    corpus = Corpus.at(directory)
    train_tokenizer(sentences(200, seed=0), VOCABULARY_SIZE, corpus.tokenizer)
    for name, count in (("train", 400), ("validation", 100)):
        text = write_jsonl(directory / f"{name}.jsonl", sentences(count, seed=count))
        config = IndexConfig(input=(str(text),), output=directory / name, tokenizer=corpus.tokenizer)
        build_shards(config, lambda progress: None)
    return corpus


def run_config(corpus: Corpus, directory: Path, objective: ObjectiveConfig, **changes: Any) -> RunConfig:
    """A run of a few thousand parameters; `changes` replace fields of its sections, as section__field."""
    from megatron_dlm.checkpointing.layout import CheckpointConfig
    from megatron_dlm.data.loading.data_config import DataConfig
    from megatron_dlm.models.config import ModelConfig
    from megatron_dlm.run.config import EvaluationConfig, RunConfig, TelemetryConfig, TrainingConfig
    from megatron_dlm.run.lr_schedule import LrScheduleConfig

    config = RunConfig(
        directory=directory,
        model=ModelConfig(
            num_layers=2, hidden_size=32, num_attention_heads=4, ffn_hidden_size=64, conditioning_size=16
        ),
        objective=objective,
        data=DataConfig(train=(str(corpus.train),), validation=str(corpus.validation), seq_length=32),
        training=TrainingConfig(num_steps=4, global_batch_size=8, micro_batch_size=2, head_rows_per_chunk=48),
        schedule=LrScheduleConfig(lr=1e-2, min_lr=1e-3, warmup_steps=2, decay_steps=40),
        evaluation=EvaluationConfig(every=100, num_batches=1, batch_size=8),
        checkpoint=CheckpointConfig(save_every=2),
        telemetry=TelemetryConfig(log_every=1),
    )
    for name, value in changes.items():
        section, field = name.split("__")
        config = replace(config, **{section: replace(getattr(config, section), **{field: value})})
    return config
