"""A checkpoint as a Hugging Face folder: safetensors, remote code, tokenizer, model card.

Tensors are read and written a file at a time, in one process, so no model is ever whole in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from torch import Tensor

from megatron_dlm.conversion.export_tokenizer import padding_id, write_tokenizer
from megatron_dlm.conversion.remote_code import MODEL, file_name, remote_code
from megatron_dlm.data.tokenizers.tokenizer import TOKENIZER_FILE
from megatron_dlm.families.base import ObjectiveConfig
from megatron_dlm.interfaces import AttentionPattern, Vocabulary
from megatron_dlm.models.config import LAYER_NORM_EPSILON, ROTARY_BASE, ModelConfig
from megatron_dlm.platform.files import beside, check_new, commit, flush_to_disk, sha256_of, write_json

ExportDtype = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[ExportDtype, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
CONFIG, INDEX, RUN = "config.json", "model.safetensors.index.json", "megatron_dlm_run.json"
GENERATION = "generation_config.json"
REPORT = "export_report.json"
WEIGHT_FILES = "model{suffix}.safetensors"
EXPORTED_TOKENIZER = "exported_tokenizer"
"""Entry of an export's run record: SHA-256 of its tokenizer.json, which may have one token more."""

_CARD = """---
library_name: transformers
tags: [diffusion-language-model]
---
# {family} language model

{parameters:,} parameters ({dtype}), {steps:,} training steps of {batch:,} x {length:,} tokens, trained with
megatron_dlm.

```python
from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained(PATH, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(PATH)
prompt = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=32)[0], skip_special_tokens=True))
```
`labels` give a loss for training, and `AutoModel` has `nll(ids)`, the negative log-likelihood (bound) in
nats, and the samplers of megatron_dlm (`help(model.generate)`). `{report}` tells how these weights were
compared with the trained model, and `python verify_megatron_dlm.py` in this folder repeats it.

| | |
|---|---|
{facts}

No stock architecture of transformers fits exactly, for any family: the head has a bias and never predicts
the mask token.
"""


@dataclass(frozen=True, kw_only=True)
class ExportSource:
    """A checkpoint and what describes it."""

    read: Callable[[Sequence[str]], dict[str, Tensor]]
    """Whole float32 tensors by public name."""
    shapes: dict[str, tuple[int, ...]]
    """Shape of every tensor by public name."""
    model: ModelConfig
    vocabulary: Vocabulary
    objective: ObjectiveConfig
    tokenizer: Path
    """Hugging Face tokenizer directory."""
    chat_template: str
    """Jinja template that the training data were written with; empty: the tokenizer's own, if it has one."""
    seq_length: int
    batch_size: int
    steps: int
    record: dict[str, Any]
    """The run's record, from which an import makes a checkpoint again."""


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A temporary directory that is moved to `output` if the `with` block ends without an error.

    Args:
        output: path of the folder, which must not exist yet.

    Yields:
        The temporary directory to fill.

    Raises:
        InputError: `output` exists.
    """
    check_new(output)
    with beside(output) as temporary:
        temporary.mkdir()
        default_mode = temporary.stat().st_mode & 0o666
        yield temporary
        for path in temporary.iterdir():
            # safetensors makes files that nobody else may read.
            path.chmod(default_mode)
            flush_to_disk(path)
        commit(temporary, output)


def write_folder(source: ExportSource, directory: Path, dtype: ExportDtype, max_shard_size: str) -> None:
    """Write the export without its verification files and model card.

    Args:
        source: checkpoint to export.
        directory: empty directory to write to.
        dtype: precision of the exported weights.
        max_shard_size: largest size of a weight file, for example "5GB".
    """
    # First: it refuses tokenizers that an export cannot have.
    write_tokenizer(source.tokenizer, source.vocabulary, source.seq_length, directory, source.chat_template)
    write_weights(source.read, source.shapes, directory, dtype, max_shard_size)
    padding = padding_id(directory)
    write_json(directory / CONFIG, _config(source, DTYPES[dtype]) | {"pad_token_id": padding})
    write_json(directory / GENERATION, _generation_config(source) | {"pad_token_id": padding})
    write_json(directory / RUN, source.record | {EXPORTED_TOKENIZER: sha256_of(directory / TOKENIZER_FILE)})
    for name, text in remote_code(source.objective.name).items():
        (directory / name).write_text(text, encoding="utf-8")


def write_weights(
    read: Callable[[Sequence[str]], dict[str, Tensor]],
    shapes: dict[str, tuple[int, ...]],
    directory: Path,
    dtype: ExportDtype,
    max_shard_size: str,
) -> None:
    """Write safetensors files, with an index if there are several; one file is in memory at a time.

    Args:
        read: function from public names to whole float32 tensors.
        shapes: shape of every tensor by public name.
        directory: directory of the export.
        dtype: precision of the exported weights.
        max_shard_size: largest size of a weight file, for example "5GB".
    """
    plan = split_state_dict_into_shards_factory(
        shapes,
        get_storage_size=lambda shape: math.prod(shape) * DTYPES[dtype].itemsize,
        filename_pattern=WEIGHT_FILES,
        max_shard_size=max_shard_size,
    )
    for name, tensors in plan.filename_to_tensors.items():
        # One at a time: reading takes the stored tensor beside its copy, in float32.
        state = {key: read([key])[key].to(DTYPES[dtype]).contiguous() for key in tensors}
        save_file(state, directory / name, metadata={"format": "pt"})
        # Before the next file's are read.
        del state
    if plan.is_sharded:
        write_json(directory / INDEX, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})


def hugging_face_fields(
    model: ModelConfig, vocabulary: Vocabulary, objective: ObjectiveConfig
) -> dict[str, Any]:
    """Fields of config.json for shape, vocabulary and family of the model."""
    return shape_fields(model, vocabulary) | family_fields(objective)


def family_fields(objective: ObjectiveConfig) -> dict[str, Any]:
    """Fields of config.json for the family: its name, causality and all plain-valued settings."""
    plain = {name: value for name, value in vars(objective).items() if isinstance(value, int | float | str)}
    return {"family": objective.name, "causal": objective.attention is AttentionPattern.CAUSAL, **plain}


def shape_fields(model: ModelConfig, vocabulary: Vocabulary) -> dict[str, Any]:
    """Fields of config.json for the network's shape and its vocabulary."""
    return {
        "vocab_size": vocabulary.size,
        "mask_token_id": vocabulary.mask_token_id,
        "bos_token_id": vocabulary.bos_token_id,
        "eos_token_id": vocabulary.eos_token_id,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "intermediate_size": model.ffn_hidden_size,
        "conditioning_size": model.conditioning_size,
        "layer_norm_epsilon": LAYER_NORM_EPSILON,
        "rope_theta": ROTARY_BASE,
    }


