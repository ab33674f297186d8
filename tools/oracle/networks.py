"""The recorded tiny networks: every method is named after the key it computes."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
import torch

from megatron_dlm.diffusion.context import CorruptionContext
from megatron_dlm.families.esolm.objective import EsoLMConfig
from megatron_dlm.interfaces import AttentionPattern, ModelInputs, TokenBatch, Vocabulary
from megatron_dlm.models.config import ModelConfig
from megatron_dlm.platform.launch import detect_environment
from megatron_dlm.platform.parallel import start_parallel, stop_parallel
from megatron_dlm.platform.parallel_config import ParallelConfig
from tools.oracle.noise import Array, RecordedNoise


def recorded_shape(arrays: Mapping[str, Array]) -> tuple[ModelConfig, Vocabulary]:
    """Shape and vocabulary of the recorded networks.

    Args:
        arrays: recorded arrays of the networks, by name.

    Returns:
        The model's configuration, and its vocabulary with ids 0 and 1 for <eos> and <bos>.
    """
    shape = json.loads(str(arrays["cfg"]))
    model = ModelConfig(
        num_layers=shape["blocks"],
        hidden_size=shape["hidden"],
        num_attention_heads=shape["heads"],
        ffn_hidden_size=4 * shape["hidden"],
        conditioning_size=shape["cond_dim"],
    )
    return model, Vocabulary(size=shape["vocab"], mask_token_id=shape["mask"], eos_token_id=0, bos_token_id=1)


class Networks:
    """The recorded tiny networks, run by this package's denoiser with the recorded weights."""

    def __init__(self, arrays: dict[str, Array]) -> None:
        self._arrays = arrays
        self._shape = json.loads(str(arrays["cfg"]))
        self._state = start_parallel(detect_environment(), ParallelConfig(device="cpu"))

    @torch.no_grad()
    def _run(self, attention: AttentionPattern, inputs: ModelInputs) -> Array:
        from megatron_dlm.models.denoiser import Denoiser
        from megatron_dlm.models.denoiser_config import denoiser_config
        from megatron_dlm.models.weight_mapping import weight_places

        model, vocabulary = recorded_shape(self._arrays)
        config = denoiser_config(model, ParallelConfig(), "fp32", "none")
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

    def ar_kv(self) -> Array:
        """Token by token through the exported model's cache."""
        x = torch.from_numpy(self._arrays["x"])
        places = torch.arange(x.shape[1]).expand_as(x)
        return self._cached("ar", [(x[:, [i]], places[:, [i]], 1) for i in range(x.shape[1])], keep_rows=True)

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

    def eso_samp_cache(self) -> Array:
        """`eso_samp_nocache` through the exported model's cache, fed clean tokens and the next masks."""
        order, clean = (torch.from_numpy(self._arrays[name]) for name in ("order", "x"))
        calls, done, before = [], 0, 0
        for size in self._arrays["eso_samp_k"].tolist():
            masks = torch.full((len(order), size), self._shape["mask"])
            ids = torch.cat([clean[:, before:done], masks], dim=1)
            calls.append((ids, order[:, before : done + size], done - before))
            before, done = done, done + size
        return self._cached("esolm", calls, keep_rows=False)

    @torch.no_grad()
    def _cached(
        self, family: str, calls: list[tuple[torch.Tensor, torch.Tensor, int]], *, keep_rows: bool
    ) -> Array:
        """Logits of what is kept or of what is not, from calls of (ids, positions, how many are kept)."""
        from megatron_dlm.conversion.hugging_face_model.configuration_megatron_dlm import MegatronDlmConfig
        from megatron_dlm.conversion.hugging_face_model.modeling_megatron_dlm import MegatronDlmModel

        shape = self._shape
        config = MegatronDlmConfig(
            family=family,
            causal=True,
            vocab_size=shape["vocab"],
            mask_token_id=shape["mask"],
            hidden_size=shape["hidden"],
            num_hidden_layers=shape["blocks"],
            num_attention_heads=shape["heads"],
            intermediate_size=4 * shape["hidden"],
            conditioning_size=shape["cond_dim"],
        )
        model = MegatronDlmModel(config)
        weights = {k[2:]: torch.from_numpy(v) for k, v in self._arrays.items() if k.startswith("w/")}
        model.load_state_dict(weights)
        cache = model.start_cache(len(calls[0][0]))
        found = []
        for ids, positions, count in calls:
            kept = torch.arange(ids.shape[1]).expand_as(ids) < count
            rows = kept if keep_rows else ~kept
            hidden = cache.hidden(ids, positions, torch.ones_like(kept), kept, rows)
            found.append(model.output_layer.head(hidden).unflatten(0, (len(ids), -1)))
        return torch.cat(found, dim=1).numpy()

    def close(self) -> None:
        """End the process group."""
        stop_parallel()
