"""The continuous-time NELBO of uniform-state diffusion, from sums over the vocabulary.

With K states of the noise, q = 1 - alpha, r = K alpha / q and p the prediction, a row costs, per unit of
-alpha' dt / (K alpha) (arXiv:2506.10892, the Rao-Blackwellised NELBO, rearranged so that nothing cancels):

    noisy = clean:  K/q [1/(1 + r p_z) - 1/(1 + r)] + c [(K-1) ln((1 + r p_z)/(1 + r)) - S + ln(1 + r p_z)]
    otherwise:      (K+r) ln(1 + r p_z) + (1+r) ln(1+r) - r ln(1 + r p_x) - S - K/q  r p_z / (1 + r p_z)

where S = sum_v ln(1 + r p_v), c = 1/(1 + r), z is the noisy token and x the clean one.
Shape legend: R rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class UniformRows:
    """float64 [R] coefficients of each row's loss that do not depend on the prediction."""

    states: int
    """K, the number of ids that the noise draws from."""
    q: Tensor
    r: Tensor
    same: Tensor
    """bool [R], the noise left the token as it was."""
    c: Tensor

    @classmethod
    def of(cls, states: int, alpha_R: Tensor, q_R: Tensor, same_R: Tensor) -> UniformRows:
        """Compute the coefficients of the rows.

        Args:
            states: K, the number of ids that the noise draws from.
            alpha_R: float64 [R], in [0, 1).
            q_R: 1 - alpha, of a shape that broadcasts to [R].
            same_R: bool [R], the noise left the token as it was.

        Returns:
            The rows' coefficients.
        """
        r_R = states * alpha_R / q_R
        return cls(states, q_R, r_R, same_R, torch.where(same_R, 1.0 / (1.0 + r_R), 1.0))

    def loss(self, s_R: Tensor, p_noisy_R: Tensor, p_clean_R: Tensor) -> Tensor:
        """Unweighted loss of each row, in nats.

        Args:
            s_R: float64 [R], sum over the vocabulary of ln(1 + r p).
            p_noisy_R: float64 [R], predicted probability of the noisy token.
            p_clean_R: float64 [R], predicted probability of the clean token.

        Returns:
            float64 [R], at least 0, to be weighted by -alpha' / (K alpha).
        """
        k, q, r = self.states, self.q, self.r
        log_z, log_x, log_r = torch.log1p(r * p_noisy_R), torch.log1p(r * p_clean_R), torch.log1p(r)
        # (1 + r p_z) / (1 + r) = 1 - r (1 - p_z) / (1 + r)
        missing = r * (1.0 - p_noisy_R) / (1.0 + r)
        unchanged = k / q * missing / (1.0 + r * p_noisy_R) + self.c * (
            (k - 1) * torch.log1p(-missing) - s_R + log_z
        )
        replaced = (
            (k + r) * log_z
            + (1.0 + r) * log_r
            - r * log_x
            - s_R
            - k / q * r * p_noisy_R / (1.0 + r * p_noisy_R)
        )
        return torch.where(self.same, unchanged, replaced)

    def slopes(self, p_noisy_R: Tensor, p_clean_R: Tensor) -> tuple[Tensor, Tensor]:
        """Derivatives of the loss in the predictions, without the term -c r / (1 + r p) of every column.

        Args:
            p_noisy_R: float64 [R], predicted probability of the noisy token.
            p_clean_R: float64 [R], predicted probability of the clean token.

        Returns:
            Two float64 [R], the derivatives at the noisy and at the clean token.
        """
        k, q, r = self.states, self.q, self.r
        h_z, h_x = r / (1.0 + r * p_noisy_R), r / (1.0 + r * p_clean_R)
        shared = -k / q * r / (1.0 + r * p_noisy_R) ** 2
        slope_z = torch.where(self.same, self.c * k, k + r) * h_z + shared
        return slope_z, torch.where(self.same, 0.0, -r * h_x)