def _config(source: ExportSource, dtype: torch.dtype) -> dict[str, Any]:
    configuration, modeling, causal = (
        file_name(f"{MODEL}.{part}_megatron_dlm") for part in ("configuration", "modeling", "causal")
    )
    base = f"{modeling}.MegatronDlmModel"
    architecture = base
    if source.objective.predicts_next_token:
        architecture = f"{causal}.MegatronDlmForCausalLM"
    name = str(dtype).removeprefix("torch.")
    return {
        "architectures": [architecture.partition(".")[2]],
        "model_type": "megatron_dlm",
        "auto_map": {
            "AutoConfig": f"{configuration}.MegatronDlmConfig",
            "AutoModel": base,
            _auto_class(source.objective): architecture,
        },
        # The same by the name that transformers 5 uses and by the one before.
        "dtype": name,
        "torch_dtype": name,
        "max_position_embeddings": source.seq_length,
        "tie_word_embeddings": False,
        **hugging_face_fields(source.model, source.vocabulary, source.objective),
    }


def _auto_class(objective: ObjectiveConfig) -> str:
    """Auto class of transformers for the family, beside AutoModel."""
    return "AutoModelForCausalLM" if objective.predicts_next_token else "AutoModelForMaskedLM"


def _generation_config(source: ExportSource) -> dict[str, Any]:
    return {
        "bos_token_id": source.vocabulary.bos_token_id,
        "eos_token_id": source.vocabulary.eos_token_id,
    }


def write_card(source: ExportSource, directory: Path, dtype: ExportDtype, facts: dict[str, str]) -> None:
    """Write the model card.

    Args:
        source: checkpoint that was exported.
        directory: directory of the export.
        dtype: precision of the exported weights.
        facts: rows of the card's table, value by name.
    """
    card = _CARD.format(
        family=source.objective.name,
        parameters=sum(map(math.prod, source.shapes.values())),
        dtype=dtype,
        steps=source.steps,
        batch=source.batch_size,
        length=source.seq_length,
        report=REPORT,
        auto_class=_auto_class(source.objective),
        facts="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
    )
    (directory / "README.md").write_text(card, encoding="utf-8")
