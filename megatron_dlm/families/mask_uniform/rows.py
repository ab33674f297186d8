"""The continuous-time NELBO of the mixture of mask and uniform noise, from sums over the vocabulary.

Let b = (1 - alpha) share / V, the probability that noise has put one certain id other than the mask where a
token was, and r = alpha / b. The reverse process jumps from z to y at the rate lambda pi(z) q(y) / q(z), with
lambda = -alpha' / alpha and q = alpha [clean] + (1 - alpha) pi; the model's with its prediction p in place of
the clean token. The integrand of the NELBO is the divergence of the two (arXiv:2506.10892 has it for uniform
noise alone). With S = sum_v ln(1 + r p_v) it is, at the noisy token z and the clean token x,

    z = x:           times lambda pi(z),       m / (b (1 + r p_z))
                                               + [b (ln(1 + r) - S) + (1 - alpha) ln(1 - m)] / (alpha + b),
                                               with m = r (1 - p_z) / (1 + r)
    z another id:    times lambda pi(z),       ln(1 + r p_z) / b + (1 + r) ln(1 + r) - r ln(1 + r p_x) - S
                                               - r p_z / (b (1 + r p_z))
    z = the mask:    times -alpha'/(1 - alpha), ln(1 + r) - ln(1 + r p_x) + (ln(1 + r) - S) / r

With share 1 this is uniform-state diffusion over all V ids. With share 0 the last line is -ln p_x and the
others have no weight, which is masked diffusion.
Shape legend: R rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST = 1e-300


@dataclass(frozen=True)
class MixtureRows:
    """float64 [R] coefficients of each row's loss that do not depend on the prediction; needs share > 0."""

    alpha: Tensor
    q: Tensor
    """1 - alpha."""
    b: Tensor
    r: Tensor
    same: Tensor
    """bool [R], the noise left the token as it was."""
    masked: Tensor
    """bool [R], the noisy token is the mask."""
    c: Tensor

    @classmethod
    def of(
        cls, alpha_R: Tensor, q_R: Tensor, probability: float, same_R: Tensor, masked_R: Tensor
    ) -> MixtureRows:
        """Compute the coefficients of the rows.

        Args:
            alpha_R: float64 [R], in [0, 1).
            q_R: 1 - alpha, of a shape that broadcasts to [R].
            probability: share / V, above 0.
            same_R: bool [R], the noise left the token as it was.
            masked_R: bool [R], the noisy token is the mask.

        Returns:
            The rows' coefficients.
        """
        b_R = q_R * probability
        # A row that only pads a chunk has alpha 0 and costs nothing.
        at_mask_R = b_R / alpha_R.clamp_min(SMALLEST)
        c_R = torch.where(masked_R, at_mask_R, torch.where(same_R, b_R / (alpha_R + b_R), 1.0))
        return cls(alpha_R, q_R, b_R, alpha_R / b_R, same_R, masked_R, c_R)

    def loss(self, s_R: Tensor, p_noisy_R: Tensor, p_clean_R: Tensor) -> Tensor:
        """Unweighted loss of each row, in nats.

        Args:
            s_R: float64 [R], sum over the vocabulary of ln(1 + r p).
            p_noisy_R: float64 [R], predicted probability of the noisy token; 0 if it is the mask.
            p_clean_R: float64 [R], predicted probability of the clean token.

        Returns:
            float64 [R], at least 0, to be weighted as the module says.
        """
        alpha, b, r = self.alpha, self.b, self.r
        log_z, log_x, log_r = torch.log1p(r * p_noisy_R), torch.log1p(r * p_clean_R), torch.log1p(r)
        noisy = 1.0 + r * p_noisy_R
        missing = r * (1.0 - p_noisy_R) / (1.0 + r)
        unchanged = missing / (b * noisy) + (b * (log_r - s_R) + self.q * torch.log1p(-missing)) / (alpha + b)
        replaced = log_z / b + (1.0 + r) * log_r - r * log_x - s_R - r * p_noisy_R / (b * noisy)
        masked = log_r - log_x + self.c * (log_r - s_R)
        return torch.where(self.masked, masked, torch.where(self.same, unchanged, replaced))

    def slopes(self, p_noisy_R: Tensor, p_clean_R: Tensor) -> tuple[Tensor, Tensor]:
        """Partial derivatives of the loss in the two predicted probabilities, with S held constant.

        Args:
            p_noisy_R: float64 [R], predicted probability of the noisy token.
            p_clean_R: float64 [R], predicted probability of the clean token.

        Returns:
            Two float64 [R], the derivatives at the noisy and at the clean token.
        """
        alpha, b, r = self.alpha, self.b, self.r
        h_z, h_x = r / (1.0 + r * p_noisy_R), r / (1.0 + r * p_clean_R)
        shared = -r / (b * (1.0 + r * p_noisy_R) ** 2)
        slope_z = torch.where(self.same, self.q / (alpha + b), 1.0 / b) * h_z + shared
        slope_x = torch.where(self.masked, -1.0, -r) * h_x
        # Where the two tokens are one, all is in the slope at the noisy one.
        return torch.where(self.masked, 0.0, slope_z), torch.where(self.same, 0.0, slope_x)
