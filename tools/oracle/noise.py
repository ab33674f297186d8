"""Recorded draws in the place of addressed ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_dlm.platform.rng import NoiseSource

Array = NDArray[Any]
TIME_EPSILON = 1e-3


@dataclass(frozen=True)
class RecordedNoise(NoiseSource):
    """Recorded draws by stream, one row for each sample of the batch."""

    draws: dict[str, Array] = field(default_factory=dict)

    def uniform(self, stream: str, positions: Iterable[int], count: int) -> NDArray[np.float64]:
        """Recorded rows of `positions`."""
        rows = self.draws[stream][np.asarray(list(positions))].reshape(-1, count)
        return rows.astype(np.float64)

    def integers(self, stream: str, positions: Iterable[int], count: int, bound: int) -> NDArray[np.int64]:
        """Recorded rows of `positions`."""
        return self.draws[stream][np.asarray(list(positions))]
