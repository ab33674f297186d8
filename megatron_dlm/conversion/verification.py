"""Reference outputs of the trained model (NELBO, logits, samples) that an export must reproduce."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_dlm.conversion.denoiser_network import MegatronNetwork
from megatron_dlm.conversion.hugging_face_model.configuration_megatron_dlm import MegatronDlmConfig
from megatron_dlm.conversion.to_hugging_face import ExportDtype, hugging_face_fields
from megatron_dlm.data.tokenizers.encoders import LoadedTokenizer
from megatron_dlm.families.base import ObjectiveConfig
from megatron_dlm.families.registry import sampler_of
from megatron_dlm.interfaces import HeadRows, ModelInputs, Targets, TrainingError
from megatron_dlm.models.denoiser import Denoiser
from megatron_dlm.platform.files import write_json
from megatron_dlm.sampling.generate import sample
from megatron_dlm.sampling.settings import SamplingConfig
from megatron_dlm.sampling.start import start_from

CHECK_TENSORS, CHECK_RECORD = "check.safetensors", "check.json"
LOGIT_POSITIONS = 16
TRACE_SAMPLES, TRACE_LENGTH, TRACE_STEPS = 2, 32, 8
TRACE_SEEDS = 4
TOLERANCE: dict[ExportDtype, float] = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 5e-3}
"""Largest relative difference of NELBO and logits, by export precision. For bf16 both models compute in bf16
with different summation orders; an fp16 export is compared with the fp32 model."""


class _Margins(MegatronNetwork):
    """Network that records the smallest logit margin between the two most likely ids."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__(denoiser)
        self.smallest = float("inf")

    def head(self, hidden_RD: Tensor) -> Tensor:
        """[R, V] logits."""
        logits_RV = super().head(hidden_RD)
        first, second = logits_RV.topk(2, dim=-1).values.unbind(-1)
        self.smallest = min(self.smallest, float((first - second).min()))
        return logits_RV


@torch.no_grad()
def write_check(
    denoiser: Denoiser,
    objective: ObjectiveConfig,
    inputs: ModelInputs,
    targets: Targets,
    directory: Path,
    dtype: ExportDtype,
    rows_per_chunk: int | None,
    tokenizer: LoadedTokenizer,
) -> float:
    """Write a noisy batch, its NELBO and some of its logits, and a trace of greedy sampling.

    Args:
        denoiser: whole trained model on this process, in the precision of the comparison.
        objective: configuration of the model's family.
        inputs: noisy batch.
        targets: targets of the noisy batch.
        directory: directory of the export.
        dtype: precision of the exported weights.
        rows_per_chunk: most rows whose logits are in memory at once; None: what suits the device.
        tokenizer: tokenizer that the data was indexed with.

    Returns:
        The NELBO of the batch in nats per token.

    Raises:
        TrainingError: no token of the greedy samples depends on the network, so there is nothing to compare.
    """
    vocabulary = denoiser.vocabulary
    row_loss = objective.build(vocabulary).loss_and_dlogits
    losses = denoiser.head(denoiser(inputs), HeadRows.of(targets), row_loss, rows_per_chunk)
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
        "logits": denoiser.logits(one)[:, :LOGIT_POSITIONS, : vocabulary.size].contiguous(),
    }
    if inputs.attention_mask is not None:
        tensors["visible_mask"] = inputs.attention_mask.dense()[0, 0]
    longest = targets.clean_BL.shape[1]
    trace, trace_record = _deciding_trace(denoiser, objective, longest, dtype)
    save_file(tensors | {"trace": trace}, directory / CHECK_TENSORS)
    nats_per_token = float(losses.bound) / targets.token_count
    record = {
        "nats_per_token": nats_per_token,
        "dtype": dtype,
        "tolerance": TOLERANCE[dtype],
        "tokenizer": _tokenized(tokenizer, targets),
        "trace": trace_record,
    }
    write_json(directory / CHECK_RECORD, record)
    return nats_per_token


def _tokenized(tokenizer: LoadedTokenizer, targets: Targets) -> dict[str, Any]:
    """Texts of the batch with the ids that the data's tokenizer gives them."""
    texts = [tokenizer.decode(ids) for ids in targets.clean_BL.tolist()]
    return {"texts": texts, "ids": [tokenizer.ids_of(text) for text in texts]}


def _deciding_trace(
    denoiser: Denoiser, objective: ObjectiveConfig, longest: int, dtype: ExportDtype
) -> tuple[Tensor, dict[str, Any]]:
    """A greedy trace with network-chosen tokens; at fp32 the first margin exceeds rounding, if possible."""
    length = min(TRACE_LENGTH, longest)
    while True:
        found = []
        for seed in range(TRACE_SEEDS):
            trace, record = _greedy_trace(denoiser, objective, length, seed)
            margins = [margin for margin in record["margins"] if margin is not None]
            if not margins:
                continue
            if dtype != "fp32" or margins[0] > 10 * TOLERANCE[dtype]:
                return trace, record
            found.append((trace, record))
        if found:
            return found[0]
        if length == longest:
            raise TrainingError(
                f"export: greedy samples of {length} tokens decide none of them, so that comparing them "
                "would show nothing; --no-verify exports the model unproven"
            )
        length = min(2 * length, longest)


def _greedy_trace(
    denoiser: Denoiser, objective: ObjectiveConfig, length: int, seed: int
) -> tuple[Tensor, dict[str, Any]]:
    """int64 [steps, B, L], the tokens after each step, and how to sample them again."""
    config = MegatronDlmConfig(**hugging_face_fields(denoiser.model, denoiser.vocabulary, objective))
    family = sampler_of(objective.name).from_config(config)
    settings: dict[str, Any] = {"temperature": 0.0}
    default, taken = next(iter(family.samplers.items()))
    if "num_steps" in taken:
        settings |= {"sampler": default, "num_steps": TRACE_STEPS}
    network, states, margins = _Margins(denoiser), [], []

    def keep(step: int, ids_BL: Tensor) -> None:
        states.append(ids_BL.cpu().clone())
        margins.append(network.smallest)
        network.smallest = float("inf")

    start = start_from([[family.bos_token_id]] * TRACE_SAMPLES, length, family)
    sample(network, family, SamplingConfig(**settings), start, seed=seed, on_step=keep)
    record = {
        "settings": settings,
        "prompt": [[family.bos_token_id]] * TRACE_SAMPLES,
        "length": length,
        "seed": seed,
        # Where no token is drawn in a step nothing is decided: no margin.
        "margins": [None if margin == float("inf") else margin for margin in margins],
    }
    return torch.stack(states), record
