"""The outputs of one recorded vocabulary and seed: every method is named after the key it computes."""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch

from megatron_dlm.diffusion.context import CorruptionContext
from megatron_dlm.diffusion.noise_schedules import alpha_and_slope
from megatron_dlm.diffusion.time_sampling import stratified_times
from megatron_dlm.families.ar.objective import ARConfig
from megatron_dlm.families.base import ObjectiveConfig
from megatron_dlm.families.duo.objective import DuoConfig
from megatron_dlm.families.esolm.objective import EsoLMConfig
from megatron_dlm.families.mdlm.objective import MDLMConfig
from megatron_dlm.interfaces import HeadRows, TokenBatch, Vocabulary
from megatron_dlm.platform.vocab_parallel import VocabShard
from megatron_dlm.sampling.decoding_plan import reveal_shares
from megatron_dlm.sampling.replacing import posterior_shares
from tools.oracle.draws import exponential_race
from tools.oracle.noise import TIME_EPSILON, Array, RecordedNoise

ROWS_PER_CHUNK = 16


class Case:
    """The outputs of one vocabulary and seed at one precision, each computed on demand by its name."""

    def __init__(self, inputs: dict[str, Array], dtype: torch.dtype) -> None:
        self._in = inputs
        self._dtype = dtype

    @cached_property
    def _mask(self) -> int:
        return int(self._in["mask_index"])

    @cached_property
    def _logits(self) -> torch.Tensor:
        return torch.from_numpy(self._in["logits"]).to(self._dtype)

    @property
    def _size(self) -> int:
        return self._logits.shape[-1]

    def _vocabulary(self, size: int | None = None, mask: int | None = None) -> Vocabulary:
        return Vocabulary(
            size=size or self._size,
            mask_token_id=self._mask if mask is None else mask,
            eos_token_id=0,
            bos_token_id=0,
        )

    def _context(self, *, training: bool, **draws: str) -> CorruptionContext:
        """Draws by stream (two underscores for a slash, one for a dash) and the input that holds them."""
        streams = {
            name.replace("__", "/").replace("_", "-"): self._in[source] for name, source in draws.items()
        }
        return CorruptionContext(
            noise=RecordedNoise(0, draws=streams),
            step=0,
            batch_start=0,
            global_batch_size=len(self._in["x0"]),
            training=training,
        )

    def _corrupt(self, config: ObjectiveConfig, context: CorruptionContext, **vocabulary: int) -> list[Any]:
        """(inputs, targets) of each part of the whole batch."""
        objective = config.build(self._vocabulary(**vocabulary))
        x0 = self._in["x0"]
        # A last column for the look-ahead, which diffusion families leave out.
        tokens = x0 if isinstance(config, ARConfig) else np.concatenate([x0, x0[:, :1]], axis=1)
        batch = TokenBatch(token_ids=torch.from_numpy(tokens), sample_indices=np.arange(len(x0)))
        return [objective.corrupt(part, context) for part in objective.split(batch, context)]

    def _losses(self, config: ObjectiveConfig, part: Any, logits: torch.Tensor, **vocabulary: int) -> Array:
        """[B, S] weighted training losses through a head that passes its input on as logits."""
        from megatron_dlm.models.head import Head

        vocab = VocabShard.of_rank(self._vocabulary(**vocabulary), 0, None, 1)
        head = Head(vocab.stop, vocab, None, self._dtype, torch.device("cpu"))
        head.weight.data = torch.eye(vocab.stop, dtype=self._dtype)
        head.bias.data.zero_()
        _, targets = part
        batch, positions = targets.clean_BL.shape
        hidden = torch.zeros(positions, batch, vocab.stop, dtype=self._dtype)
        hidden[: logits.shape[1], :, : logits.shape[2]] = logits[:batch].transpose(0, 1)
        row_loss = config.build(vocab.vocabulary).loss_and_dlogits
        losses = head(hidden, HeadRows.of(targets), row_loss, ROWS_PER_CHUNK)
        grid = torch.zeros(positions * batch, dtype=self._dtype)
        grid[losses.rows.places_R] = losses.losses_R
        weighted = grid.view(positions, batch).t().double() * targets.weight_BL
        return weighted.numpy()

    # ---- time and noise level

    def t(self) -> Array:
        context = self._context(training=False, time__jitter="u_t")
        order = np.arange(len(self._in["u_t"]))
        return stratified_times(order, context, time_epsilon=TIME_EPSILON, order="reference")[:, 0]

    def alpha_t(self) -> Array:
        return alpha_and_slope("log-linear", self.t())[0][:, None]

    def dalpha_t(self) -> Array:
        return alpha_and_slope("log-linear", self.t())[1][0]

    def sigma_t(self) -> Array:
        return -np.log(self.alpha_t())

    def s(self) -> Array:
        return self.t() * self._in["s_frac"]

    # ---- MDLM

    def _mdlm(self, *, training: bool) -> tuple[MDLMConfig, Any]:
        config = MDLMConfig(time_order="reference")
        context = self._context(training=training, time__jitter="u_t", mask="u_move")
        return config, self._corrupt(config, context)[0]

    def mdlm_xt(self) -> Array:
        return self._mdlm(training=False)[1][0].token_ids_BL.numpy()

    def mdlm_elbo(self) -> Array:
        config, part = self._mdlm(training=False)
        return self._losses(config, part, self._logits)

    mdlm_elbo_duorepo = mdlm_elbo_mdlmrepo = mdlm_elbo

    def mdlm_lowvar(self) -> Array:
        config, part = self._mdlm(training=True)
        return self._losses(config, part, self._logits)

    def _prediction(self) -> torch.Tensor:
        vocab = VocabShard.of_rank(self._vocabulary(), 0, None, 1)
        logits = self._logits.to(torch.float64, copy=True)
        return vocab.exclude_(logits.flatten(0, 1)).view_as(logits).softmax(-1)

    def mdlm_step_px0(self) -> Array:
        return self._prediction().numpy()

    def _mdlm_step(self, alpha_s: Array) -> Array:
        edges = np.stack([self.alpha_t()[:, 0], alpha_s], axis=1)
        share_B11 = np.stack([reveal_shares(row.tolist()) for row in edges])[..., None]
        weights = share_B11 * self._prediction().numpy()
        weights[..., self._mask] = 1.0 - share_B11[..., 0]
        noisy = self.mdlm_xt()
        return np.where(noisy == self._mask, self._drawn(weights), noisy)

    def mdlm_step_xs(self) -> Array:
        return self._mdlm_step(alpha_and_slope("log-linear", self.s())[0])

    def mdlm_final_x(self) -> Array:
        return self._mdlm_step(np.ones(len(self.s())))

    # ---- Duo

    def _duo(self, **changes: Any) -> tuple[DuoConfig, CorruptionContext]:
        config = DuoConfig(time_order="reference", **changes)
        draws = {"time__jitter": "u_t", "duo__replace": "u_move", "duo__token": "u_tok"}
        return config, self._context(training=True, **draws)

    def duo_xt(self) -> Array:
        return self._corrupt(*self._duo())[0][0].token_ids_BL.numpy()

    def duo_logp(self) -> Array:
        return self._prediction().log().numpy()

    def duo_nll(self) -> Array:
        config, context = self._duo()
        return self._losses(config, self._corrupt(config, context)[0], self._logits)

    duo_kl_rate = duo_nll

    def duo_nll_nomaskzero(self) -> Array:
        """A vocabulary whose mask token is one more id, outside the noise."""
        config, context = self._duo(mask_in_noise=False)
        larger = {"size": self._size + 1, "mask": self._size}
        return self._losses(config, self._corrupt(config, context, **larger)[0], self._logits, **larger)

    def _duo_posterior(self, prediction: torch.Tensor, alpha_s: Array) -> torch.Tensor:
        noisy_BL1 = torch.from_numpy(self.duo_xt())[..., None]
        now, next_ = (torch.from_numpy(a).reshape(-1, 1, 1) for a in (self.alpha_t(), alpha_s))
        shares = posterior_shares(prediction.gather(-1, noisy_BL1), now, next_, self._size)
        posterior = shares.predicted * prediction + shares.noise / self._size
        return posterior.scatter_add(-1, noisy_BL1, shares.stays)

    def duo_post(self) -> Array:
        return self._duo_posterior(self._prediction(), alpha_and_slope("log-linear", self.s())[0]).numpy()

    def duo_post_final(self) -> Array:
        return self._duo_posterior(self._prediction(), np.ones(len(self.s()))).numpy()

    def duo_post_true(self) -> Array:
        clean = torch.nn.functional.one_hot(torch.from_numpy(self._in["x0"]), self._size).double()
        return self._duo_posterior(clean, alpha_and_slope("log-linear", self.s())[0]).numpy()

    def _drawn(self, weights: Array) -> Array:
        return exponential_race(weights, self._in["u_gumbel"])

    def duo_step_xs(self) -> Array:
        return self._drawn(self.duo_post())

    def duo_final_x(self) -> Array:
        return self._drawn(self.duo_post_final())

    # ---- AR

    def ar_nll(self) -> Array:
        config = ARConfig()
        part = self._corrupt(config, self._context(training=True))[0]
        return self._losses(config, part, self._logits[:, :-1])

    # ---- Eso-LM

    _ESO_DRAWS: ClassVar[dict[str, str]] = {
        "time__jitter": "u_t",
        "mask": "u_move",
        "esolm__order": "u_sort",
        "esolm__sequential_mask": "u_move0",
        "esolm__sequential_order": "u_sort0",
    }

    def _eso(self, alpha_0: float, batch_split: float, loss: Any) -> tuple[EsoLMConfig, list[Any]]:
        config = EsoLMConfig(alpha_0=alpha_0, batch_split=batch_split, loss=loss, time_order="reference")
        return config, self._corrupt(config, self._context(training=True, **self._ESO_DRAWS))

    def _eso_sequential(self) -> tuple[EsoLMConfig, Any]:
        config, (part,) = self._eso(0.5, 0.0, "elbo")
        return config, part

    def esoE_diff_sort(self) -> Array:
        return self._eso(0.5, 1.0, "elbo")[1][0][0].position_ids_BL.numpy()

    def _eso_diffusion(self, loss: str) -> Array:
        config, (part,) = self._eso(0.5, 1.0, loss)
        return self._losses(config, part, self._logits)

    def esoE_diff_elbo(self) -> Array:
        return self._eso_diffusion("elbo")

    def esoE_diff_lowvar(self) -> Array:
        return self._eso_diffusion("low-variance")

    def _first_half(self, values: Array) -> Array:
        return values[:, : values.shape[1] // 2]

    def esoE_seq_sort(self) -> Array:
        return self._first_half(self._eso_sequential()[1][0].position_ids_BL.numpy())

    def esoE_z0(self) -> Array:
        """The noisy half, put back in the order of the text."""
        inputs, _ = self._eso_sequential()[1]
        order, noisy = (self._first_half(x.numpy()) for x in (inputs.position_ids_BL, inputs.token_ids_BL))
        z0 = np.empty_like(noisy)
        np.put_along_axis(z0, order, noisy, axis=1)
        return z0

    def esoE_seq(self) -> Array:
        config, part = self._eso_sequential()
        return self._first_half(self._losses(config, part, self._logits))

    def _eso_total(self, alpha_0: float, batch_split: float, loss: str) -> float:
        config, parts = self._eso(alpha_0, batch_split, loss)
        tokens = sum(targets.token_count for _, targets in parts)
        return float(sum(self._losses(config, part, self._logits).sum() for part in parts) / tokens)

    def esoE_loss_a05(self) -> Array:
        return np.array(self._eso_total(0.5, 0.5, "elbo"))

    def esoE_num_tokens_a05(self) -> Array:
        return np.array(self._eso(0.5, 0.5, "elbo")[1][0][1].token_count)

    def esoE_nlls_a05(self) -> Array:
        return self.esoE_loss_a05() * self.esoE_num_tokens_a05()

    esoS_diff_sort, esoS_diff_elbo, esoS_diff_lowvar = esoE_diff_sort, esoE_diff_elbo, esoE_diff_lowvar
    esoS_seq_sort, esoS_z0, esoS_num_tokens_a05 = esoE_seq_sort, esoE_z0, esoE_num_tokens_a05

    def eso1_loss_elbo(self) -> Array:
        return np.array([self._eso_total(1.0, 1.0, "elbo")])

    def eso1_loss_lowvar(self) -> Array:
        return np.array([self._eso_total(1.0, 1.0, "low-variance")])
