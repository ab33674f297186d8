"""A loaded model as a Hugging Face folder: safetensors, remote code, tokenizer, fixed-noise check."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from torch import Tensor

from megatron_dlm.data.encoders import LoadedTokenizer
from megatron_dlm.data.tokenizer import CONFIG_FILE, TOKENIZER_FILE
from megatron_dlm.interfaces import InputError, ModelInputs, Targets, Vocabulary
from megatron_dlm.models.config import LAYER_NORM_EPSILON, ROTARY_BASE, ModelConfig
from megatron_dlm.models.denoiser import Denoiser
from megatron_dlm.models.weight_layout import weight_places
from megatron_dlm.objectives.base import Objective, ObjectiveConfig
from megatron_dlm.platform.files import write_json
from megatron_dlm.platform.parallel import ParallelState

REMOTE_CODE = tuple(
    f"{part}_megatron_dlm.py" for part in ("configuration", "modeling", "noise", "likelihood", "generation")
)
CHECK_TENSORS, CHECK_RECORD = "check.safetensors", "check.json"
CHECK_LOGIT_POSITIONS = 16
MAX_SHARD_SIZE = "5GB"

_CARD = """---
library_name: transformers
tags: [diffusion-language-model]
---
# {family} language model

{parameters:,} parameters, {steps:,} training steps, trained with megatron_dlm.

```python
from transformers import AutoModel, AutoTokenizer

model = AutoModel.from_pretrained(PATH, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(PATH)
print(tokenizer.decode(model.generate(max_length={length})[0], skip_special_tokens=True))
```
`model.nll(ids)` gives the negative log-likelihood bound in nats, `model(ids).logits` the logits.
`{check_record}` and `{check_tensors}` hold a batch with fixed noise and the trained model's bound on it.
"""


@dataclass(frozen=True)
class ExportSource:
    """A whole model on this process, with what describes it."""

    denoiser: Denoiser
    parallel: ParallelState
    objective: ObjectiveConfig
    tokenizer: LoadedTokenizer
    seq_length: int
    head_rows_per_chunk: int
    steps: int


def export(
    source: ExportSource, inputs: ModelInputs, targets: Targets, output: Path, dtype: torch.dtype
) -> None:
    """Write the folder; it appears at `output` only when complete.

    Args:
        source: model on one process (tensor and pipeline parallel size 1).
        inputs: noisy batch of the fixed-noise check.
        targets: its targets.
        output: must not exist.
        dtype: of the exported weights.

    Raises:
        InputError: `output` exists.
    """
    if output.exists():
        raise InputError(f"output: {output} exists already")
    temporary = output.with_name(output.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        state = public_state(source.denoiser, source.parallel, dtype)
        save_torch_state_dict(state, temporary, max_shard_size=MAX_SHARD_SIZE, metadata={"format": "pt"})
        write_json(temporary / "config.json", _config(source, dtype))
        _copy_files(source, temporary, parameters=sum(tensor.numel() for tensor in state.values()))
        _write_check(source, inputs, targets, temporary)
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def public_state(denoiser: Denoiser, parallel: ParallelState, dtype: torch.dtype) -> dict[str, Tensor]:
    """Full tensors by public name from a model on one process."""
    return {
        place.name: place.join([place.parameter.detach()]).to(dtype).contiguous()
        for place in weight_places(denoiser, parallel)
    }


def hugging_face_fields(
    model: ModelConfig, vocabulary: Vocabulary, objective: ObjectiveConfig
) -> dict[str, Any]:
    """What config.json says of the model: shape, vocabulary and family."""
    # Whatever a family configures by a plain value; the remote code reads what it needs.
    family = {name: value for name, value in vars(objective).items() if isinstance(value, int | float | str)}
    return {
        "family": objective.name,
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
        **family,
    }


def _config(source: ExportSource, dtype: torch.dtype) -> dict[str, Any]:
    configuration, modeling = (name.removesuffix(".py") for name in REMOTE_CODE[:2])
    model_class = f"{modeling}.MegatronDlmModel"
    return {
        "architectures": ["MegatronDlmModel"],
        "model_type": "megatron_dlm",
        "auto_map": {
            "AutoConfig": f"{configuration}.MegatronDlmConfig",
            "AutoModel": model_class,
            "AutoModelForMaskedLM": model_class,
        },
        "dtype": str(dtype).removeprefix("torch."),
        "max_position_embeddings": source.seq_length,
        "tie_word_embeddings": False,
        **hugging_face_fields(source.denoiser.model, source.denoiser.vocabulary, source.objective),
    }


def _copy_files(source: ExportSource, directory: Path, *, parameters: int) -> None:
    for name in REMOTE_CODE:
        code = resources.files("megatron_dlm.conversion.hugging_face_model").joinpath(name)
        (directory / name).write_text(code.read_text(encoding="utf-8"), encoding="utf-8")
    for name in (TOKENIZER_FILE, CONFIG_FILE):
        shutil.copyfile(source.tokenizer.path / name, directory / name)
    card = _CARD.format(
        family=source.objective.name,
        parameters=parameters,
        steps=source.steps,
        length=source.seq_length,
        check_record=CHECK_RECORD,
        check_tensors=CHECK_TENSORS,
    )
    (directory / "README.md").write_text(card, encoding="utf-8")


@torch.no_grad()
def _write_check(source: ExportSource, inputs: ModelInputs, targets: Targets, directory: Path) -> None:
    """A noisy batch, some logits and the bound the trained model gives: what a reload must reproduce."""
    objective: Objective = source.objective.build(source.denoiser.vocabulary)
    head = source.denoiser.head
    losses = head.losses(
        source.denoiser(inputs),
        targets,
        objective.loss_and_dlogits,
        rows_per_chunk=source.head_rows_per_chunk,
    )
    one = replace(
        inputs,
        token_ids_BL=inputs.token_ids_BL[:1],
        position_ids_BL=inputs.position_ids_BL[:1],
        sigma_B=inputs.sigma_B[:1],
    )
    tensors = {
        "input_ids": inputs.token_ids_BL,
        "target_ids": targets.clean_BL,
        "weights": targets.bound_weight_BL,
        "sigma": inputs.sigma_B,
        "position_ids": inputs.position_ids_BL.contiguous(),
        "logits": source.denoiser.logits(one)[:, :CHECK_LOGIT_POSITIONS].contiguous(),
    }
    if inputs.attention_mask is not None:
        tensors["visible_mask"] = inputs.attention_mask[0, 0].contiguous()
    save_file(tensors, directory / CHECK_TENSORS)
    write_json(directory / CHECK_RECORD, {"nats_per_token": float(losses.bound) / targets.token_count})
