"""Samplers that unmask tokens: by a plan drawn beforehand, or by the network's confidence.

Shape legend: B sequences, L tokens, R tokens predicted in a step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_dlm.sampling.categorical import Sharpening, draw, logit_chunks
from megatron_dlm.sampling.decoding_plan import Plan
from megatron_dlm.sampling.eos import finish_ended
from megatron_dlm.sampling.family_sampler import OnStep
from megatron_dlm.sampling.guidance import Head
from megatron_dlm.sampling.kv_reader import Reader
from megatron_dlm.sampling.noise import SampleNoise
from megatron_dlm.sampling.step_grid import blocks_of

CONFIDENCE_STEP = 2.0**-16
"""Confidences are rounded to multiples of this, so that rounding error, and so the batch, decides nothing."""


class Unmasking:
    """Unmasks the tokens of one batch, with `follow` (a plan) or `most_confident`."""

    def __init__(
        self,
        head: Head,
        vocab_size: int,
        reader: Reader,
        sharpen: Sharpening,
        noise: SampleNoise,
        eos_token_id: int | None,
        on_step: OnStep | None,
    ) -> None:
        """Prepare.

        Args:
            head: turns the reader's hidden states into logits.
            vocab_size: number of ids that the head has logits for.
            reader: runs the network on the tokens to unmask.
            sharpen: temperature and nucleus (top-p).
            noise: source of all random draws.
            eos_token_id: id of <eos>, which ends a text; None: texts do not end early.
            on_step: callback after each step; None: no callback.
        """
        self._head = head
        self._vocab_size = vocab_size
        self._reader = reader
        self._sharpen = sharpen
        self._noise = noise
        self._eos_token_id = eos_token_id
        self._on_step = on_step

    def follow(self, plan: Plan, ids_BL: Tensor, given_BL: Tensor) -> None:
        """Unmask tokens in the order of a plan.

        Args:
            plan: decoding plan of the batch.
            ids_BL: int64 [B, L], the mask token where not given; filled in place.
            given_BL: bool [B, L], True where a token is given and kept.
        """
        step_at_BL, known_BL = plan.step_at_BL.to(ids_BL.device), given_BL.clone()
        # Each token is drawn once, so its position is address enough.
        uniform_BL = self._noise.uniform("token")
        for step in range(plan.num_steps):
            wanted_BL = (step_at_BL == step) & ~known_BL
            if wanted_BL.any():
                hidden_RD, rows_R, positions_R = self._reader(ids_BL, wanted_BL, step)
                for part, logits in logit_chunks(self._head, hidden_RD, self._vocab_size):
                    where = rows_R[part], positions_R[part]
                    ids_BL[where] = draw(self._sharpen(logits), uniform_BL[where])
                known_BL |= wanted_BL
                self._stop(ids_BL, known_BL, given_BL)
            self._tell(step, ids_BL)

    def most_confident(
        self, ids_BL: Tensor, given_BL: Tensor, num_steps: int, block_length: int | None
    ) -> None:
        """Predict all masked tokens of the block in each step and keep the most probable predictions.

        The others are masked again ("low-confidence remasking", arXiv:2502.09992); the number kept spreads
        the block's tokens evenly over its steps.

        Args:
            ids_BL: int64 [B, L], the mask token where not given; filled in place.
            given_BL: bool [B, L], True where a token is given and kept.
            num_steps: denoising steps per block.
            block_length: unknown tokens per block; None: all tokens are one block.
        """
        known_BL = given_BL.clone()
        # Index among its sequence's unknown tokens.
        ordinal_BL = torch.where(given_BL, -1, (~given_BL).cumsum(1) - 1)
        unknown_B = (~given_BL).sum(1).tolist()
        num_blocks = max(len(blocks_of(unknown, block_length)) for unknown in unknown_B)
        for step in range(num_blocks * num_steps):
            index, step_of_block = divmod(step, num_steps)
            first = index * (block_length or 0)
            sizes = [max(0, min(block_length or unknown, unknown - first)) for unknown in unknown_B]
            size_B = torch.tensor(sizes, device=ids_BL.device)
            known_after_B = first + size_B * (step_of_block + 1) // num_steps
            in_block_BL = (ordinal_BL >= first) & (ordinal_BL < (first + size_B)[:, None])
            known_now_B = ((ordinal_BL >= 0) & (ordinal_BL < (first + size_B)[:, None]) & known_BL).sum(1)
            count_B = known_after_B - known_now_B
            wanted_BL = in_block_BL & ~known_BL & (count_B > 0)[:, None]
            if wanted_BL.any():
                self._keep_best(ids_BL, known_BL, wanted_BL, count_B, step)
                self._stop(ids_BL, known_BL, given_BL)
            self._tell(step, ids_BL)

    def above_threshold(
        self, ids_BL: Tensor, given_BL: Tensor, threshold: float, block_length: int | None
    ) -> None:
        """Predict all masked tokens of the block in each step and keep those above a probability.

        The most probable one is kept in any case, and a sequence goes on to its next block when its own is
        full ("confidence-aware parallel decoding", arXiv:2505.22618).

        Args:
            ids_BL: int64 [B, L], the mask token where not given; filled in place.
            given_BL: bool [B, L], True where a token is given and kept.
            threshold: probability in (0, 1]; 1 keeps one token in each step.
            block_length: unknown tokens per block; None: all tokens are one block.
        """
        known_BL, length = given_BL.clone(), ids_BL.shape[1]
        block_BL = ((~given_BL).cumsum(1) - 1) // (block_length or length)
        one_B = torch.ones(len(ids_BL), dtype=torch.int64, device=ids_BL.device)
        for step in range(int((~given_BL).sum(1).max())):
            current_B = torch.where(known_BL, length, block_BL).amin(1)
            wanted_BL = ~known_BL & (block_BL == current_B[:, None])
            if not wanted_BL.any():
                break
            self._keep_best(ids_BL, known_BL, wanted_BL, one_B, step, threshold)
            self._stop(ids_BL, known_BL, given_BL)
            self._tell(step, ids_BL)

    def _keep_best(
        self,
        ids_BL: Tensor,
        known_BL: Tensor,
        wanted_BL: Tensor,
        count_B: Tensor,
        step: int,
        threshold: float = 1.0,
    ) -> None:
        uniform_BL = self._noise.uniform("token", step)
        drawn_BL, confidence_BL = ids_BL.clone(), torch.full_like(uniform_BL, -1.0)
        hidden_RD, rows_R, positions_R = self._reader(ids_BL, wanted_BL, step)
        for part, logits in logit_chunks(self._head, hidden_RD, self._vocab_size):
            where = rows_R[part], positions_R[part]
            drawn = draw(self._sharpen(logits), uniform_BL[where])
            drawn_BL[where] = drawn
            # Of the plain distribution: a sharpened one may be equally sure of everything.
            confidence_BL[where] = logits.double().softmax(-1).gather(1, drawn[:, None])[:, 0]
        # In a text of masks all predictions are alike but for rounding; then the leftmost comes first.
        confidence_BL = (confidence_BL / CONFIDENCE_STEP).round()
        rank_BL = confidence_BL.sort(dim=1, descending=True, stable=True).indices.argsort(1)
        kept_BL = wanted_BL & ((rank_BL < count_B[:, None]) | (confidence_BL * CONFIDENCE_STEP > threshold))
        ids_BL.copy_(torch.where(kept_BL, drawn_BL, ids_BL))
        known_BL |= kept_BL

    def _stop(self, ids_BL: Tensor, known_BL: Tensor, given_BL: Tensor) -> None:
        if self._eos_token_id is not None:
            ended_B = finish_ended(ids_BL, known_BL, given_BL, self._eos_token_id)
            self._reader.drop(ended_B)

    def _tell(self, step: int, ids_BL: Tensor) -> None:
        if self._on_step is not None:
            self._on_step(step, ids_BL)
