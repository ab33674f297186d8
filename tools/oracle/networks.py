"""The recorded tiny networks: every method is named after the key it computes."""

from __future__ import annotations

import json

import numpy as np
import torch

from megatron_dlm.interfaces import AttentionPattern, ModelInputs, TokenBatch, Vocabulary
from megatron_dlm.objectives.base import CorruptionContext
from megatron_dlm.objectives.esolm import EsoLMConfig
from megatron_dlm.platform.launch import detect_environment
from megatron_dlm.platform.parallel import ParallelConfig, start_parallel, stop_parallel
from oracle.noise import Array, RecordedNoise


class Networks:
    """The recorded tiny networks, run by this package's denoiser with the recorded weights."""

    def __init__(self, arrays: dict[str, Array]) -> None:
        self._arrays = arrays
        self._shape = json.loads(str(arrays["cfg"]))
        self._state = start_parallel(detect_environment(), ParallelConfig(device="cpu"))

    @torch.no_grad()
    def _run(self, attention: AttentionPattern, inputs: ModelInputs) -> Array:
        from megatron_dlm.models.config import ModelConfig, transformer_config
        from megatron_dlm.models.denoiser import Denoiser
        from megatron_dlm.models.weight_layout import weight_places

        shape = self._shape
        model = ModelConfig(
            num_layers=shape["blocks"],
            hidden_size=shape["hidden"],
            num_attention_heads=shape["heads"],
            ffn_hidden_size=4 * shape["hidden"],
            conditioning_size=shape["cond_dim"],
        )
        vocabulary = Vocabulary(
            size=shape["vocab"], mask_token_id=shape["mask"], eos_token_id=0, bos_token_id=0
        )
        config = transformer_config(model, ParallelConfig(), "fp32", "none")
        denoiser = Denoiser(model, config, vocabulary, attention, self._state)
        for place in weight_places(denoiser, self._state):
            place.parameter.copy_(place.cut(torch.from_numpy(self._arrays[f"w/{place.name}"])))
        return denoiser.logits(inputs).numpy()

    def _plain(self, attention: AttentionPattern, *, conditioned: bool = False) -> Array:
        x = torch.from_numpy(self._arrays["x"])
        sigma = torch.from_numpy(self._arrays["sigma"]) if conditioned else torch.zeros(len(x))
        positions = torch.arange(x.shape[1])[None]
        return self._run(attention, ModelInputs(token_ids_BL=x, position_ids_BL=positions, sigma_B=sigma))

    def ar(self) -> Array:
        return self._plain(AttentionPattern.CAUSAL)

    # Recorded with the reference's cache; causal attention gives the same without one.
    ar_kv = ar

    def bidir_sigma0(self) -> Array:
        return self._plain(AttentionPattern.BIDIRECTIONAL)

    def bidir_sigma(self) -> Array:
        return self._plain(AttentionPattern.BIDIRECTIONAL, conditioned=True)

    def _eso_inputs(self, batch_split: float) -> ModelInputs:
        """Corrupted by the objective with draws that mask just the recorded positions."""
        x, masked = self._arrays["x"], self._arrays["eso_xm"] == self._shape["mask"]
        masking = np.where(masked, 0.0, np.nextafter(1.0, 0.0))
        order = self._arrays["eso_u"]
        draws = {
            "time/jitter": np.full(len(x), 0.5),
            "mask": masking,
            "esolm/order": order,
            "esolm/sequential-mask": masking,
            "esolm/sequential-order": order,
        }
        context = CorruptionContext(
            noise=RecordedNoise(0, draws=draws),
            step=0,
            batch_start=0,
            global_batch_size=len(x),
            training=True,
        )
        vocabulary = Vocabulary(
            size=self._shape["vocab"], mask_token_id=self._shape["mask"], eos_token_id=0, bos_token_id=0
        )
        config = EsoLMConfig(alpha_0=0.5, batch_split=batch_split, time_order="reference")
        tokens = torch.from_numpy(np.concatenate([x, x[:, :1]], axis=1))
        batch = TokenBatch(token_ids=tokens, sample_indices=np.arange(len(x)))
        return config.build(vocabulary).corrupt(batch, context)[0]

    def eso_sort(self) -> Array:
        return self._eso_inputs(1.0).position_ids_BL.numpy()

    def eso_diff(self) -> Array:
        return self._run(AttentionPattern.CAUSAL, self._eso_inputs(1.0))

    def eso_seq_sort(self) -> Array:
        return self._eso_inputs(0.0).position_ids_BL[:, : self._arrays["x"].shape[1]].numpy()

    def eso_seq(self) -> Array:
        return self._run(AttentionPattern.CAUSAL, self._eso_inputs(0.0))[:, : self._arrays["x"].shape[1]]

    def eso_samp_nocache(self) -> Array:
        """Each group of masks after the clean tokens of the groups before it."""
        order = torch.from_numpy(self._arrays["order"])
        clean = torch.from_numpy(self._arrays["x"])
        found, done = [], 0
        for size in self._arrays["eso_samp_k"].tolist():
            masks = torch.full((len(order), size), self._shape["mask"])
            inputs = ModelInputs(
                token_ids_BL=torch.cat([clean[:, :done], masks], dim=1),
                position_ids_BL=order[:, : done + size],
                sigma_B=torch.zeros(len(order)),
            )
            found.append(self._run(AttentionPattern.CAUSAL, inputs)[:, done:])
            done += size
        return np.concatenate(found, axis=1)

    eso_samp_cache = eso_samp_nocache

    def close(self) -> None:
        """End the process group."""
        stop_parallel()
